"""The human and machine monitors, over one command registry."""
