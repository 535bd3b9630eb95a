"""Every entry of every instruction set's table against its definition in csrc/kernels/kernels.h, ragged sizes too."""

import math

import pytest
import torch
from support import extension

import ktlib
from ktlib import _kernels, reference
from ktlib.operator import checks

ISAS = [name for name, missing in ktlib.cpu_info()["isas"].items() if not missing]
GUARD = 12345.0  # around every output: a write outside shows

pytestmark = pytest.mark.parametrize("isa", ISAS)


def round_up(value, unit):
    return -(-value // unit) * unit


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guarded(*shape, dtype=torch.float32):
    """A tensor of the shape, filled with GUARD, with 64 more elements before and after; and the whole buffer."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 128,), GUARD, dtype=dtype)
    return buffer[64 : 64 + size].view(shape), buffer


def assert_guard(buffer):
    assert (buffer[:64] == torch.tensor(GUARD, dtype=buffer.dtype)).all()
    assert (buffer[-64:] == torch.tensor(GUARD, dtype=buffer.dtype)).all()


def product(isa, a, panel, width, rows, depth, c=None):
    """``multiply`` with the padding that the table asks for, and with no memory beside it; a (rows, depth) bf16."""
    _, row_unit, depth_unit = _kernels.table(isa)
    padded = extension.guarded((round_up(rows, row_unit), round_up(depth, depth_unit)), torch.bfloat16).zero_()
    padded[:rows, :depth] = a
    accumulate = c is not None
    out = extension.guarded((round_up(rows, row_unit), width), torch.float32).fill_(GUARD) if c is None else c
    _kernels.multiply(
        isa, out.data_ptr(), width, padded.data_ptr(), padded.shape[1], panel.data_ptr(), width, rows, padded.shape[1],
        accumulate,
    )  # fmt: skip
    return out


def assert_product(actual, a, b):
    """Against float64, to the error of fp32 sums of exact bf16 products: depth units of 2^-24 of the absolute sum."""
    expected, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((actual.double() - expected).abs() <= size * a.shape[1] * 2.0**-24 + 1e-30).all()


@pytest.mark.parametrize("rows", [1, 5, 16, 23, 64])
@pytest.mark.parametrize("width", [16, 32, 48, 64])
@pytest.mark.parametrize("depth", [1, 2, 31, 96, 300, 1056])
def test_pack_rows_and_multiply(isa, width, depth, rows):
    count = width - 3
    tokens, index = normal(80, depth).bfloat16(), torch.randperm(80, generator=torch.Generator().manual_seed(1))
    index = index[:count].int()
    padded = round_up(depth, _kernels.table(isa)[2])
    panel, buffer = guarded(padded, width, dtype=torch.bfloat16)
    _kernels.pack_rows(isa, panel.data_ptr(), width, tokens.data_ptr(), depth, index.data_ptr(), count, depth)
    assert_guard(buffer)
    a = normal(rows, depth, seed=2).bfloat16()
    columns = torch.zeros(depth, width, dtype=torch.bfloat16)
    columns[:, :count] = tokens[index.long()].T
    c = product(isa, a, panel, width, rows, depth)
    assert_product(c[:rows], a, columns)
    assert (c[:rows, count:] == 0).all()
    twice = product(isa, a, panel, width, rows, depth, c.clone())
    assert_product(twice[:rows] / 2, a, columns)


@pytest.mark.parametrize("columns", [1, 16, 21, 32, 40, 64])
@pytest.mark.parametrize("depth", [1, 2, 31, 96, 257])
def test_pack_pairs_and_multiply(isa, columns, depth):
    width, rows = round_up(columns, 16), 19
    source = normal(depth + 9, columns + 5).bfloat16()  # rows longer than what is used
    index = torch.randperm(depth + 9, generator=torch.Generator().manual_seed(1))[:depth].int()
    for rows_index in (None, index):
        padded = round_up(depth, _kernels.table(isa)[2])
        panel, buffer = guarded(padded, width, dtype=torch.bfloat16)
        _kernels.pack_pairs(
            isa, panel.data_ptr(), padded, width, source.data_ptr(), columns + 5,
            0 if rows_index is None else index.data_ptr(), depth, columns,
        )  # fmt: skip
        assert_guard(buffer)
        b = (source[:depth] if rows_index is None else source[index.long()])[:, :columns]
        a = normal(rows, depth, seed=2).bfloat16()
        c = product(isa, a, panel, width, rows, depth)
        _kernels.unpermute(isa, c.data_ptr(), width, rows, width)
        assert_product(c[:rows, :columns], a, b)
        assert (c[:rows, columns:] == 0).all()


@pytest.mark.parametrize("features", [1, 2, 31, 32, 64])
@pytest.mark.parametrize("tokens", [1, 16, 37, 48])
def test_transposing_stores(isa, features, tokens):
    width = round_up(tokens, 16)
    c = normal(features, width)
    for dtype in (torch.bfloat16, torch.float32):
        out, buffer = guarded(tokens, features + 3, dtype=dtype)
        _kernels.store_rows(
            isa, out.data_ptr(), dtype == torch.float32, features + 3, c.data_ptr(), width, features, tokens
        )
        assert torch.equal(out[:, :features], c.T[:tokens].to(dtype))
        assert (out[:, features:] == torch.tensor(GUARD, dtype=dtype)).all()
        assert_guard(buffer)


@pytest.mark.parametrize("features", [1, 2, 7, 32])
def test_interleave_is_a_panel(isa, features):
    width = 48
    c = normal(features, width)
    depth, first = round_up(features, 2) + 6, 4  # features in the midst of a deeper panel
    panel, buffer = guarded(width // 16, depth // 2, 16, 2, dtype=torch.bfloat16)
    _kernels.interleave(isa, panel.data_ptr() + first * 16 * 2, depth, width, c.data_ptr(), width, features)
    expected = torch.full((depth, width), GUARD, dtype=torch.bfloat16)
    expected[first : first + round_up(features, 2)] = 0
    expected[first : first + features] = c.bfloat16()
    assert torch.equal(panel.permute(1, 3, 0, 2).reshape(depth, width), expected)
    assert_guard(buffer)


SPECIAL = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1.00390625, 1.01171875, 65504.0]


@pytest.mark.parametrize("count", [1, 11, 64, 1000])
def test_round_and_widen(isa, count):
    """To nearest, ties to even, as torch rounds; overflow to infinity; NaN stays NaN."""
    src = torch.cat([torch.tensor(SPECIAL), normal(1000)])[:count]
    out, buffer = guarded(count, dtype=torch.bfloat16)
    _kernels.round(isa, out.data_ptr(), src.contiguous().data_ptr(), 1.0, count)
    assert torch.equal(out.isnan(), src.isnan())
    assert torch.equal(out.nan_to_num(0, 1, -1), src.bfloat16().nan_to_num(0, 1, -1))
    assert_guard(buffer)
    back, buffer = guarded(count)
    _kernels.widen(isa, back.data_ptr(), out.data_ptr(), 2.0, count)
    assert torch.equal(back.nan_to_num(0), (out.float() * 2).nan_to_num(0))
    assert_guard(buffer)


GATES = [
    # name, limit, alpha
    ("silu", None, None),
    ("silu", 1.5, None),
    ("gelu", None, None),
    ("gelu", 2.0, None),
    ("gelu_tanh", None, None),
    ("gelu_tanh", 2.0, None),
    ("swiglu_oai", 7.0, None),
    ("swiglu_oai", None, 0.9),
]


def gate_arguments(gate):
    name, limit, alpha = gate
    return _kernels.Gate(
        kind=checks.GATES.index(name),
        limit=math.inf if limit is None else limit,
        alpha=checks.ALPHA if alpha is None else alpha,
    )


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("count", [1, 17, 64, 200])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_activate(isa, gate, count, step):
    values = torch.tensor([0.0, -100.0, 100.0, -20.0, 20.0, 1e-6, 1e30, -1e4, -7.3, 7.0, -12.9])
    both = torch.stack([torch.cat([values, 4 * normal(200)])[:count], 3 * normal(count, seed=1)])
    gate_up = (both.T if step == 2 else both).contiguous()
    up_address = gate_up.data_ptr() + 4 * (1 if step == 2 else count)
    out, buffer = guarded(count)
    _kernels.activate(isa, gate_arguments(gate), out.data_ptr(), gate_up.data_ptr(), up_address, step, count)
    expected = reference.apply_gate(*both.double(), *gate)
    assert torch.allclose(out.double(), expected, rtol=2e-5 if gate[0] == "gelu_tanh" else 3e-6, atol=1e-33)
    assert_guard(buffer)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_activation_everywhere(isa, gate):
    """A fine grid, the lower tails too: a few units in the last place down to the smallest normal numbers."""
    x = torch.linspace(-15, 15, 60001)
    one, out = torch.full_like(x, 0.75), torch.empty_like(x)
    _kernels.activate(isa, gate_arguments(gate), out.data_ptr(), x.data_ptr(), one.data_ptr(), 1, x.numel())
    expected = reference.apply_gate(x.double(), one.double(), *gate)
    error = (out.double() - expected).abs() - 1e-36
    for bound, units in ((2, 8), (15, 240 if gate[0] == "gelu_tanh" else 32)):  # of 2^-24: exp(z) errs by |z| units
        near = x.abs() <= bound
        assert (error[near] <= units * 2**-24 * expected.abs()[near]).all()


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_nan_passes_every_gate(isa, gate):
    nan, one, out = torch.full((5,), torch.nan), torch.ones(5), torch.zeros(5)
    for g, u in ((nan, one), (one, nan)):
        _kernels.activate(isa, gate_arguments(gate), out.data_ptr(), g.data_ptr(), u.data_ptr(), 1, 5)
        assert out.isnan().all()


FAR = [60, 80, 87, 88, 89, 91, 100, 150, 1e3, 1e4, 1e10, 1e20, 1e30, 1e36, 1e38, 3e38]


@pytest.mark.parametrize("gate", [*GATES, ("swiglu_oai", None, 1e38), ("swiglu_oai", None, -1e38)], ids=str)
def test_gates_far_from_zero(isa, gate):
    """The activation and its derivative are 0, or 1 and the gate itself, out to the largest numbers."""
    g = torch.tensor([*FAR, *(-value for value in FAR)]).bfloat16()
    leaves = torch.stack([g, torch.full_like(g, -0.75)]).double().requires_grad_()
    expected = reference.apply_gate(*leaves, *gate)
    expected.sum().backward()
    wide, up, out = g.float(), torch.full((len(g),), -0.75), torch.empty(len(g))
    _kernels.activate(isa, gate_arguments(gate), out.data_ptr(), wide.data_ptr(), up.data_ptr(), 1, len(g))
    assert torch.allclose(out.double(), expected, rtol=2e-5, atol=1e-34)
    h, half, grad = torch.ones(len(g)), up.bfloat16(), torch.empty(2, len(g), dtype=torch.bfloat16)
    _kernels.gate_backward(
        isa, gate_arguments(gate), h.data_ptr(), g.data_ptr(), half.data_ptr(), 1, 1.0, grad[0].data_ptr(),
        grad[1].data_ptr(), len(g),
    )  # fmt: skip
    assert torch.equal(h, out)
    assert torch.allclose(grad.double(), leaves.grad, rtol=2**-8, atol=1e-34)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("features", [1, 17, 64, 150])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gate_backward(isa, gate, features, step):
    both = torch.stack([4 * normal(features), 3 * normal(features, seed=1)]).bfloat16()
    both[:, features // 2] = 7.0 if gate[1] is None else gate[1]  # at the limit itself the gradient passes
    dh, weight = normal(features, seed=2), 0.37
    leaves = both.double().requires_grad_()
    h = reference.apply_gate(*leaves, *gate)
    h.backward(weight * dh.double())
    gate_up = (both.T if step == 2 else both).contiguous()
    offset = 2 * (1 if step == 2 else features)
    work, (grad, buffer) = dh.clone(), guarded(*gate_up.shape, dtype=torch.bfloat16)
    total = _kernels.gate_backward(
        isa, gate_arguments(gate), work.data_ptr(), gate_up.data_ptr(), gate_up.data_ptr() + offset, step, weight,
        grad.data_ptr(), grad.data_ptr() + offset, features,
    )  # fmt: skip
    assert torch.allclose(work.double(), h.detach(), rtol=1e-5, atol=1e-7)
    size = (dh.double() * h.detach()).abs().sum()
    assert abs(total - (dh.double() * h.detach()).sum()) <= 1e-5 * size
    # the derivative crosses zero: absolute error of fp32 there
    assert torch.allclose((grad.T if step == 2 else grad).double(), leaves.grad, rtol=2**-8, atol=2e-6)
    assert_guard(buffer)


@pytest.mark.parametrize("rank", [1, 3, 4, 6, 16])
@pytest.mark.parametrize("rows", [1, 4, 31])
@pytest.mark.parametrize("columns", [1, 70, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rank_grad(isa, rank, rows, columns, dtype):
    src = extension.guarded((rows, columns), dtype).copy_(normal(rows, columns))
    t = extension.guarded((2 * rank, rows), torch.bfloat16).copy_(normal(2 * rank, rows, seed=1))
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).int()
    for order in (None, index):
        grad, buffer = guarded(rank, columns)
        _kernels.rank_grad(
            isa, grad.data_ptr(), columns, rank, t.data_ptr(), rows, src.data_ptr(), dtype == torch.float32, columns,
            0 if order is None else order.data_ptr(), rows, columns,
        )  # fmt: skip
        factor = t[:rank].double() + t[rank:].double()
        other = (src if order is None else src[order]).double()
        error = (grad.double() - factor @ other).abs()
        assert (error <= factor.abs() @ other.abs() * (rows + 2) * 2.0**-24 + 1e-30).all()
        assert_guard(buffer)


@pytest.mark.parametrize("size", [1, 63, 64, 200])
@pytest.mark.parametrize("weighted", [True, False])
def test_combine(isa, size, weighted):
    rows, weights = normal(5, size), normal(5, seed=1)
    expected = (rows.double() * (weights.double()[:, None] if weighted else 1.0)).sum(0)
    for dtype in (torch.bfloat16, torch.float32):
        out, buffer = guarded(size, dtype=dtype)
        _kernels.combine(
            isa, out.data_ptr(), dtype == torch.float32, [row.data_ptr() for row in rows],
            weights.data_ptr() if weighted else 0, size,
        )  # fmt: skip
        assert torch.allclose(out.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert_guard(buffer)
