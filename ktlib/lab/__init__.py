"""Tools of the notebooks: benchmarks, validation, the museum of failures, synthetic checkpoints, the built-in model."""
