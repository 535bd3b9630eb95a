"""Tensors of one call of the operator between another device and the CPU, differentiably.

On CUDA the copies go through pinned memory of torch's caching host allocator (buffers of the size of this batch, reused
by later calls): all copies of one direction are queued on the current stream, then the host waits for that stream.
There is no device-wide synchronisation, and copies back to the device do not block the host at all: the operator
(moe_experts.py) makes its results in pinned memory where its input is.
"""

import torch
from torch.autograd.function import once_differentiable

from ktlib.operator.gpu.transfer import download


def to_host(*tensors):
    """CPU copies of the tensors; None and tensors on the CPU come back as they are. Differentiable.

    Copies of CUDA tensors lie in pinned memory and are complete on return. Gradients go back to where each tensor was.
    """
    away = [i for i, t in enumerate(tensors) if t is not None and t.device.type != "cpu"]
    result = list(tensors)
    if any(tensors[i].is_cuda for i in away):
        copies = _ToHost.apply(*(tensors[i] for i in away))
    else:
        copies = [tensors[i].to("cpu") for i in away]
    for i, copy in zip(away, copies, strict=True):
        result[i] = copy
    return result


def to_device(tensor, device):
    """The CPU tensor on ``device``; ``tensor`` itself if that is the CPU. Differentiable.

    On CUDA the copy is only queued, on the current stream, if the tensor is pinned; its gradient is copied to pinned
    memory and is complete when the backward of what made ``tensor`` runs.
    """
    if device.type == "cpu":
        return tensor
    return _ToDevice.apply(device, tensor) if device.type == "cuda" else tensor.to(device)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        ctx.streams = [torch.cuda.current_stream(t.device) if t.is_cuda else None for t in tensors]
        ctx.devices = [t.device for t in tensors]
        copies = _download(tensors)
        # else torch takes all of floating point for differentiable as soon as one is
        ctx.mark_non_differentiable(*(c for c, needed in zip(copies, ctx.needs_input_grad, strict=True) if not needed))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # The engine knows no stream for this node, since what comes in is on the CPU. So the copies are queued on
        # forward's stream, and the default stream, with which the engine aligns such results, waits for them.
        results = []
        for grad, device, stream in zip(grads, ctx.devices, ctx.streams, strict=True):
            if grad is None or stream is None:
                results.append(None if grad is None else grad.to(device))
                continue
            with torch.cuda.stream(stream):
                results.append(grad.to(device, non_blocking=True))
        for device, stream in {(d, s) for d, s in zip(ctx.devices, ctx.streams, strict=True) if s is not None}:
            for other in (torch.cuda.default_stream(device), torch.cuda.current_stream(device)):
                if other != stream:
                    other.wait_stream(stream)
        return tuple(results)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device, tensor):
        return tensor.to(device, non_blocking=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, _download([grad])[0]  # on forward's stream, which the engine has made current


def _download(tensors):
    """CPU copies, pinned where they come from CUDA, when they are complete."""
    copies = [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda) for t in tensors]
    download(list(zip(tensors, copies, strict=True)))
    return copies
