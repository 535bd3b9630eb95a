"""Every instruction set decodes the rows of quantised weights to the bits of ktlib/reference/formats.py."""

import pytest
import torch
from support import extension

import ktlib
from ktlib import _kernels
from ktlib.operator.weight import Weight
from ktlib.reference import formats

ISAS = [name for name, missing in ktlib.cpu_info()["isas"].items() if not missing]
CODED = formats.FORMATS[1:]
GUARD = 12345.0  # around every output: a write outside shows


def some_codes(format, rows, columns, generator):
    if format in formats.CODEBOOKS:
        return torch.randint(0, 256, (rows, -(-columns // 2)), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    return codes.view(torch.int8 if format == "int8" else torch.float8_e4m3fn)


def some_scales(shape, dtype, generator):
    """Ordinary ones, and some whose products are subnormal, infinite, NaN or zero."""
    if dtype == torch.float8_e8m0fnu:
        bytes = torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)
        odd = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
        bytes.view(-1)[::7] = odd.repeat(bytes.numel())[: len(bytes.view(-1)[::7])]
        return bytes.view(dtype)
    scales = torch.randn(shape, generator=generator)
    odd = torch.tensor([0.0, 1e-38, 3e-40, float("inf"), -float("nan"), -2e-37, 1e38, 6e-8, -0.0])
    scales.view(-1)[::5] = odd.repeat(scales.numel())[: len(scales.view(-1)[::5])]
    return scales.to(dtype)


def guarded_bytes(tensor):
    """The same values between pages that may not be touched, where the tests run so."""
    return extension.guarded(tensor.shape, tensor.dtype).copy_(tensor)


def assert_same_bits(actual, expected):
    """A NaN is always the same one, that of rounding to bf16."""
    expected = torch.where(expected.isnan(), torch.nan, expected).view(torch.int16)
    actual = actual.view(torch.int16)
    assert torch.equal(actual, expected), (actual != expected).nonzero()[:5]


def decoded_rows(isa, weight, first, count, block):
    """Columns of all rows, as many rows at a time as `block` says."""
    argument = weight.kernel_argument("weight")
    experts, rows, _ = weight.shape
    result = torch.full((experts, rows, count + 64), GUARD, dtype=torch.bfloat16)
    for expert in range(experts):
        for row in range(0, rows, block):
            out = result[expert, row, 32:]
            size = min(block, rows - row)
            _kernels.decode_rows(isa, out.data_ptr(), count + 64, argument, expert, row, size, first, count)
    assert (result[..., :32] == GUARD).all() and (result[..., count + 32 :] == GUARD).all()
    return result[..., 32 : count + 32]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", CODED)
@pytest.mark.parametrize("scale_dtype", formats.SCALE_DTYPES)
@pytest.mark.parametrize(
    "columns, group", [(64, (1, 32)), (200, (3, 48)), (129, (128, 128)), (33, (1, 33)), (1, (1, 2)), (700, (3, 640))]
)
def test_decodes_to_the_bits_of_the_reference(isa, format, scale_dtype, columns, group):
    generator = torch.Generator().manual_seed(columns)
    experts, rows = 3, 5
    codes = torch.stack([some_codes(format, rows, columns, generator).view(torch.uint8) for _ in range(experts)])
    codes = guarded_bytes(codes.view(some_codes(format, 1, 1, generator).dtype))
    scale_shape = (experts, -(-rows // group[0]), -(-columns // group[1]))
    scales = guarded_bytes(some_scales(scale_shape, scale_dtype, generator))
    for with_zeros in (False, True) if format in ("int8", "int4") else (False,):
        zeros = torch.randint(-8, 9, scale_shape, generator=generator, dtype=torch.int8) if with_zeros else None
        weight = Weight(format, codes, scales, zeros, group=group, shape=(experts, rows, columns))
        expected = formats.decode(format, codes, scales, zeros, columns=columns, group=group)
        for first, count in {(0, columns), (columns // 3, columns - columns // 3), (columns // 2, 1)}:
            for block in (1, 4):
                assert_same_bits(decoded_rows(isa, weight, first, count, block), expected[..., first : first + count])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scale", [0.37, -1.7e-5, 3e-40, torch.inf])
def test_all_codes_of_e4m3(isa, rows, scale):
    """Of one row and of several with the same scale, which have their weights looked up where a processor does that."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(1, rows, 1)
    scales = torch.full((1, 1, 1), scale)
    weight = Weight("e4m3", codes, scales, group=(rows, 256))
    expected = formats.decode("e4m3", codes, scales, columns=256, group=(rows, 256))
    assert_same_bits(decoded_rows(isa, weight, 0, 256, rows), expected)


def test_a_list_of_tensors_is_the_stack_of_them():
    """An expert's gate and up apart, or one tensor an expert, at odd addresses: the scales of each are its own."""
    generator = torch.Generator().manual_seed(0)
    experts, rows, columns, group = 4, 10, 70, (3, 32)
    halves = [some_codes("int4", rows // 2, columns, generator) for _ in range(2 * experts)]
    odd = [torch.empty(half.numel() + 1, dtype=torch.uint8)[1:].view(half.shape).copy_(half) for half in halves]
    scales = [torch.randn(2, 3, generator=generator) for _ in halves]  # 5 rows in groups of 3
    weight = Weight("int4", odd, scales, group=group, shape=(experts, rows, columns))
    expected = [
        formats.decode("int4", half, scale, columns=columns, group=group)
        for half, scale in zip(halves, scales, strict=True)
    ]
    assert_same_bits(weight.decoded(), torch.cat(expected).view(experts, rows, columns))
    assert weight.nbytes == 8 * (5 * 35 + 6 * 4)


def test_bf16_in_a_list_is_copied_row_by_row_where_it_is_cut():
    stack = torch.randn(3, 8, 20).bfloat16()
    for pieces in (stack.view(6, 4, 20).unbind(), stack.unbind(), [stack]):
        weight = Weight("bf16", list(pieces), shape=(3, 8, 20))
        assert torch.equal(weight.decoded(), stack)


CODES = torch.zeros(2, 4, 8, dtype=torch.uint8)
SCALES = torch.ones(2, 4, 1)
VALID = {"format": "int4", "codes": CODES, "scales": SCALES, "group": (1, 16)}
BF16 = {"format": "bf16", "codes": CODES.bfloat16(), "scales": None, "group": None}


def test_the_weights_that_the_next_test_spoils_are_valid():
    assert Weight(**VALID).shape == (2, 4, 16) and Weight(**BF16).shape == (2, 4, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"format": "int5"}, ValueError, "format: got 'int5'"),
        ({"codes": CODES.int()}, TypeError, "codes: got int32"),
        ({"codes": []}, TypeError, "codes: got no tensors"),
        ({"codes": [CODES[0], CODES[1, :2]], "shape": (2, 4, 16)}, ValueError, "codes: got shape"),
        ({"codes": CODES[..., ::2]}, ValueError, "codes: got uint8"),
        ({"scales": None}, TypeError, "scales: got NoneType"),
        ({"scales": SCALES.double()}, TypeError, "scales: got float64"),
        ({"scales": SCALES[:, :3]}, ValueError, "scales: got float32"),
        ({"scales": SCALES[:, :3].contiguous()}, ValueError, "scales: got shape"),
        ({"scales": [SCALES, SCALES]}, ValueError, "scales: got 2 tensors"),
        ({"scales": SCALES.clone().requires_grad_()}, ValueError, "scales: got a tensor that requires a gradient"),
        ({"format": "nf4", "zeros": SCALES.to(torch.int8)}, ValueError, "zeros: got int8"),
        ({"zeros": SCALES}, TypeError, "zeros: got float32"),
        ({"group": (1, 15)}, ValueError, "group: got 15"),
        ({"group": (0, 16)}, ValueError, "group: got"),
        ({"group": None}, TypeError, "group: got None"),
        ({"group": (1, True)}, TypeError, "group: got bool"),
        ({"shape": (2, 4, 99)}, ValueError, "codes: got shape"),
        ({"shape": (3, 4, 16)}, ValueError, "codes: got 1 tensors of 8 rows"),
        ({"shape": (2, 0, 16)}, ValueError, "shape: got"),
        ({"shape": 2}, TypeError, "shape: got 2"),
        ({"codes": [CODES[0, 0]]}, ValueError, "shape: got None"),
        (BF16 | {"scales": SCALES}, ValueError, "scales: got"),
        (BF16 | {"group": (1, 8)}, ValueError, "group: got"),
    ],
)
def test_a_malformed_weight_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        Weight(**VALID | change)


def test_memory_that_was_freed_is_refused():
    codes = CODES.clone()
    weight = Weight("int4", codes, SCALES, group=(1, 16))
    codes.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its memory was freed"):
        weight.decoded()
