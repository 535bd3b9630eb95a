"""Dropout on LoRA's input: the masks, results against the reference, and the same bits however it is computed."""

import itertools

import pytest
import torch
from test_gates import GATES, LAYOUTS, check, in_layout, layer_of
from test_moe_experts import BOUNDS, FAST, ISAS, assert_within, compare, layers
from torch.utils.checkpoint import checkpoint

import ktlib
from ktlib import _kernels, reference
from ktlib.lab.validation import QUANTITIES, evaluate, random_layer, relative_error
from ktlib.operator.recompute_once import CHECKPOINTING

DROPOUT = {"lora_dropout": 0.3, "dropout_seed": 11}


# ------------------------------------------------------------------------------------------------ the random numbers


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_its_authors_numbers(counter, key, words):
    """The known answers of Random123 1.09 (kat_vectors) for philox4x32-10."""
    assert tuple(map(int, reference.philox(counter, key))) == words


def kernel_mask(isa, seed, p, projection, slot, first, count):
    mask = torch.full((count + 2,), 7, dtype=torch.int16)
    drop = _kernels.Dropout(seed=seed, threshold=min(round(p * 2**32), 2**32 - 1))
    _kernels.keep_mask(isa, mask[1:].data_ptr(), drop, projection, slot, first, count)
    assert mask[0] == mask[-1] == 7 and set(mask[1:-1].tolist()) <= {0, -1}
    return mask[1:-1] != 0


@pytest.mark.parametrize("isa", ISAS)
def test_masks_are_the_same_bits_in_every_instruction_set(isa):
    for seed, p, projection, slot in (
        (0, 0.5, 0, 0),
        (-(2**63), 0.05, 1, 1),
        (2**63 - 1, 0.999, 0, 2**31 - 1),
        (-5, 0.3, 1, 2**40 + 7),
        (123456789012345, 1 - 2**-40, 1, 3),
    ):
        expected = reference.keep_mask(seed, p, projection, [slot], 1100)[0]
        for first, count in ((0, 1), (0, 64), (0, 1100), (64, 128), (37, 26), (63, 2), (512, 588), (1099, 1)):
            got = kernel_mask(isa, seed, p, projection, slot, first, count)
            assert torch.equal(got, expected[first : first + count]), (seed, first, count)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_the_share_that_is_dropped(p):
    """Drop rates overall, by column and by slot: within five standard deviations, or six for the worst of thousands."""
    dropped = ~reference.keep_mask(1, p, 0, range(1000), 2000)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.double().mean() - p) < 5 * sigma / dropped.numel() ** 0.5
    for dim in (0, 1):
        assert (dropped.double().mean(dim) - p).abs().max() < 6 * sigma / dropped.shape[dim] ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_slots_columns_projections_and_seeds_are_independent(p):
    """The masks of any two slots, or columns, are uncorrelated: within a few standard deviations of zero."""

    def standardised(*arguments):
        return (reference.keep_mask(*arguments).double() - (1 - p)) / (p * (1 - p)) ** 0.5

    rows, columns = standardised(3, p, 0, range(300), 3000), standardised(3, p, 0, range(3000), 300).T
    for matrix in (rows, columns):  # all pairs
        correlation = matrix @ matrix.T / matrix.shape[1]
        assert correlation.fill_diagonal_(0).abs().max() < 7 / matrix.shape[1] ** 0.5  # 5 %: no normal tail
    others = [
        standardised(seed, p, projection, range(300), 3000) for seed, projection in ((3, 1), (4, 0), (3 + 2**32, 0))
    ]
    for first, second in itertools.combinations([rows, *others], 2):
        assert abs((first * second).mean()) < 5 / rows.numel() ** 0.5
    shifted = [(rows[:, :-lag] * rows[:, lag:]).mean() for lag in (1, 15, 16, 17, 63, 64, 65)]
    assert max(map(abs, shifted)) < 6 / rows.numel() ** 0.5


