"""The definition of quantised weights: values of codes and scales by formula, rounding, packing, groups."""

import math
import struct

import pytest
import torch

from ktlib.reference.formats import CODEBOOKS, FORMATS, SCALE_DTYPES, decode, float64, pack4, unpack4

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def bits(values):
    return values.view(torch.int16)


def floats(dtype, *integers):
    """Values of a 16-bit or fp32 dtype from their bits."""
    return torch.tensor(integers, dtype=torch.int64).to(getattr(torch, f"uint{dtype.itemsize * 8}")).view(dtype)


def weight(format, code, scale, zero=None, scale_dtype=torch.float32):
    """One weight: of a code, a scale and a zero that are numbers."""
    codes = torch.tensor([[code]], dtype=torch.int8 if format == "int8" else torch.uint8)
    scales = scale if isinstance(scale, torch.Tensor) else torch.tensor(scale, dtype=scale_dtype)
    zeros = None if zero is None else torch.tensor([[zero]], dtype=torch.int8)
    decoded = decode(format, codes, scales.reshape(1, 1), zeros, columns=1, group=(1, 1))
    assert decoded.dtype == torch.bfloat16 and decoded.shape == (1, 1)
    return decoded[0, 0]


def e4m3(byte):
    """The value of an e4m3 code, read from the digits of its byte: sign, exponent with bias 7, mantissa."""
    sign, exponent, mantissa = f"{byte:08b}"[0], f"{byte:08b}"[1:5], f"{byte:08b}"[5:]
    if exponent == "1111" and mantissa == "111":
        return math.nan
    lead = 0 if exponent == "0000" else 1
    value = 2.0 ** (max(int(exponent, 2), 1) - 7) * (lead + int(mantissa, 2) / 8)
    return -value if sign == "1" else value


def same(values, expected):
    """Equal numbers of equal sign, NaN where NaN is expected."""
    numbers = ~expected.isnan()
    return (
        torch.equal(values.isnan(), expected.isnan())
        and torch.equal(values[numbers], expected[numbers])
        and torch.equal(values.signbit()[numbers], expected.signbit()[numbers])
    )


# -------------------------------------------------------------------------------------------------- codes and scales


