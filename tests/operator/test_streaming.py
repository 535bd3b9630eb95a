"""Experts that a call streams to a GPU, on the CPU instead of a GPU: everything but the copies and CUDA's arithmetic.

tests/gpu/test_streaming_gpu.py runs these tests on a GPU.
"""

import itertools

import numpy as np
import pytest
import torch
from test_dropout import DROPOUT
from test_gates import GATES, LAYOUTS, in_layout, layer_of
from test_moe_experts import SHAPES, assert_within, layers
from torch.utils.checkpoint import checkpoint

import ktlib
from ktlib import _kernels, reference
from ktlib.lab.validation import QUANTITIES, evaluate, random_layer, relative_error
from ktlib.operator import moe_experts, registered_op
from ktlib.operator.gpu import streamed_experts as streaming
from ktlib.operator.recompute_once import CHECKPOINTING

ROUTED = ("hidden_states", "top_k_index", "top_k_weights")
INDEX = registered_op.Settings._fields.index("stream_rows")


@pytest.fixture
def place(monkeypatch):
    """A function that moves a layer to the device to which its experts are streamed."""
    monkeypatch.setattr(moe_experts, "_stream_device", str)
    return lambda layer: layer


def errors(cases, place, stream_rows, **options):
    """Relative L2 error per quantity over all the layers, as test_moe_experts.compare takes it."""
    want = [evaluate(reference.moe_experts, layer, **options) for layer in cases]
    got = [evaluate(ktlib.moe_experts, place(layer), stream_rows=stream_rows, **options) for layer in cases]

    def concatenated(results, name):
        return torch.cat([result[name].flatten().cpu() for result in results])

    return {name: relative_error(concatenated(got, name), concatenated(want, name)).item() for name in QUANTITIES}


def common_row_count(cases):
    """A number of rows that about half of the experts reach."""
    counts = cases[0]["top_k_index"].flatten().bincount()
    return max(1, int(counts[counts > 0].float().quantile(0.6)))


def streamed_experts(monkeypatch):
    """A list to which each call will append the list of experts that it streams."""
    seen, choose = [], streaming.choose

    def watch(*arguments):
        chosen = choose(*arguments)
        seen.append([] if chosen is None else chosen.nonzero().flatten().tolist())
        return chosen

    monkeypatch.setattr(registered_op, "choose", watch)
    return seen


