"""Spreads expert weights over the NUMA nodes of a machine with several sockets.

The rows of each weight matrix are divided into ``parts`` blocks of consecutive rows. Row block p of every expert is
placed on the same node, and in the forward pass a thread takes the row blocks of its own node first
(csrc/layer/routing.h). No sum runs over row blocks, so that results do not depend on their number. The backward pass
sums over rows, so that each of its threads reads from all nodes.
"""

import re
from pathlib import Path

from ktlib import _kernels
from ktlib.integrations.stored_weight import matrices_of
from ktlib.integrations.transformers_experts import WEIGHT_NAMES, is_experts, layout
from ktlib.operator.checks import check_parts

NODES_WITH_MEMORY = Path("/sys/devices/system/node/has_memory")
PROCESS_STATUS = Path("/proc/self/status")


def numa_nodes():
    """Numbers of the NUMA nodes whose memory this process may use; ``[0]`` if the system does not list nodes."""
    if not NODES_WITH_MEMORY.is_file():
        return [0]
    nodes = _parse_numbers(NODES_WITH_MEMORY.read_text())
    # A container may be allowed fewer nodes than the machine has.
    allowed = re.search(r"^Mems_allowed_list:(.*)$", PROCESS_STATUS.read_text(), re.MULTILINE)
    return sorted(nodes & _parse_numbers(allowed[1]) if allowed else nodes)


def _parse_numbers(text):
    """The set of numbers that the kernel writes as, for example, ``"0,2-4"``."""
    ranges = [numbers.partition("-") for numbers in text.strip().split(",")]
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


def row_blocks(size, parts):
    """``range(size)`` divided into ``parts`` slices, as csrc/layer/forward_in_place.cpp divides the rows."""
    edges = [-(-part * size // parts) for part in range(parts + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def place_experts(model, parts=None):
    """Spread the routed experts' weights over NUMA nodes, and tell the operator. Returns ``model``.

    Pages of memory move to other nodes; nothing is copied. Call it after the weights are loaded. If the weights are a
    memory-mapped checkpoint, fused or with one tensor per expert, the pages of the file move.

    Args:
        parts: into how many row blocks each weight matrix is divided (default: the number of nodes). Block p lies on
            node ``p % number of nodes``. With 1, threads no longer prefer any rows.

    Raises:
        TypeError, ValueError: parts is not an int from 1 to 1024; the model has no routed experts; its expert weights
            are transposed (a row of them holds a value of every feature) or not on the CPU.
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
        # Gates and ups are divided apart, so that the gate row and the up row of a feature lie on the same node.
        # Interleaved, the two rows are neighbours anyway.
        halves = 1 if layout(module)["interleaved"] else 2
        for matrix in (*matrices_of(module.gate_up_proj, halves), *matrices_of(module.down_proj, 1)):
            for number, rows in enumerate(row_blocks(len(matrix), parts)):
                block = matrix[rows]
                _kernels.place_pages(block.data_ptr(), block.nbytes, nodes[number % len(nodes)])
        module.ktlib_parts = parts
    return model