def test_the_formats_and_scale_types_have_the_numbers_that_the_kernels_know():
    assert FORMATS == ("bf16", "e4m3", "int8", "int4", "nf4", "e2m1")
    assert SCALE_DTYPES == (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def test_every_e4m3_code_is_its_formula_and_what_torch_says():
    codes = ALL_BYTES.view(torch.float8_e4m3fn)
    expected = torch.tensor([e4m3(byte) for byte in range(256)], dtype=torch.float64)
    assert (expected.abs().nan_to_num(0).max(), int(expected.isnan().sum())) == (448, 2)
    assert same(float64(codes), expected)
    assert same(codes.double(), expected)  # the second witness
    for given in (codes, ALL_BYTES):
        decoded = decode("e4m3", given[None], torch.ones(1, 1), columns=256, group=(1, 256))
        assert same(decoded[0].double(), expected)


def test_every_e8m0_scale_is_its_power_of_two_and_255_is_nan():
    scales = ALL_BYTES.view(torch.float8_e8m0fnu)
    expected = torch.tensor([*(2.0 ** (byte - 127) for byte in range(255)), math.nan], dtype=torch.float64)
    assert same(float64(scales), expected)
    decoded = decode("int8", torch.ones(1, 256, dtype=torch.int8), scales[None], columns=256, group=(1, 1))
    assert same(decoded[0].double(), expected)  # 2.0**-127, a subnormal bf16, among them


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_scale_is_read_exactly(dtype):
    scales = floats(dtype, *range(2**16))
    assert same(float64(scales), scales.double())


def test_fp32_scales_are_read_exactly_also_subnormal_and_infinite_ones():
    drawn = torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    special = (0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000)
    scales = floats(torch.float32, *special, *(value | 1 << 31 for value in special), *drawn)
    assert same(float64(scales), scales.double())


NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
TABLES = {
    "int4": [float(code - 8) for code in range(16)],
    "nf4": [float(value) for value in NF4.split()],
    "e2m1": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
}


@pytest.mark.parametrize("format", TABLES)
def test_all_16_values_of_a_codebook(format):
    expected = torch.tensor(TABLES[format], dtype=torch.float64)
    assert same(torch.tensor(CODEBOOKS[format], dtype=torch.float64), expected)
    assert torch.equal(expected.float().double(), expected)  # fp32 numbers: the kernels' tables hold the same
    for scale in (1.0, -0.75, 1.1):
        decoded = decode(format, pack4(torch.arange(16))[None], torch.tensor([[scale]]), columns=16, group=(1, 16))
        product = torch.tensor(scale, dtype=torch.float32) * expected.float()
        assert same(decoded[0], product.bfloat16())


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """The construction of the QLoRA paper; bitsandbytes computed its table with offset 0.9677083."""
    positive = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((positive, negative, torch.zeros(1, dtype=torch.float64))).sort().values
    expected = torch.tensor(CODEBOOKS["nf4"], dtype=torch.float64)
    torch.testing.assert_close(values / positive.max(), expected, atol=1e-6, rtol=0)


def test_weights_in_bf16_are_their_own_codes():
    values = floats(torch.bfloat16, *range(2**16))[None]
    assert torch.equal(bits(decode("bf16", values, None, columns=2**16, group=(1, 1))), bits(values))


# ---------------------------------------------------------------------------------------------------------- rounding


def test_a_product_between_two_bf16_goes_to_the_nearest_and_halfway_to_the_even_one():
    one = 0x3F80  # bf16 numbers from 1 to 2 are 2**-7 apart
    for step, expected in ((0, one), (0.5, one), (1, one + 1), (1.5, one + 2), (2.5, one + 2), (3.5, one + 4)):
        assert bits(weight("int8", 1, 1 + step * 2.0**-7)) == expected
    for excess, expected in ((-(2.0**-23), one), (2.0**-23, one + 1)):
        assert bits(weight("int8", 1, 1 + 0.5 * 2.0**-7 + excess)) == expected
    assert bits(weight("int8", -1, 1 + 1.5 * 2.0**-7)) == bits(torch.tensor(-1.015625, dtype=torch.bfloat16))


def test_a_product_is_rounded_to_fp32_first():
    # Halfway between the bf16 numbers 132 and 133, and 2**-18 more, which fp32 cannot hold at this size: halfway
    # goes to the even one. A single rounding would go up.
    product = 132.5 + 2.0**-18
    scale = product / 3
    assert struct.unpack("f", struct.pack("f", scale))[0] == scale
    assert weight("int8", 3, scale) == 132


def test_results_are_those_of_fp32_arithmetic_for_any_scale_and_code():
    generator = torch.Generator().manual_seed(1)
    scales = torch.randint(-(2**31), 2**31, (400, 250), generator=generator).to(torch.int32).view(torch.float32)
    codes = torch.randint(-128, 128, (400, 250), generator=generator).to(torch.int8)
    zeros = torch.randint(-128, 128, (400, 250), generator=generator).to(torch.int8)
    decoded = decode("int8", codes, scales, zeros, columns=250, group=(1, 1))
    assert same(decoded, (scales * (codes.float() - zeros.float())).bfloat16())


def test_subnormal_scales_and_results_are_kept_also_where_torch_flushes_them():
    def scale(value, dtype=torch.float32):
        return torch.tensor(value, dtype=torch.float64).to(dtype)

    smallest = 2.0**-133  # of bf16
    e8m0 = ALL_BYTES[:1].view(torch.float8_e8m0fnu)
    cases = [
        ("int8", 1, scale(2.0**-149), 0.0),
        ("int8", 127, scale(2.0**-140), smallest),
        ("int8", 3, scale(smallest / 2), 2 * smallest),  # 1.5 is halfway between 1 and 2
        ("int8", 5, scale(smallest / 2), 2 * smallest),  # 2.5 is halfway between 2 and 3
        ("int8", -3, scale(smallest, torch.bfloat16), -3 * smallest),
        ("e2m1", 1, e8m0, 2.0**-128),
        ("int8", 127, e8m0, 127 * 2.0**-127),  # a normal number again
        ("e4m3", 1, scale(2.0**-124), smallest),
        ("int8", 64, scale(2.0**-24, torch.float16), 2.0**-18),
    ]
    expected = [struct.unpack(">h", struct.pack(">f", value)[:2])[0] for *_, value in cases]
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            results = [bits(weight(*case)).item() for *case, _ in cases]
        finally:
            torch.set_flush_denormal(False)
        assert results == expected, f"flush {flush}"


def test_results_beyond_bf16_are_infinite():
    largest = floats(torch.bfloat16, 0x7F7F).double()
    assert weight("int8", 2, 2.0**127) == torch.inf and weight("int8", -2, 2.0**127) == -torch.inf
    assert weight("int8", 1, 2.0**128 - 2.0**119) == torch.inf  # finite in fp32, halfway between largest and 2**128
    assert weight("int8", 1, 2.0**128 - 2.0**119 - 2.0**104).double() == largest
    assert weight("int8", -1, math.inf) == -torch.inf


def test_nan_codes_and_scales_and_zero_times_infinity_are_nan():
    assert weight("e4m3", 0x7F, 1.0).isnan() and weight("e4m3", 0xFF, 0.0).isnan()
    for dtype in SCALE_DTYPES:
        assert weight("e2m1", 0, math.nan, scale_dtype=dtype).isnan()
    assert weight("int4", 8, math.inf).isnan()


def test_zeros_have_a_sign_as_in_any_product():
    for format, code, scale, negative in (
        ("e2m1", 8, 1.0, True), ("e2m1", 8, -1.0, False), ("e4m3", 0x80, 1.0, True), ("int4", 8, 1.0, False),
        ("int4", 8, -1.0, True), ("int8", 1, -(2.0**-149), True), ("nf4", 7, -0.0, True),
    ):  # fmt: skip
        decoded = weight(format, code, scale)
        assert decoded == 0 and decoded.signbit() == negative, (format, code, scale)


# -------------------------------------------------------------------------------------- zeros, groups, leading dims


def test_a_zero_is_subtracted_on_the_signed_scale():
    for code in range(16):
        for zero in (-128, -8, 0, 7, 127):
            assert weight("int4", code, 0.5, zero) == 0.5 * (code - 8 - zero)
    assert weight("int8", 127, 1.0, -128) == 255 and weight("int8", -128, 2.0, 127) == -510


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "bf16"])
def test_each_weight_has_the_scale_of_its_group_also_in_short_groups_at_the_ends(format):
    experts, rows, columns, group = 2, 5, 11, (2, 4)
    generator = torch.Generator().manual_seed(2)
    count = columns if format in ("e4m3", "int8") else -(-columns // 2)
    codes = torch.randint(0, 256, (experts, rows, count), generator=generator).to(torch.uint8)
    codes = codes.view(torch.int8) if format == "int8" else codes
    scales = torch.randn(experts, 3, 3, generator=generator).bfloat16()
    zeros = torch.randint(-8, 8, scales.shape, generator=generator).to(torch.int8) if "int" in format else None
    decoded = decode(format, codes, scales, zeros, columns=columns, group=group)
    assert decoded.shape == (experts, rows, columns) and decoded.dtype == torch.bfloat16
    for expert, row, column in torch.cartesian_prod(*map(torch.arange, decoded.shape)).tolist():
        place = expert, row // 2, column // 4
        if count == columns:
            code = codes[expert, row, column].item()
        else:
            code = codes[expert, row, column // 2].item() >> (4 if column % 2 else 0) & 15
        zero = None if zeros is None else zeros[place].item()
        expected = weight(format, code, scales[place].float().item(), zero)
        assert same(decoded[expert, row, column], expected), (format, expert, row, column)


@pytest.mark.parametrize("shape", ((0, 4), (4, 0), (2, 0, 4), (0, 3, 5)), ids=str)
def test_weights_without_elements_are_decoded_to_none(shape):
    *lead, rows, columns = shape
    codes = torch.zeros(*lead, rows, -(-columns // 2), dtype=torch.uint8)
    scales = torch.zeros(*lead, -(-rows // 2), -(-columns // 32))
    assert decode("int4", codes, scales, columns=columns, group=(2, 32)).shape == shape


# ----------------------------------------------------------------------------------------------------------- packing


def test_4_bit_codes_lie_in_the_order_of_compressed_tensors():
    packed = pack4(torch.arange(-8, 8) + 8)
    assert packed.view(torch.int32).tolist() == [0x76543210, 0xFEDCBA98 - 2**32]
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    decoded = decode("int4", packed[None], torch.ones(1, 1), columns=16, group=(1, 16))
    assert decoded[0].tolist() == list(range(-8, 8))


@pytest.mark.parametrize("columns", (0, 1, 2, 7, 8, 33))
def test_packing_and_unpacking_are_opposites_and_an_unused_half_byte_is_0(columns):
    codes = torch.randint(0, 16, (3, 2, columns), generator=torch.Generator().manual_seed(columns))
    packed = pack4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-columns // 2))
    assert torch.equal(unpack4(packed, columns), codes.to(torch.uint8))
    if columns % 2:
        assert not (packed[..., -1] >> 4).any()