# ---------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("stream_rows", [1, "some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, stream_rows, place):
    cases = layers(*shape)
    assert_within(errors(cases, place, common_row_count(cases) if stream_rows == "some" else stream_rows))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_layouts(gate, layout, place):
    plain = [layer_of(40, 5, 3, 72, 56, 4, bias_dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    cases = [in_layout(layer, **LAYOUTS[layout]) for layer in plain]
    for stream_rows in (1, common_row_count(cases)):
        assert_within(errors(cases, place, stream_rows, **GATES[gate], **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout(layout, place):
    cases = [in_layout(layer_of(48, 8, 4, 96, 80, 8, seed=seed), **LAYOUTS[layout]) for seed in range(4)]
    for stream_rows in (1, common_row_count(cases)):
        assert_within(errors(cases, place, stream_rows, **DROPOUT, **LAYOUTS[layout]))


@pytest.mark.parametrize("hidden_dtype, lora_dtype", itertools.product((torch.bfloat16, torch.float32), repeat=2))
def test_dtypes(hidden_dtype, lora_dtype, place):
    layer = random_layer("trained", tokens=60, experts=6, top_k=2, hidden=64, intermediate=48, lora_dtype=lora_dtype)
    layer["hidden_states"] = torch.randn(60, 64, generator=torch.Generator().manual_seed(0)).to(hidden_dtype)
    if hidden_dtype == torch.float32:
        layer["hidden_states"] = layer["hidden_states"].bfloat16().float()  # the rounding on entry is not tested here
    got = evaluate(ktlib.moe_experts, place(layer), stream_rows=common_row_count([layer]))
    assert_within(
        {n: relative_error(got[n].cpu(), w).item() for n, w in evaluate(reference.moe_experts, layer).items()}
    )


def test_without_lora_and_without_gradients(place):
    layer = {k: v for k, v in layers(48, 8, 4, 96, 80, 8)[0].items() if "lora" not in k}
    want = reference.moe_experts(**layer)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = ktlib.moe_experts(**place(layer), stream_rows=1)
        assert relative_error(got.cpu().double(), want) < 0.004
    for only in ("hidden_states", "top_k_weights"):
        gradients = []
        for function, moved, options in (
            (reference.moe_experts, layer, {}), (ktlib.moe_experts, place(layer), {"stream_rows": 8})
        ):  # fmt: skip
            moved = moved | {only: moved[only].detach().clone().requires_grad_()}
            function(**moved, **options).double().square().sum().backward()
            gradients.append(moved[only].grad.double().cpu())
        assert relative_error(gradients[1], gradients[0]) < 0.008, only


@pytest.mark.parametrize("group_bytes, rows", [(1, 2048), (20_000, 7), (2**27, 10), (2**27, 90), (2**27, 1)])
def test_groups_and_blocks(group_bytes, rows, place, monkeypatch):
    monkeypatch.setattr(streaming, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(streaming, "BLOCK_VALUES", rows * 2 * 56)
    cases = layers(90, 7, 3, 72, 56, 4)
    for stream_rows in (1, common_row_count(cases)):
        assert_within(errors(cases, place, stream_rows))
        assert_within(errors(cases, place, stream_rows, **DROPOUT))


def test_an_expert_twice_for_one_token(place):
    layer = layers(30, 4, 3, 64, 48, 4)[0]
    layer["top_k_index"] = torch.randint(0, 2, (30, 3), generator=torch.Generator().manual_seed(0))
    assert_within(errors([layer], place, 1))
    assert_within(errors([layer], place, 40))


# ---------------------------------------------------------------------------------------------------- what is streamed


def test_experts_with_as_many_rows_are_streamed_and_no_others(place, monkeypatch):
    seen = streamed_experts(monkeypatch)
    layer = layers(48, 8, 4, 96, 80, 8)[0]
    counts = layer["top_k_index"].flatten().bincount(minlength=8)
    for rows in (1, int(counts.median()), int(counts.median()) + 1, int(counts.max()), int(counts.max()) + 1):
        evaluate(ktlib.moe_experts, place(layer), stream_rows=rows)
        assert seen[-2:] == [[expert for expert in range(8) if counts[expert] >= rows]] * 2


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_are_not_streamed_have_the_same_bits(transposed, place):
    """Tokens whose experts all stay on the CPU have the same bits as without streaming."""
    layer = in_layout(layers(64, 6, 2, 96, 80, 8)[0], transposed=transposed)
    layer["top_k_index"] = torch.cat([torch.tensor([[0, 1]]).repeat(48, 1), torch.tensor([[2, 3], [4, 5]] * 8)])
    want = evaluate(ktlib.moe_experts, layer, transposed=transposed)
    got = evaluate(ktlib.moe_experts, place(layer), transposed=transposed, stream_rows=20)
    for name in ("output", "hidden_states", "top_k_weights"):
        assert torch.equal(got[name][48:].cpu(), want[name][48:]), name
    for name in ("gate_up lora_A", "down lora_A"):
        assert torch.equal(got[name].cpu()[2 * 8 :], want[name][2 * 8 :]), name
    for name in ("gate_up lora_B", "down lora_B"):
        assert torch.equal(*(grads[name].cpu().view(-1, 8, 6)[:, :, 2:] for grads in (got, want))), name
    assert not torch.equal(
        got["hidden_states"][:48].cpu(), want["hidden_states"][:48]
    )  # streamed experts round differently


def test_more_rows_than_any_expert_has_change_nothing(place):
    layer = layers(48, 8, 4, 96, 80, 8)[0]
    want = evaluate(ktlib.moe_experts, place(layer))
    got = evaluate(ktlib.moe_experts, place(layer), stream_rows=1000)
    assert all(torch.equal(got[name], want[name]) for name in QUANTITIES)


def test_hidden_states_on_the_cpu_are_computed_there(monkeypatch):
    seen = streamed_experts(monkeypatch)
    layer = layers(48, 8, 4, 96, 80, 8)[0]
    want, got = evaluate(ktlib.moe_experts, layer), evaluate(ktlib.moe_experts, layer, stream_rows=1)
    assert all(torch.equal(got[name], want[name]) for name in QUANTITIES) and seen == [[]] * 4


@pytest.mark.parametrize("stream_rows", [1, "some"])
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_same_bits_again(options, stream_rows, place):
    cases = layers(300, 8, 3, 96, 72, 8)
    rows = common_row_count(cases) if stream_rows == "some" else stream_rows
    first, *others = (evaluate(ktlib.moe_experts, place(cases[0]), stream_rows=rows, **options) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in QUANTITIES)


def test_a_token_that_is_nan_spoils_no_other(place):
    layer = layers(48, 8, 4, 96, 80, 8)[0]
    clean = ktlib.moe_experts(**place(layer), stream_rows=1)
    layer["hidden_states"][5, 3] = float("nan")
    spoiled = ktlib.moe_experts(**place(layer), stream_rows=1)
    assert spoiled[5].isnan().all()
    assert torch.equal(spoiled[torch.arange(48) != 5], clean[torch.arange(48) != 5])


def test_checkpointing_computes_forward_once(place, monkeypatch):
    seen = streamed_experts(monkeypatch)
    layer = place(layers(48, 8, 4, 96, 80, 8)[0])
    results = []
    for wrapped in (False, True):
        x = layer["hidden_states"].clone().requires_grad_()

        def call(x):
            return ktlib.moe_experts(**layer | {"hidden_states": x}, stream_rows=8)

        output = checkpoint(call, x, **CHECKPOINTING) if wrapped else call(x)
        output.float().square().sum().backward()
        results.append((output, x.grad))
        assert len(seen) == 2
        seen.clear()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_tokens(place):
    layer = layers(48, 8, 4, 96, 80, 8)[0]
    for name in ROUTED:
        layer[name] = layer[name][:0]
    got = evaluate(ktlib.moe_experts, place(layer), stream_rows=1)
    assert got["output"].shape == (0, 96) and all(not grad.any() for grad in got.values())


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (-3, ValueError), (True, TypeError), (1.0, TypeError), ("8", TypeError)]
)
def test_wrong_numbers_of_rows(value, error):
    layer = layers(4, 3, 2, 16, 16, 2)[0]
    with pytest.raises(error, match="stream_rows: got .*, needs None or"):
        ktlib.moe_experts(**layer, stream_rows=value)


def test_an_expert_id_out_of_range_is_named(place):
    layer = layers(4, 3, 2, 16, 16, 2)[0]
    for wrong in (-1, 3):
        layer["top_k_index"] = torch.tensor([[0, 1], [1, 2], [0, wrong], [1, 2]])
        words = rf"top_k_index: got expert id {wrong} for token 2, slot 1; ids must be in \[0, 3\)"
        with pytest.raises(ValueError, match=words):
            ktlib.moe_experts(**place(layer), stream_rows=1)
        with pytest.raises(ValueError, match=words):
            reference.moe_experts(**layer)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
def test_weights_that_are_trained_are_refused(name, place):
    layer = place(layer_of(8, 3, 2, 16, 16, 2))
    layer[name] = layer[name].detach().clone().requires_grad_()
    with pytest.raises(ValueError, match="stream_rows: got 4 with expert weights or biases that require a gradient"):
        ktlib.moe_experts(**layer, stream_rows=4)
    with torch.no_grad():
        ktlib.moe_experts(**layer, stream_rows=4)


@pytest.mark.parametrize("stream_device", ["", "cpu"])
def test_weights_that_are_trained_are_refused_in_batches(stream_device, monkeypatch):
    monkeypatch.setattr(moe_experts, "_stream_device", lambda device: stream_device)
    layer = layer_of(8, 3, 2, 16, 16, 2)
    batch = torch.stack([layer["down_bias"], layer["down_bias"]]).requires_grad_()
    call = torch.func.vmap(lambda bias: ktlib.moe_experts(**layer | {"down_bias": bias}, stream_rows=4))
    with pytest.raises(ValueError, match="stream_rows: got 4 with expert weights or biases that require a gradient"):
        call(batch)
    assert torch.equal(*call(batch.detach()))


def test_weights_whose_memory_was_freed_since_forward(place):
    layer = place(layers(8, 3, 2, 16, 16, 2)[0])
    layer["hidden_states"].requires_grad_()
    output = ktlib.moe_experts(**layer, stream_rows=1)
    layer["down_proj"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="down_proj: .* its memory was freed"):
        output.sum().backward()


# ----------------------------------------------------------------------------------------------------- building blocks


def gate_gradients(dh, gate, up, kind, limit, alpha):
    terms, results = streaming.gate_terms(gate, up, kind, limit, alpha), (torch.empty_like(gate), torch.empty_like(up))
    streaming.gate_backward(dh, gate, up, terms, limit, results)
    return results


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_the_gates(gate):
    """Against float64, for small and large values, at and beyond limits."""
    options = GATES[gate]
    arguments = options["gate"], options.get("limit"), options.get("alpha", 1.702)
    values = torch.cat(
        [torch.linspace(-20, 20, 801), 2.0 ** torch.arange(-20, 60, 4), -(2.0 ** torch.arange(-20, 60, 4))]
    )
    gate_values, up = values.repeat(2), torch.cat([values.flip(0), values.roll(7)])
    leaves = [gate_values.double().requires_grad_(), up.double().requires_grad_()]
    dh = torch.randn(len(up), generator=torch.Generator().manual_seed(0))
    reference.apply_gate(*leaves, *arguments).backward(dh.double())
    for got, leaf in zip(gate_gradients(dh, gate_values, up, *arguments), leaves, strict=True):
        torch.testing.assert_close(got.double(), leaf.grad, rtol=2e-5, atol=2e-5)


def test_gradients_of_the_gates_at_nan():
    nan, number = torch.tensor([float("nan")]), torch.tensor([0.5])  # within every limit
    for options in GATES.values():
        for gate, up in ((nan, number), (number, nan)):
            arguments = options["gate"], options.get("limit"), options.get("alpha", 1.702)
            assert any(grad.isnan() for grad in gate_gradients(torch.ones(1), gate, up, *arguments))


def test_masks_of_rows():
    slots = torch.tensor([5, 0, 2**31 + 3, 7])
    masks = torch.empty((4, 130), dtype=torch.int16)
    for isa in (name for name, missing in ktlib.cpu_info()["isas"].items() if not missing):
        for threads in (1, 3):
            masks.fill_(7)
            drop = _kernels.Dropout(seed=11, threshold=round(0.3 * 2**32))
            _kernels.keep_masks(isa, threads, masks.data_ptr(), drop, 1, slots.data_ptr(), *masks.shape)
            assert torch.equal(masks != 0, reference.keep_mask(11, 0.3, 1, slots, 130))


@pytest.mark.parametrize("threads", [1, 3])
def test_copies(threads):
    sizes = [0, 1, 4095, 3 * 2**18, 3 * 2**18 + 17]
    sources = [torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, np.uint8)) for size in sizes]
    targets = [torch.full((size + 2,), 7, dtype=torch.uint8) for size in sizes]
    arguments = [
        (to[1:].data_ptr(), source.data_ptr(), len(source)) for to, source in zip(targets, sources, strict=True)
    ]
    _kernels.copy(threads, [arguments])
    for to, source in zip(targets, sources, strict=True):
        assert torch.equal(to[1:-1], source) and to[0] == to[-1] == 7


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 1000, 2**20 + 3])
def test_copies_through_a_ring(threads, size):
    """A chunk is complete when ``ready`` is called for it, in order, though chunks share the buffers of a ring."""
    source = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 20 * size, np.uint8))
    ring, seen = [torch.zeros(size, dtype=torch.uint8) for _ in range(3)], []

    def ready(i):
        seen.append(torch.equal(ring[i % 3], source[i * size : (i + 1) * size]))

    chunks = [[(ring[i % 3].data_ptr(), source.data_ptr() + i * size, size)] for i in range(20)]
    _kernels.copy(threads, chunks, 3, ready)
    assert seen == [True] * 20


