"""Facts about the CPU, and which of the operator's instruction sets run on it."""

import os
import platform

import torch

from ktlib import _kernels


def cpu_info():
    """Facts about this CPU as a dict.

    - ``model`` (str): the processor's name
    - ``cores`` (int): how many cores this process may use
    - ``threads`` (int): torch's number of threads
    - ``isas`` (dict): ``{instruction set: what the CPU lacks for it}``, fastest first; "" means that it runs here
    - ``isa`` (str): the instruction set that the operator uses

    Raises:
        ValueError: the environment variable ``KTLIB_ISA`` names an instruction set that is unknown or cannot run here.
    """
    return {
        "model": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isas": dict(_kernels.isas()),
        "isa": _selected_isa(os.environ.get("KTLIB_ISA", "")),
    }


def _selected_isa(requested):
    try:
        return _kernels.select_isa(requested)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"KTLIB_ISA={requested}: {error}; unset it to get the fastest") from None


def _processor_name():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
