"""Kernel images: loaders for each boot protocol, and the ROM."""
