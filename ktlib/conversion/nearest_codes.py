"""Weights to the codes and scales of :mod:`ktlib.reference.formats`: each to its nearest code, without calibration."""

from typing import NamedTuple

import torch

from ktlib.reference.formats import CODEBOOKS, FORMATS, SCALE_DTYPES, float64, pack4

_DEFAULT_GROUP = {"e4m3": (128, 128), "int8": (1, 128), "int4": (1, 32), "nf4": (1, 64), "e2m1": (1, 32)}
_INTEGERS = {"int8": (-128, 127), "int4": (-8, 7)}  # the least and greatest code, on the signed scale
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Quantised(NamedTuple):
    """Arguments of :func:`ktlib.reference.formats.decode`, which describes them: ``zeros`` is None if symmetric."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group: tuple[int, int]


def quantise(weight, format, *, group=None, scale_dtype=None, symmetric=True):
    """The nearest codes of a weight, with a scale per group of weights, as :class:`Quantised`.

    ======  =========  ===========================================================================================
    format  group      scale, before it is rounded to ``scale_dtype``
    ======  =========  ===========================================================================================
    e4m3    (128,128)  largest magnitude / 448
    int8    (1, 128)   largest magnitude / 127
    int4    (1, 32)    the weight of largest magnitude / -8: its code is -8, whatever its sign (llama.cpp's Q4_0)
    nf4     (1, 64)    largest magnitude
    e2m1    (1, 32)    e8m0: 2**(floor(log2(largest magnitude)) - 2), the rule of Microscaling Formats (MX) 1.0, which
                       clips weights larger than 6 * scale; other dtypes: largest magnitude / 6
    ======  =========  ===========================================================================================

    The code is the nearest to ``weight / scale`` with the scale as stored, computed in fp32. Halfway between two codes
    the even one is taken, as in IEEE 754. A group of zeros has the scale 0 (e8m0: 2**-127) and decodes to 0.

    Args:
        weight: (..., rows, columns) bf16, fp16, fp32 or fp64, finite in fp32.
        format: "e4m3", "int8", "int4", "nf4" or "e2m1".
        group: (rows, columns) that share a scale; None: as in the table. Groups at the ends may be smaller.
        scale_dtype: one of ``SCALE_DTYPES``; None: bf16, and e8m0 for "e2m1". For formats other than "e2m1", e8m0
            scales are rounded up to a power of two, so that no weight is clipped.
        symmetric: False only with "int8" and "int4". The range of a group (the least weight or 0, to the greatest
            weight or 0) is then divided by 255 or 15 to give the scale, and each group has an integer zero.

    Quantising the decoded weight again gives the same codes and scales, if the weight was bf16, the quantisation
    symmetric, no scale subnormal in its dtype, and the scales not e8m0 ("e2m1" excepted).

    Raises:
        TypeError, ValueError: name the argument. Among them: a weight that is not finite, with its place, and weights
            so large that the scale or a decoded weight would be infinite.
    """
    group, scale_dtype = _checked(weight, format, group, scale_dtype, symmetric)
    rows, columns = weight.shape[-2:]
    blocks = _blocks(weight.detach().float(), group)
    low, high = blocks.amin((-3, -1)), blocks.amax((-3, -1))
    scales = _scales(low, high, format, scale_dtype, symmetric)
    stored = float64(scales).float()
    # where the scale is 0, the weights are 0 or too small for scale_dtype
    quotients = torch.where(_per_block(stored) == 0, 0.0, blocks / _per_block(stored))
    zeros = None
    if not symmetric:
        least, greatest = _INTEGERS[format]
        zeros = torch.where(stored == 0, 0.0, torch.round(least - low / stored)).clamp(least, greatest)
        quotients += _per_block(zeros)
        zeros = zeros.to(torch.int8)
    codes = _nearest_codes(quotients, format).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    codes = pack4(codes) if format in CODEBOOKS else codes.contiguous()
    return Quantised(codes, scales, zeros, group)


def default_scale_dtype(format):
    """The dtype of scales for which ``scale_dtype=None`` stands in :func:`quantise`."""
    return torch.float8_e8m0fnu if format == "e2m1" else torch.bfloat16


def relative_error(weight, decoded):
    """``|decoded - weight| / |weight|`` of two tensors of one shape, L2 norms in float64; a float."""
    if weight.shape != decoded.shape:
        raise ValueError(f"decoded: got shape {tuple(decoded.shape)}, needs that of weight, {tuple(weight.shape)}")
    weight = weight.detach().double()
    error = torch.linalg.vector_norm(decoded.detach().double() - weight)
    return 0.0 if error == 0 else (error / torch.linalg.vector_norm(weight)).item()


def _checked(weight, format, group, scale_dtype, symmetric):
    """``(group, scale_dtype)`` with their defaults, where all arguments of :func:`quantise` are right."""
    if format not in FORMATS[1:]:
        raise ValueError(f"format: got {format!r}, needs one of {', '.join(map(repr, FORMATS[1:]))}")
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, needs a tensor")
    if weight.dtype not in _WEIGHT_DTYPES:
        raise TypeError(f"weight: got {weight.dtype}, needs one of {', '.join(map(str, _WEIGHT_DTYPES))}")
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, needs (..., rows, columns)")
    group = _DEFAULT_GROUP[format] if group is None else group
    if not (isinstance(group, tuple | list) and len(group) == 2 and all(type(n) is int and n > 0 for n in group)):
        raise ValueError(f"group: got {group!r}, needs (rows, columns) of at least 1 each")
    if scale_dtype is None:
        scale_dtype = default_scale_dtype(format)
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype: got {scale_dtype!r}, needs one of {', '.join(map(str, SCALE_DTYPES))}")
    if not symmetric and format not in _INTEGERS:
        raise ValueError(f"symmetric: got {symmetric!r} for {format!r}, needs True: only int8 and int4 have zeros")
    if symmetric and format == "int4" and scale_dtype == torch.float8_e8m0fnu:
        raise ValueError(f"scale_dtype: got {scale_dtype}, needs one with a sign for symmetric int4")
    finite = weight.isfinite() if weight.dtype != torch.float64 else weight.float().isfinite()
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        count = int((~finite).sum())
        raise ValueError(
            f"weight: got {weight[place].item()} at {place}, needs values finite in fp32; {count} values are not"
        )
    return tuple(group), scale_dtype


def _blocks(weight, group):
    """(..., rows, columns) to (..., row groups, group rows, column groups, group columns), padded with zeros."""
    rows, columns = weight.shape[-2:]
    high, wide = min(group[0], rows or 1), min(group[1], columns or 1)  # a group larger than the weight is not padded
    weight = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    return weight.unflatten(-1, (-(-columns // wide), wide)).unflatten(-3, (-(-rows // high), high))


def _per_block(groups):
    """A value per group (..., row groups, column groups), to be broadcast over :func:`_blocks`."""
    return groups[..., :, None, :, None]


def _scales(low, high, format, scale_dtype, symmetric):
    """The scales in ``scale_dtype`` of groups whose least and greatest weights are ``low`` and ``high``."""
    magnitude = torch.maximum(high, -low)
    powers_of_two = scale_dtype == torch.float8_e8m0fnu
    if not symmetric:
        least, greatest = _INTEGERS[format]
        largest = greatest - least
        wanted = high.clamp(min=0) / largest - low.clamp(max=0) / largest
    elif format == "int4":
        largest = 8
        wanted = torch.where(high >= -low, high, low) / -largest + 0.0  # of zeros: 0.0, not -0.0
    else:
        largest = {"e4m3": 448, "int8": 127, "nf4": 1, "e2m1": 6}[format]
        wanted = magnitude / (4 if format == "e2m1" and powers_of_two else largest)
    scales = _power_of_two_scales(wanted, up=format != "e2m1") if powers_of_two else wanted.to(scale_dtype)
    if not (float64(scales).abs() * largest <= torch.finfo(torch.bfloat16).max).all():
        raise ValueError(
            f"weight: got a magnitude of {magnitude.max().item():.4g}, needs less: {format} with {scale_dtype} scales "
            "would be infinite"
        )
    return scales


def _power_of_two_scales(wanted, up):
    """e8m0 scales: ``wanted``, non-negative fp32, rounded up or down to a power of two; NaN above 2**127."""
    mantissa, exponent = torch.frexp(wanted)  # mantissa from 0.5 to below 1, and 0 of 0
    power = torch.where(mantissa == 0.5, exponent - 1, exponent) if up else exponent - 1
    byte = torch.where(wanted == 0, 0, power + 127).clamp(0, 255)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def _nearest_codes(quotients, format):
    """The codes of the values nearest to ``quotients``: int8, float8_e4m3fn, or uint8 not yet packed."""
    if format == "int8":
        return quotients.round().clamp(-128, 127).to(torch.int8)
    if format == "int4":
        return (quotients.round().clamp(-8, 7) + 8).to(torch.uint8)
    if format == "nf4":
        return _nearest(quotients, torch.tensor(CODEBOOKS["nf4"]))
    if format == "e2m1":
        magnitudes, sign = torch.tensor(CODEBOOKS["e2m1"][:8]), 8
    else:
        magnitudes, sign = float64(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)).float(), 128
    codes = _nearest(quotients.abs(), magnitudes) | torch.where(quotients.signbit(), sign, 0).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn) if format == "e4m3" else codes


def _nearest(numbers, values):
    """The index (uint8) of the nearest of ascending ``values``; halfway between two values, the even index."""
    middles = (values[1:] + values[:-1]) / 2
    # bucketize gives the lower index to a number that is equal to a middle. Where the upper index is the even one, the
    # boundary is therefore moved to the next fp32 number below the middle.
    middles[1::2] = middles[1::2].nextafter(torch.tensor(-torch.inf))
    return torch.bucketize(numbers, middles.to(numbers.device), out_int32=True).to(torch.uint8)
