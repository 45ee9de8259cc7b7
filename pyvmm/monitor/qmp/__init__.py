"""QMP, the machine monitor: JSON in, JSON out, over the command registry."""
