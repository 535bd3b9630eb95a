"""Expert weights over the NUMA nodes of a machine with several sockets.

Each weight matrix is cut into as many runs of consecutive rows as there are parts, part p of all experts lies on one
node, and in the forward pass threads take the rows of their own node first (csrc/layer/routing.h). Nothing is summed
over parts, so no result depends on their number. The backward pass contracts over rows: it reads all nodes alike.
"""

import re
from pathlib import Path

from ktlib import _kernels
from ktlib.integrations.transformers_experts import WEIGHT_NAMES, is_experts, layout
from ktlib.operator.checks import check_parts

WITH_MEMORY = Path("/sys/devices/system/node/has_memory")
STATUS = Path("/proc/self/status")


def numa_nodes():
    """Numbers of the NUMA nodes that have memory for this process, ``[0]`` where the machine has none to speak of."""
    if not WITH_MEMORY.is_file():
        return [0]
    nodes = _numbers(WITH_MEMORY.read_text())
    allowed = re.search(r"^Mems_allowed_list:(.*)$", STATUS.read_text(), re.MULTILINE)  # a container may have fewer
    return sorted(nodes & _numbers(allowed[1]) if allowed else nodes)


def _numbers(ranges):
    """``"0,2-4"``, as the kernel writes a set of numbers."""
    parts = [part.partition("-") for part in ranges.strip().split(",")]
    return {number for first, _, last in parts for number in range(int(first), int(last or first) + 1)}


def row_slices(size, parts):
    """``parts`` slices of ``range(size)``, as csrc/layer/forward_in_place.cpp assigns rows to parts."""
    edges = [-(-part * size // parts) for part in range(parts + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def place_experts(model, parts=None):
    """Spread the routed experts' weights over NUMA nodes, and let the operator know. Returns ``model``.

    Moves pages, copies nothing. Call it when the weights are loaded; with a memory-mapped checkpoint the pages of the
    file move. ``parts`` (default: the number of nodes) need not be that number; 1 undoes the preference of threads.

    Raises:
        TypeError, ValueError: parts is not an int from 1 to 1024; the model has no routed experts, or has transposed
            ones (their rows are not features of one part), or some that are not on the CPU.
        RuntimeError: the operating system does not let this process place memory.
    """
    nodes = numa_nodes()
    parts = len(nodes) if parts is None else parts
    check_parts(parts)
    modules = [module for module in model.modules() if is_experts(module)]
    if not modules:
        raise ValueError(f"model: {type(model).__name__} has no submodule with routed experts")
    if any(layout(module)["transposed"] for module in modules):
        raise ValueError("model: its expert weights are transposed; needs rows that run along the inputs")
    for name, weight in ((name, getattr(module, name)) for module in modules for name in WEIGHT_NAMES):
        if weight.device.type != "cpu":
            raise ValueError(f"model: its experts' {name} is on {weight.device}, needs expert weights on the CPU")
    for module in modules:
        gate_up = module.gate_up_proj
        # the gate and the up rows of a feature lie in the same part; interleaved ones do so by themselves
        halves = [gate_up] if layout(module)["interleaved"] else gate_up.chunk(2, dim=1)
        for rows in (*halves, module.down_proj):
            for expert in rows.detach():
                for part, piece in enumerate(row_slices(len(expert), parts)):
                    where = expert[piece]
                    _kernels.place_pages(where.data_ptr(), where.nbytes, nodes[part % len(nodes)])
        module.ktlib_parts = parts
    return model
