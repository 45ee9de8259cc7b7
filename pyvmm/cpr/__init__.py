"""Descriptors and host-side state carried over an exec, usable before any device exists."""
