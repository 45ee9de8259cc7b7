"""The human monitor: a command line over the same commands as QMP, with text as output."""
