"""Adapters and checkpoints in other layouts, in and out."""
