"""What the notebooks measure with: benchmarks, the museum of failures, synthetic checkpoints, the built-in model."""
