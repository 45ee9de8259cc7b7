"""Byte streams to the host, each with the same small interface."""
