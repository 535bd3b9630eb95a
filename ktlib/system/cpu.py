"""What the CPU can run: instruction sets of the operator, and which one it takes."""

import os
import platform

import torch

from ktlib import _kernels


def cpu_info():
    """Facts about this CPU as a dict.

    ``model`` (str), ``cores`` (int, those this process may use), ``threads`` (int, torch's),
    ``isas`` ({name: "" if it runs here, else what is missing}, fastest first), ``isa`` (the one the operator takes).
    """
    return {
        "model": _model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isas": dict(_kernels.isas()),
        "isa": _selected(os.environ.get("KTLIB_ISA", "")),
    }


def _selected(wanted):
    try:
        return _kernels.select_isa(wanted)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"KTLIB_ISA={wanted}: {error}; unset it to get the fastest") from None


def _model():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
