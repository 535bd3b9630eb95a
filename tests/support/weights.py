"""Random expert weights in every format that a ktlib.Weight may have."""

import torch
from support import extension

from ktlib.operator.weight import Weight
from ktlib.reference import formats


def random_weight(format, shape, group=(1, 32), zeros=False, seed=0, scale_dtype=torch.bfloat16, tensors=1):
    """Random codes, none of them NaN, and scales that make weights of ordinary size; cut into so many tensors."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape
    if format == "bf16":
        stack = torch.randn(shape, generator=generator).div(columns**0.5).bfloat16()
        return Weight("bf16", _cut(stack, tensors), shape=shape)
    width = -(-columns // 2) if format in formats.CODEBOOKS else columns
    codes = torch.randint(0, 256, (experts, rows, width), generator=generator, dtype=torch.uint8)
    if format == "e4m3":
        codes[codes & 0x7F == 0x7F] = 0x21
    largest = {"int8": 128.0, "e4m3": 448.0}.get(format) or max(map(abs, formats.CODEBOOKS[format]))
    matrix_rows = min(rows, experts * rows // tensors)
    groups = (experts * rows // matrix_rows, -(-matrix_rows // group[0]), -(-columns // group[1]))
    if scale_dtype == torch.float8_e8m0fnu:
        scales = torch.randint(114, 120, groups, generator=generator, dtype=torch.uint8).view(scale_dtype)
    else:
        scales = (torch.rand(groups, generator=generator) * 2 / largest / columns**0.5).to(scale_dtype)
    zeros = torch.randint(-4, 5, groups, generator=generator, dtype=torch.int8) if zeros else None
    return Weight(
        format,
        _cut(codes.view(torch.int8) if format == "int8" else codes, tensors),
        _cut(scales, tensors),
        None if zeros is None else _cut(zeros, tensors),
        group=group,
        shape=shape,
    )


def _cut(stack, count):
    """``count`` tensors, each at an odd address; if that is 1, the stack, between forbidden pages if there are any."""
    if count == 1:
        return extension.guarded(stack.shape, stack.dtype).copy_(stack) if extension.PAGES else stack
    pieces = []
    for piece in stack.view(torch.uint8).reshape(count, -1, stack.view(torch.uint8).shape[-1]):
        memory = torch.zeros(piece.numel() + stack.itemsize, dtype=torch.uint8)[stack.itemsize :]
        pieces.append(memory.view(piece.shape).copy_(piece).view(stack.dtype))
    return pieces


def drawn_weight(choose, shape):
    """A weight of the shape; ``choose`` is a source of choices as of support.fuzz."""
    experts, rows, _ = shape
    format = choose.pick(formats.FORMATS)
    counts = [1, experts, *([2 * experts] if rows % 2 == 0 else [])]
    return random_weight(
        format,
        shape,
        group=(choose.integer(1, rows + 1), 2 * choose.integer(1, 20)),
        zeros=format in ("int8", "int4") and choose.chance(30),
        seed=choose.integer(0, 2**31),
        scale_dtype=choose.pick(formats.SCALE_DTYPES),
        tensors=choose.pick(counts),
    )