def test_copies_that_could_not_work_ahead_are_refused():
    with pytest.raises(ValueError, match="ahead: got 1, needs at least 2"):
        _kernels.copy(2, [[], []], 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at", [0, 7, 19])
def test_copies_end_with_what_is_raised_meanwhile(threads, at):
    memory, seen = torch.zeros(20, 2**20, dtype=torch.uint8), []

    def ready(i):
        seen.append(i)
        if i == at:
            raise KeyboardInterrupt("enough")

    chunks = [[(row.data_ptr(), memory[0].data_ptr(), 2**20)] for row in memory]
    with pytest.raises(KeyboardInterrupt, match="enough"):
        _kernels.copy(threads, chunks, 2, ready)
    assert seen == list(range(at + 1))


def test_groups_hold_every_row_once():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 9, (70, 3), generator=generator) ** 2 // 8
    ids = index.flatten()
    chosen = ids.bincount(minlength=9) >= 12
    for most_experts, most_rows in itertools.product((1, 2, 100), (1, 13, 50, 1000)):
        groups = streaming._groups(ids.bincount(minlength=9).numpy(), chosen.numpy(), most_experts, most_rows)
        assert sorted(int(e) for experts in groups for e in experts) == chosen.nonzero().flatten().tolist()
        rows_of_groups = streaming._rows_of_groups(ids.int().numpy(), 3, 9, groups, most_rows)
        blocks = [rows for blocks in rows_of_groups for rows in blocks]
        wanted = [slot for slot, expert in enumerate(ids.tolist()) if chosen[expert]]
        assert sorted(int(slot) for rows in blocks for slot in rows.slots) == wanted
        for experts, rows in ((e, rows) for e, blocks in zip(groups, rows_of_groups, strict=True) for rows in blocks):
            assert len(experts) == len(rows.padded) <= most_experts and rows.padded.size <= max(most_rows, len(experts))
            assert np.array_equal(rows.padded.ravel()[rows.positions], rows.slots) and (np.diff(rows.slots) > 0).all()
            assert np.array_equal(np.repeat(rows.tokens, np.diff(rows.starts, append=len(rows.slots))), rows.slots // 3)
            assert len(np.unique(rows.tokens)) == len(rows.tokens)
            for expert, line in zip(experts, rows.padded, strict=True):
                assert all(ids[slot] == expert for slot in line if slot < len(ids))
