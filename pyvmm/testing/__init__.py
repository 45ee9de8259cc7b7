"""Fakes that pyvmm ships for tests of devices and of code built on it."""