# ------------------------------------------------------------------------------------------------ against the reference


SHAPES = [
    # tokens, experts, top_k, hidden, intermediate, rank
    (1, 64, 6, 96, 72, 8),
    (17, 4, 2, 75, 41, 5),
    (17, 8, 4, 72, 1408, 8),
    (48, 8, 7, 1408, 96, 16),
    (48, 1, 1, 72, 72, 1),
    (300, 8, 2, 96, 72, 70),
    (700, 2, 2, 530, 80, 3),  # several blocks of rows and of columns
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, isa):
    assert_within(compare(layers(*shape), isa, **DROPOUT))


@pytest.mark.parametrize("p", [0.05, 0.9])
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
def test_probabilities_and_dtypes(p, lora_dtype):
    cases = layers(48, 8, 4, 96, 80, 8)
    for layer in cases:
        for name in ("gate_up_lora", "down_lora"):
            layer[name] = (*(t.to(lora_dtype) for t in layer[name][:2]), layer[name][2])
    assert_within(compare(cases, FAST, lora_dropout=p, dropout_seed=-3))


def test_a_probability_next_to_one():
    """Elements are kept, and divided by, 2**-32, though 1 - p is smaller. With this seed one element is kept."""
    options = {"lora_dropout": 1 - 2**-40, "dropout_seed": 2065177}
    assert reference.keep_mask(2065177, 1 - 2**-40, 0, range(8), 64).nonzero().tolist() == [[1, 18]]
    layer = random_layer("trained", tokens=8, experts=2, top_k=1, hidden=64, intermediate=48, rank=4)
    assert (
        max(compare([layer], FAST, **options).values()) < 0.03
    )  # nearly all values come from one row, so errors do not average out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["silu", "clamped gelu", "gpt-oss"])
def test_gates_layouts_and_the_weights_themselves(gate, layout, isa):
    """All outputs and all gradients, with biases and full fine-tuning beside LoRA."""
    for shape in ((300, 8, 2, 96, 72, 8), (300, 3, 2, 75, 41, 5)):
        check(in_layout(layer_of(*shape), **LAYOUTS[layout]), isa, **GATES[gate], **LAYOUTS[layout], **DROPOUT)


