"""Notebooks as runs: executed with parameters, swept over grids, repeated, and their results read as a table."""
