"""pyvmm: a minimal KVM virtual machine monitor with live update built in."""

__version__ = "0.1.0"
