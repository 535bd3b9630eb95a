"""The machine: processor, memory, threads, environment, measured rates."""
