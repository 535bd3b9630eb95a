"""What a quantised weight is: ``bf16(scale * (value(code) - zero))``, in plain torch.

The product of fp32 numbers is rounded once to fp32 and then to bf16, both times to the nearest number and, halfway
between two, to the one with an even last bit. Subnormal scales and results are kept, a NaN stays a NaN (its sign and
payload are not defined). The kernels' decoders must give the same bits.

Products are exact in float64, and conversions between formats are made of integers. Hence results do not depend on
``torch.set_flush_denormal`` or on how a processor treats subnormal numbers.
"""

import torch

FORMATS = ("bf16", "e4m3", "int8", "int4", "nf4", "e2m1")  # in the order of the C++ enum Format
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)  # of the C++ enum ScaleType

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # Open Compute Project, Microscaling Formats (MX) 1.0
# The 16 values of each 4-bit format, in the order of their codes
CODEBOOKS = {
    "int4": tuple(float(value) for value in range(-8, 8)),  # offset binary, as compressed-tensors and Q4_0 store it
    # Dettmers et al., QLoRA (arXiv:2305.14314): quantiles of the normal distribution, fp32 numbers
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "e2m1": (*_E2M1, *(-value for value in _E2M1)),  # code 8 is -0.0
}  # fmt: skip

# Floating-point formats of sign, exponent and mantissa: (exponent bits, mantissa bits, integer of the same size)
_FIELDS = {
    torch.float32: (8, 23, torch.int32),
    torch.bfloat16: (8, 7, torch.int16),
    torch.float16: (5, 10, torch.int16),
    torch.float8_e4m3fn: (4, 3, torch.uint8),
}


def decode(format, codes, scales, zeros=None, *, columns, group):
    """The weights of these codes: bf16 (..., rows, columns).

    Args:
        format: one of :data:`FORMATS`. "bf16" has no codes: ``codes`` are the weights and are returned as they are.
        codes: "e4m3": (..., rows, columns) float8_e4m3fn, or its bits as uint8. "int8": (..., rows, columns) int8.
            4-bit formats: (..., rows, ceil(columns / 2)) uint8, the even column in the low half of a byte; a code is
            the index of its value in :data:`CODEBOOKS`.
        scales: (..., ceil(rows / group_rows), ceil(columns / group_columns)), one of :data:`SCALE_DTYPES`.
        zeros: None, or int8 of the shape of ``scales``: what is subtracted from the values of "int8" or "int4".
        columns: of the weights.
        group: (group_rows, group_columns), the block of weights that share a scale. Blocks at the end may be smaller.
    """
    if format == "bf16":
        return codes
    if format == "e4m3":
        values = float64(codes.view(torch.float8_e4m3fn))
    elif format == "int8":
        values = codes.double()
    else:
        codebook = torch.tensor(CODEBOOKS[format], dtype=torch.float32, device=codes.device).double()
        values = codebook[unpack4(codes, columns).long()]
    rows = values.shape[-2]
    if zeros is not None:
        values = values - _spread(zeros, rows, columns, group).double()
    return _bf16_of_fp32(_fp32_bits(values * _spread(float64(scales), rows, columns, group)))


def unpack4(codes, columns):
    """4-bit codes one by one: uint8 (..., columns) of 0 to 15, from uint8 (..., ceil(columns / 2)) of two each."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :columns]


def pack4(values):
    """The opposite of :func:`unpack4`: integers (..., columns) of 0 to 15 to uint8 (..., ceil(columns / 2)).

    With an odd number of columns the high half of the last byte is 0.
    """
    values = torch.nn.functional.pad(values.to(torch.uint8), (0, values.shape[-1] % 2))
    return values[..., ::2] | values[..., 1::2] << 4


def float64(values):
    """The same numbers in float64, exactly: of one of :data:`SCALE_DTYPES` or of float8_e4m3fn.

    IEEE 754 for fp32, fp16 and bf16; Microscaling Formats 1.0 for e4m3 (no infinity, NaN
    where all bits but the sign are ones) and e8m0 (2**(byte - 127), 255 is NaN).
    """
    if values.dtype == torch.float8_e8m0fnu:
        byte = values.view(torch.uint8).long()
        return torch.where(byte == 255, torch.nan, _power_of_two(byte - 127))
    exponent_bits, mantissa_bits, integer = _FIELDS[values.dtype]
    bits = values.view(integer).long()
    mantissa = bits & ((1 << mantissa_bits) - 1)
    top = (1 << exponent_bits) - 1
    exponent = (bits >> mantissa_bits) & top
    significand = torch.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits)).double()
    magnitude = significand * _power_of_two(exponent.clamp(min=1) - top // 2 - mantissa_bits)
    if values.dtype == torch.float8_e4m3fn:
        magnitude = torch.where((exponent == top) & (mantissa == 7), torch.nan, magnitude)
    else:
        magnitude = torch.where(exponent == top, torch.where(mantissa == 0, torch.inf, torch.nan), magnitude)
    negative = (bits >> (exponent_bits + mantissa_bits)) & 1 == 1
    return torch.where(negative, -magnitude, magnitude)


def _spread(groups, rows, columns, group):
    """One value per group (..., row groups, column groups) to one per weight (..., rows, columns)."""
    row, column = (torch.arange(count, device=groups.device) for count in (rows, columns))
    return groups[..., row[:, None] // group[0], column // group[1]]


def _power_of_two(exponent):
    """``2.0**exponent`` in float64 of int64 exponents from -1022 to 1023: 0 is stored as 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _fp32_bits(values):
    """The bits of float64 values rounded to fp32, as int64: 1 sign, 8 exponent, 23 mantissa; ties to even."""
    magnitude = values.abs().clamp(max=2.0**128)  # where fp32 is infinite
    exponent = ((magnitude.view(torch.int64) >> 52) - 1023).clamp(min=-126)  # below that the steps stay as large
    significand = torch.round(magnitude / _power_of_two(exponent - 23)).long()
    # A normal number's significand has a bit more than is stored, worth 1 of the exponent: hence 126, not fp32's bias
    # of 127. A significand that was rounded up to 2**24 is carried into the exponent, up to infinity.
    bits = ((exponent + 126) << 23) + significand
    return torch.where(values.isnan(), 0x7FC00000, bits) | (values.signbit().long() << 31)


def _bf16_of_fp32(bits):
    """bf16 values of fp32 bits: their upper half, rounded to nearest, ties to even (PyTorch, c10/util/BFloat16.h)."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.to(torch.uint16).view(torch.bfloat16)
