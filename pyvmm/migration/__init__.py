"""Saving and loading the machine, and live update by exec."""
