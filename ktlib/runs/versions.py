"""What a result was computed with: versions, processor, instruction set, threads. No paths, no host names."""

import platform
from importlib.metadata import PackageNotFoundError, version

from ktlib.system.cpu import cpu_info

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
    info = cpu_info()
    return lines | {
        "processor": info["model"],
        "torch threads": f"{info['threads']} on {info['cores']} cores",
        "kernels": info["isa"],
    }
