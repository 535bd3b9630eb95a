"""The environment of a result: versions, processor, instruction set, threads; without paths and host names."""

import platform
from importlib.metadata import PackageNotFoundError, version

from ktlib.system.cpu import cpu_info

PACKAGES = ("ktlib", "torch", "transformers", "peft", "accelerate", "numpy")


def stamp():
    """Print :func:`facts`, one a line. Notebooks call this in a cell that is tagged nbval-ignore-output."""
    for name, value in facts().items():
        print(f"{name:<13} {value}")


def facts():
    """``{name: text}``: versions of Python and packages, processor, threads, instruction set."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    info = cpu_info()
    return versions | {
        "processor": info["model"],
        "torch threads": f"{info['threads']} on {info['cores']} cores",
        "kernels": info["isa"],
    }
