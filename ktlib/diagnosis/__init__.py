"""What is wrong with an adapter, a model or a run."""
