"""What PyTorch gets out of a machine: best seconds of a function, arithmetic rates of matrix products."""

import time

import torch


def best_seconds(function, *, repeat=5, budget=2.0):
    """Smallest wall time of ``function()`` over ``repeat`` calls after a warm-up, fewer if ``budget`` seconds pass."""
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
    """Floating-point operations per second of a square matrix product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best_seconds(lambda: a @ b)


def matmul_rate_from_memory(tokens, features, inner, matrices=16, dtype=torch.bfloat16):
    """The same for ``tokens`` rows times each of several weights (features, inner), too many to stay in a cache."""
    x, weights = torch.randn(tokens, inner).to(dtype), torch.randn(matrices, features, inner).to(dtype)

    def multiply():
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return 2 * tokens * weights.numel() / best_seconds(multiply)


def bus_rates(size=2**28):
    """Bytes per second between pinned memory and the GPU, ``{"h2d": to it, "d2h": from it}``."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    copies = {"h2d": lambda: device.copy_(host), "d2h": lambda: host.copy_(device)}
    return {name: size / best_seconds(copy) for name, copy in copies.items()}


def memory_bytes():
    """Bytes of main memory, all of it."""
    import psutil

    return psutil.virtual_memory().total
