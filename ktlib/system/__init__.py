"""The machine: processor, threads, environment, measured rates."""
