"""Starts ``pyvmm run`` as its users do, as a process of its own, and talks to it."""

from harness.process import DEADLINE_S, Deadline, pyvmm, run_cli, wait_until
from harness.vm import UpdateError, Vm, VmExitedError

__all__ = [
    "DEADLINE_S",
    "Deadline",
    "UpdateError",
    "Vm",
    "VmExitedError",
    "pyvmm",
    "run_cli",
    "wait_until",
]
