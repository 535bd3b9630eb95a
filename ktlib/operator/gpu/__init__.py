"""Experts whose weights are sent to a GPU for the time of a product."""
