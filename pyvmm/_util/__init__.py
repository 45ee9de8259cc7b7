"""Leaf helpers: they import nothing of pyvmm but its errors."""
