"""What a result was computed with: versions, processor, instruction set, threads. No paths, no host names."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ktlib", "torch", "transformers", "peft", "accelerate", "numpy")


def stamp():
    """Print the versions and the machine, one fact a line. Notebooks call it in a cell tagged nbval-ignore-output."""
    for name, value in facts().items():
        print(f"{name:<13} {value}")


def facts():
    """The lines of :func:`stamp` as a dict of strings."""
    lines = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    lines["processor"] = processor_name()
    return lines | {"torch threads": _threads(), "kernels": _kernels()}


def processor_name():
    """The processor's own name, such as ``AMD EPYC 9845 160-Core Processor``."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _threads():
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{torch.get_num_threads()} of {cores} cores"


def _kernels():
    import ktlib

    return ktlib.cpu_info()["isa"]
