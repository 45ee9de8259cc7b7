"""Kernels: loaders for each boot protocol, and the ROM."""