@pytest.mark.parametrize("which", ["gate_up_lora", "down_lora"])
def test_one_adapted_projection(which):
    for transposed in (False, True):
        layer = in_layout(layer_of(200, 4, 2, 96, 80, 4), transposed=transposed)
        layer[({"gate_up_lora", "down_lora"} - {which}).pop()] = None
        x = [layer["hidden_states"].clone().requires_grad_() for _ in range(2)]
        options = DROPOUT | {"transposed": transposed}
        got = ktlib.moe_experts(**(layer | {"hidden_states": x[0]}), **options)
        want = reference.moe_experts(**(layer | {"hidden_states": x[1]}), **options)
        gradient = torch.randn(want.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        got.backward(gradient)
        want.backward(gradient.double())
        assert relative_error(got.detach().double(), want.detach()) <= BOUNDS["output"]
        assert relative_error(x[0].grad.double(), x[1].grad.double()) <= BOUNDS["hidden_states"]


def test_long_batches_drop_by_the_slot_in_the_whole_batch():
    layer = random_layer("trained", tokens=4200, experts=8, top_k=7, hidden=64, intermediate=32, rank=2)
    layer["hidden_states"] = torch.randn(4200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_within(compare([layer], FAST, **DROPOUT))


def test_the_mean_of_many_draws_is_the_undropped_output():
    """LoRA on down alone: then the output is linear in the mask."""
    layer = random_layer("trained", tokens=40, experts=4, top_k=2, hidden=64, intermediate=48, rank=4)
    layer["hidden_states"], layer["gate_up_lora"] = layer["hidden_states"].float(), None
    lora_A, lora_B, _ = layer["down_lora"]
    layer["down_lora"] = (lora_A, lora_B, 20.0)  # most of the output comes from LoRA
    whole = ktlib.moe_experts(**layer).double()
    draws = torch.stack([ktlib.moe_experts(**layer, lora_dropout=0.4).double() for _ in range(400)])
    spread = draws.std(0) / len(draws) ** 0.5
    assert relative_error(draws[0], whole) > 0.2
    assert ((draws.mean(0) - whole).abs() / spread).max() < 6
    assert relative_error(draws.mean(0), whole) < 0.03


# ------------------------------------------------------------------------------------------------ the same bits


def assert_same(first, second):
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_parts_and_recompute_change_nothing(isa, transposed):
    layer = in_layout(random_layer("trained", tokens=700, experts=4, top_k=2, hidden=136, intermediate=80, rank=5),
                      transposed=transposed)  # fmt: skip
    options = {"isa": isa, "transposed": transposed} | DROPOUT
    before, results = torch.get_num_threads(), []
    try:
        for threads, more in ((1, {}), (2, {"parts": 2}), (5, {"recompute": True}), (5, {"parts": 3})):
            torch.set_num_threads(threads)
            results.append(evaluate(ktlib.moe_experts, layer, **options, **more))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree(isa):
    layer = random_layer("trained", tokens=64, experts=4, top_k=2, hidden=128, intermediate=96, rank=8)
    portable, other = (evaluate(ktlib.moe_experts, layer, isa=name, **DROPOUT) for name in ("portable", isa))
    assert all(relative_error(other[name], portable[name]) <= 0.0005 for name in QUANTITIES)


@pytest.mark.parametrize("isa", ISAS)
def test_no_dropout_is_no_dropout(isa):
    """p = 0 with or without a seed, a p too small to drop anything, and a layer without LoRA."""
    layer = random_layer("trained", tokens=150, experts=4, top_k=2, hidden=75, intermediate=41, rank=5)
    plain = evaluate(ktlib.moe_experts, layer, isa=isa)
    for options in ({"lora_dropout": 0.0}, {"lora_dropout": 0, "dropout_seed": 5}, {"lora_dropout": 1e-11}):
        assert_same(plain, evaluate(ktlib.moe_experts, layer, isa=isa, **options))
    assert not torch.equal(plain["output"], evaluate(ktlib.moe_experts, layer, isa=isa, **DROPOUT)["output"])
    bare = layer | {"gate_up_lora": None, "down_lora": None}
    assert torch.equal(ktlib.moe_experts(**bare, isa=isa), ktlib.moe_experts(**bare, isa=isa, **DROPOUT))


def test_only_what_is_asked_for():
    """A gradient computed alone has the bits that it has among all gradients: masks are made for each use."""
    layer = random_layer("trained", tokens=40, experts=4, top_k=2, hidden=96, intermediate=64, rank=4)
    full = evaluate(ktlib.moe_experts, layer, **DROPOUT)
    gradient = torch.randn(full["output"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for name in QUANTITIES[1:]:
        which, _, matrix = name.partition(" lora_")
        leaf = (layer[f"{which}_lora"]["AB".index(matrix)] if matrix else layer[name]).clone().requires_grad_()
        if matrix:
            other = list(layer[f"{which}_lora"])
            other["AB".index(matrix)] = leaf
        change = {f"{which}_lora": tuple(other)} if matrix else {name: leaf}
        ktlib.moe_experts(**(layer | change), **DROPOUT).backward(gradient)
        assert torch.equal(leaf.grad.double(), full[name]), name


# ------------------------------------------------------------------------------------------------ the seed


def test_a_matrix_that_is_no_number_reaches_the_routing_weights_through_dropped_elements():
    """0 * NaN in forward: the gradient is that of an output which is NaN, whatever was dropped."""
    layer = random_layer("trained", tokens=16, experts=2, top_k=1, hidden=24, intermediate=20, rank=2)
    lora_A, lora_B, scaling = layer["down_lora"]
    lora_A = lora_A.detach().clone()
    lora_A[0] = float("nan")  # of expert 0, in every column
    weights = layer["top_k_weights"].clone().requires_grad_()
    layer |= {"top_k_weights": weights, "down_lora": (lora_A, lora_B, scaling)}
    ktlib.moe_experts(**layer, lora_dropout=1 - 2**-20, dropout_seed=1).sum().backward()
    first = layer["top_k_index"] == 0
    assert first.any() and not first.all()
    assert weights.grad[first].isnan().all() and weights.grad[~first].isfinite().all()


def test_seeds():
    layer = random_layer("trained", tokens=20, experts=4, top_k=2, hidden=64, intermediate=48, rank=4)

    def output(**options):
        return ktlib.moe_experts(**layer, lora_dropout=0.3, **options)

    one = output(dropout_seed=1)
    assert torch.equal(one, output(dropout_seed=torch.tensor(1))) and not torch.equal(one, output(dropout_seed=2))
    assert not torch.equal(one, output(dropout_seed=1 + 2**32))
    torch.manual_seed(3)
    first, second = output(), output()
    torch.manual_seed(3)
    assert torch.equal(output(), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    ktlib.moe_experts(**layer)
    output(dropout_seed=1)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn without need"


def test_a_seed_that_changed_since_forward_is_noticed():
    layer = random_layer("trained", tokens=20, experts=4, top_k=2, hidden=64, intermediate=48, rank=4)
    seed, x = torch.tensor(5), layer["hidden_states"].clone().requires_grad_()
    output = ktlib.moe_experts(**(layer | {"hidden_states": x}), lora_dropout=0.3, dropout_seed=seed)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, CHECKPOINTING],
    ids=["again", "reentrant", "experts kept"],
)
def test_activation_checkpointing_draws_the_same_masks(options):
    layer = random_layer("trained", tokens=60, experts=4, top_k=2, hidden=64, intermediate=48, rank=4)

    def dropping(**arguments):
        return ktlib.moe_experts(**arguments, lora_dropout=0.3)

    def checkpointed(**arguments):
        leaves, rest = {n: arguments.pop(n) for n in ("hidden_states", "top_k_weights")}, arguments
        return checkpoint(
            lambda x, weights: dropping(hidden_states=x, top_k_weights=weights, **rest),
            *leaves.values(),
            **options,
        )

    results = []
    for function in (dropping, checkpointed):
        torch.manual_seed(4)
        results.append(evaluate(function, layer))
    assert_same(*results)


LINKED = pytest.mark.skipif(" " in torch.__file__, reason="torch gives the linker the path to itself without quotes")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=LINKED)])
def test_a_compiled_call_draws_anew(backend):
    """The seed is drawn when the graph runs: it is not a constant of the graph, and torch.manual_seed repeats it."""
    layer = random_layer("trained", tokens=20, experts=4, top_k=2, hidden=64, intermediate=48, rank=4)

    def dropping(x, ids, weights, gate_up_proj, down_proj, *lora):
        factors = (*lora[:2], 2.0), (*lora[2:], 2.0)
        return ktlib.moe_experts(x, ids, weights, gate_up_proj, down_proj, *factors, lora_dropout=0.3)

    torch._dynamo.reset()
    compiled = torch.compile(dropping, backend=backend, fullgraph=True)
    names = ("hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj")
    arguments = [layer[name] for name in names] + [t for n in ("gate_up_lora", "down_lora") for t in layer[n][:2]]
    x = arguments[0] = arguments[0].clone().requires_grad_()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        first, second = compiled(*arguments), compiled(*arguments)
        (gradient,) = torch.autograd.grad(first.float().sum(), x)
        results.append((first, second, gradient))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[0][1]) and not torch.equal(results[0][0], results[2][0])
    if backend == "aot_eager":
        torch.manual_seed(5)
        assert torch.equal(dropping(*arguments), results[0][0])
    torch._dynamo.reset()
