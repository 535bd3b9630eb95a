"""Notebooks as runs: executed with parameters, swept, repeated, read back."""
