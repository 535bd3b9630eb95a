"""Expert weights over the NUMA nodes of a machine with several sockets.

Each weight matrix is cut into as many runs of consecutive rows as there are parts, part p of all experts lies on one
node, and in the forward pass threads take the rows of their own node first (csrc/parallel.h). Nothing is summed over
parts, so no result depends on their number. The backward pass contracts over rows: it reads all nodes alike.
"""

from pathlib import Path

from ktlib import _kernels
from ktlib.checks import check_parts
from ktlib.experts import is_experts, layout

ONLINE = Path("/sys/devices/system/node/online")


def numa_nodes():
    """Numbers of this machine's NUMA nodes, ``[0]`` where it has none to speak of."""
    if not ONLINE.is_file():
        return [0]
    ranges = [part.partition("-") for part in ONLINE.read_text().strip().split(",")]
    return [node for first, _, last in ranges for node in range(int(first), int(last or first) + 1)]


def row_slices(size, parts):
    """``parts`` slices of ``range(size)``, as csrc/forward.cpp assigns rows to parts."""
    edges = [-(-part * size // parts) for part in range(parts + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def place_experts(model, parts=None):
    """Spread the routed experts' weights over NUMA nodes, and let the operator know. Returns ``model``.

    Moves pages, copies nothing. Call it when the weights are loaded; with a memory-mapped checkpoint the pages of the
    file move. ``parts`` (default: the number of nodes) need not be that number; 1 undoes the preference of threads.

    Raises:
        TypeError, ValueError: parts is not an int from 1 to 1024; the model has no routed experts, or has transposed
            ones (their rows are not features of one part).
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
