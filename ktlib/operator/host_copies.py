"""Differentiable copies of one call's tensors between another device and the CPU.

Copies from and to CUDA use pinned memory of torch's caching host allocator, which later calls reuse. Copies to the host
are all queued on the current stream before the host waits for that stream; the device is never synchronised as a whole.
Copies back to the device do not block the host: the operator (moe_experts.py) pins its results if its input is pinned.
"""

import torch
from torch.autograd.function import once_differentiable

from ktlib.operator.gpu.transfer import download


def to_host(*tensors):
    """CPU copies of the tensors; None and tensors on the CPU are returned unchanged. Differentiable.

    Copies of CUDA tensors are pinned, and complete on return. Gradients are copied to the device of each tensor.
    """
    remote = [i for i, t in enumerate(tensors) if t is not None and t.device.type != "cpu"]
    result = list(tensors)
    if any(tensors[i].is_cuda for i in remote):
        copies = _ToHost.apply(*(tensors[i] for i in remote))
    else:
        copies = [tensors[i].to("cpu") for i in remote]
    for i, copy in zip(remote, copies, strict=True):
        result[i] = copy
    return result


def to_device(tensor, device):
    """A copy of the CPU tensor on ``device``, or ``tensor`` itself if ``device`` is the CPU. Differentiable.

    The copy of a pinned tensor to CUDA is queued on the current stream, and the host does not wait for it. The gradient
    is copied to pinned memory, and the copy is complete before autograd passes it on.
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
        # By default torch makes every floating-point output differentiable as soon as one input requires a gradient.
        ctx.mark_non_differentiable(*(c for c, needed in zip(copies, ctx.needs_input_grad, strict=True) if not needed))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # Autograd assigns no stream to this node, since its incoming gradients are on the CPU. So the copies are queued
        # on forward's stream, and the default stream, on which autograd takes such results over, waits for them.
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
        return None, _download([grad])[0]  # on forward's stream, which autograd has made current


def _download(tensors):
    """Complete CPU copies of the tensors, pinned for those on CUDA."""
    copies = [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda) for t in tensors]
    download(list(zip(tensors, copies, strict=True)))
    return copies
