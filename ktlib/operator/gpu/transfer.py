"""Copies of tensors to a GPU and back, through pinned memory of torch's caching host allocator."""

import torch

from ktlib import _kernels
from ktlib.system.threads import operator_threads


def sending_and_other_threads():
    """How many of the operator's threads copy weights (weight_source.py), and how many copy other tensors."""
    threads = operator_threads()
    sending = max(1, threads * 3 // 4)
    return sending, max(1, threads - sending)


def upload(tensor, device):
    """A copy of the contiguous CPU tensor on the device, queued on the current stream."""
    if device.type == "cpu" or tensor.is_pinned():
        return tensor.to(device, non_blocking=True)
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    _kernels.copy(sending_and_other_threads()[1], [[(staged.data_ptr(), tensor.data_ptr(), tensor.nbytes)]])
    return staged.to(device, non_blocking=True)


def download(pairs):
    """Copy each source of ``[(source on a device, contiguous CPU tensor), ...]`` to the CPU tensor, in its dtype.

    All copies from a GPU are queued on its current stream before the host waits for that stream.
    """
    staged, devices = [], {source.device for source, _ in pairs if source.is_cuda}
    for source, result in pairs:
        if not source.is_cuda:
            result.copy_(source)
            continue
        buffer = result
        if not result.is_pinned():
            buffer = torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True)
            staged.append((result, buffer))
        buffer.copy_(source.to(result.dtype), non_blocking=True)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    if staged:
        _kernels.copy(operator_threads(), [[(r.data_ptr(), buffer.data_ptr(), r.nbytes) for r, buffer in staged]])
