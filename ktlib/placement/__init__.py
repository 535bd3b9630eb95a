"""Where experts live: on the CPU, on which NUMA node, in which process."""
