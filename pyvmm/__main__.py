"""``python -m pyvmm``."""

from pyvmm.cli import command

command()
