"""Rates that PyTorch reaches on this machine: matrix products, and copies between host and GPU."""

import time

import torch


def best_seconds(function, *, repeat=5, budget=2.0):
    """Smallest wall time of ``function()`` over ``repeat`` calls after a warm-up, fewer after ``budget`` seconds."""
    begin = time.perf_counter()
    function()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begin > budget:
            break
    return best


def matmul_rate(size=2048, dtype=torch.bfloat16):
    """FLOP/s of the product of two square matrices ``(size, size)``."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best_seconds(lambda: a @ b)


def matmul_rate_from_memory(tokens, features, inner, matrices=16, dtype=torch.bfloat16):
    """FLOP/s of ``(tokens, inner)`` times each of ``matrices`` weights ``(features, inner)``, too many for a cache."""
    x, weights = torch.randn(tokens, inner).to(dtype), torch.randn(matrices, features, inner).to(dtype)

    def multiply():
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return 2 * tokens * weights.numel() / best_seconds(multiply)


def bus_rates(size=2**28):
    """Bytes per second between pinned host memory and the GPU: ``{"h2d": host to GPU, "d2h": GPU to host}``."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    copies = {"h2d": lambda: device.copy_(host), "d2h": lambda: host.copy_(device)}
    return {name: size / best_seconds(copy) for name, copy in copies.items()}


def memory_bytes():
    """Size of the main memory in bytes, used or not."""
    import psutil

    return psutil.virtual_memory().total
