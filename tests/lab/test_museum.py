"""Every failure in the museum: the stand-in for the old design fails as in the log, and ktlib does not."""

import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.models import tiny_model, tokens
from torch.utils.checkpoint import checkpoint

import ktlib
from ktlib.diagnosis.audit import audit, component
from ktlib.lab import museum
from ktlib.lab.validation import random_layer
from ktlib.training import sft

SIZES = {"tokens": 12, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32, "rank": 8}


@pytest.fixture
def layer():
    return random_layer("trained", **SIZES)


def split(layer):
    layer = dict(layer)
    return layer.pop("hidden_states").float(), layer


# ---- 006


def test_006_old_cache_overflows_under_checkpointing(layer):
    x, layer = split(layer)
    old = museum.CachingExperts(layer, 3)
    with pytest.raises(RuntimeError, match="forward cache stack overflow: depth 3"):
        for _ in range(10):
            checkpoint(old, x.clone().requires_grad_(), use_reentrant=True).sum().backward()


def first_of_two(experts, x):
    first, second = x.clone().requires_grad_(), (3 * x).requires_grad_()
    output = experts(first)
    experts(second)
    output.sum().backward()
    return first.grad


def test_006_old_cache_gives_the_gradient_of_another_forward(layer):
    x, layer = split(layer)

    def right(x):
        return ktlib.moe_experts(x, **layer)

    want = torch.autograd.grad(right(x.requires_grad_()).sum(), x)[0]
    x = x.detach()
    assert (first_of_two(museum.CachingExperts(layer, 9), x) - want).norm() > 0.1 * want.norm()
    assert torch.equal(first_of_two(right, x), want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_006_ktlib_under_checkpointing_and_with_an_evaluation_between(layer, use_reentrant):
    x, layer = split(layer)

    def right(x):
        return ktlib.moe_experts(x, **layer)

    want = torch.autograd.grad(right(x.requires_grad_()).sum(), x)[0]
    for _ in range(12):
        leaf = x.detach().clone().requires_grad_()
        output = checkpoint(right, leaf, use_reentrant=use_reentrant)
        with torch.no_grad():
            right(5 * leaf)
        output.sum().backward()
        assert torch.equal(leaf.grad, want)


# ---- 007


def test_007a_old_config_loses_the_rank():
    assert museum.sliced(museum.SFTConfig(64, 2048, 1408, lora_rank=8)).lora_rank == 16
    assert 2 * 2048 * 8 == 32768 and 64 * 2048 * 8 == 1048576, "the log's offsets"


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_007a_ktlib_reads_the_rank_from_the_tensors(rank):
    layer = random_layer("trained", **SIZES | {"rank": rank})
    want = ktlib.moe_experts(**layer)
    exact = museum.reference.moe_experts(**layer)
    assert (want.double() - exact).norm() < 0.02 * exact.norm()
    other = random_layer("trained", **SIZES | {"rank": rank + 1})
    lora_A, _, scaling = layer["gate_up_lora"]
    with pytest.raises(ValueError, match="gate_up_lora lora_B: got shape"):
        ktlib.moe_experts(**layer | {"gate_up_lora": (lora_A, other["gate_up_lora"][1], scaling)})


def test_007b_old_kernel_crashes_with_its_index_in_range():
    outcome = museum.child("write_to_device_address")
    assert outcome.signal == "SIGSEGV"
    assert "max_valid_idx=1048576" in outcome.out and "in range: True" in outcome.out


def test_007b_007c_devices():
    """Weights on a second device are an error; adapters get their gradients on it, equal to those on the CPU."""
    outcome = museum.child("on_another_device")
    assert outcome.code == 0, outcome.err
    assert "attempting to assign a gradient with device type 'cpu'" in outcome.out
    assert "ValueError: down_proj: got a tensor on other, needs expert weights on the CPU" in outcome.out
    assert "5 of 5 results live" in outcome.out and "5 equal those of the CPU" in outcome.out


def test_007b_meta_tensors_never_reach_the_kernel(layer):
    for name in ("gate_up_proj", "down_proj"):
        with pytest.raises(ValueError, match=f"{name}: got a tensor on meta"):
            ktlib.moe_experts(**layer | {name: layer[name].to("meta")})
    lora_A, lora_B, scaling = layer["down_lora"]
    with pytest.raises(ValueError, match="down_lora lora_A: got a tensor on meta"):
        ktlib.moe_experts(**layer | {"down_lora": (lora_A.to("meta"), lora_B, scaling)})


def test_a_child_that_runs_out_of_time_is_ended():
    with pytest.raises(museum.subprocess.TimeoutExpired):
        museum.child("time.sleep", 60, timeout=0.5)


# ---- 009, 010a (008 is tests/integrations/test_trainer.py)

BATCH = torch.arange(24).reshape(2, 12)
PROJECTIONS = "q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj"


def old_lite(routed=math.nan, with_original=True, kt_rank=0):
    model = transformers.AutoModelForCausalLM.from_config(museum.lite_config(), dtype=torch.bfloat16)
    model.requires_grad_(False)
    for block in model.model.layers[1:]:
        block.mlp = museum.WrapperOfOriginal(block.mlp, 2, routed, kt_rank, with_original)
    model.config.model_type = "of transformers 4"
    return get_peft_model(model, LoraConfig(r=8, target_modules=rf".*\.({PROJECTIONS})"))


def step(model):
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    return audit(model)


def new_lite():
    model = transformers.AutoModelForCausalLM.from_config(museum.lite_config(), dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.set_experts_implementation("ktlib")
    return get_peft_model(model, ktlib.lora_config(model, r=8))


def test_009_old_wrapper_gives_the_table_of_the_log():
    report = step(old_lite())
    assert {row.component: row.nan for row in report.rows} == {
        "shared_experts": 312, "self_attn": 216, "dense_mlp": 6, "routed_experts": 0,
    }  # fmt: skip
    assert any("156 tensors are stored under two names" in problem for problem in report.problems)
    assert any(problem.startswith("routed_experts: 156 of 156 B matrices were never") for problem in report.problems)


def test_009_ktlib_adapts_each_module_once():
    report = step(new_lite())
    assert {row.component: row.tensors for row in report.rows} == {
        "shared_experts": 156, "self_attn": 216, "dense_mlp": 6, "routed_experts": 104,
    }  # fmt: skip
    assert sum(row.nan + row.inf + row.empty for row in report.rows) == 0
    assert not any("two names" in p or "architecture" in p for p in report.problems)


def test_010a_old_marker_sweeps_the_wrapper():
    model = old_lite(routed=0.0, with_original=False, kt_rank=8)
    wrappers = [module for module in model.modules() if isinstance(module, museum.WrapperOfOriginal)]
    for recurse, expected in ((False, (156, 378)), (True, (416, 222))):
        marked = {id(p) for wrapper in wrappers for p in wrapper.parameters(recurse=recurse)}
        still_bf16 = sum(id(p) in marked for p in model.parameters())
        upcast = sum(p.requires_grad and id(p) not in marked for p in model.parameters())
        assert (still_bf16, upcast) == expected


def test_010a_ktlib_an_upcast_changes_nothing():
    model = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    model = get_peft_model(model, ktlib.lora_config(model, r=4), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        before = model(tokens()).logits
        for name, parameter in model.named_parameters():
            if "lora_" in name and component(name) == "routed_experts":
                parameter.data = parameter.data.float()
        after = model(tokens()).logits
    assert torch.equal(before, after)
    assert audit(model)["routed_experts"].dtypes == {"float32": 4}


# ---- 010b


@pytest.fixture(scope="module")
def observed():
    _, tokenizer = sft.load_model("base")
    input_ids = tokenizer("The home of Bada is red.", return_tensors="pt").input_ids

    def load(lora_dtype):
        return sft.add_lora(sft.load_model("base")[0], "all", rank=8, lora_dtype=lora_dtype)

    return {suspect: museum.observe(suspect, load, input_ids) for suspect in museum.SUSPECTS}


@pytest.mark.parametrize("suspect", ["scale of A", "bf16 overflow", "upcast, read as bf16"])
def test_010b_refuted(observed, suspect):
    assert not observed[suspect]["first"]


def test_010b_only_the_stale_pointer_explains_everything(observed):
    assert all(observed["stale host pointer"].values())
    assert set(observed["stale host pointer"]) == set(museum.OBSERVATIONS)
    for suspect, seen in observed.items():
        assert suspect == "stale host pointer" or not all(seen.get(key) for key in museum.OBSERVATIONS)
    assert not observed["fp32, read as bf16"]["no cure"]
    assert not observed["uninitialised buffer"]["pointer"]


def test_010b_emptied_weights_are_an_error_or_a_crash_and_no_nan(observed):
    assert observed["zero-size base weights"] == {}
    assert museum.child("read_null").signal == "SIGSEGV"


@pytest.mark.parametrize("kind", ["log", "trained"])
@pytest.mark.parametrize("scale", [1, 1e3, 1e30])
def test_010b_with_b_zero_no_finite_a_changes_the_output(kind, scale):
    layer = random_layer(kind, **SIZES)
    zero = {}
    for name in ("gate_up_lora", "down_lora"):
        lora_A, lora_B, scaling = layer[name]
        zero[name] = (lora_A * scale, torch.zeros_like(lora_B), scaling)
    assert torch.equal(ktlib.moe_experts(**layer | zero), ktlib.moe_experts(**layer | dict.fromkeys(zero)))


def test_010b_the_heap_has_room_for_adapters_of_any_size():
    tensors = [torch.full((3, 2**20), 7.0), torch.ones(5)]
    heap = museum.Heap(tensors)
    placed = [heap.place(tensor) for tensor in tensors]
    assert all(map(torch.equal, placed, tensors))
    heap.free(placed[0])
    heap.place(torch.zeros(3, 2**20))
    assert not placed[0].any() and placed[1].all(), "a freed block is what the next one of its size gets"


def test_010b_ktlib_keeps_no_address(layer):
    """Adapters move and their old memory is overwritten with NaN, but the output has the same bits."""
    want = ktlib.moe_experts(**layer)
    heap = museum.Heap([m for name in ("gate_up_lora", "down_lora") for m in layer[name][:2]])
    placed = {name: [heap.place(m) for m in layer[name][:2]] for name in ("gate_up_lora", "down_lora")}
    here = {name: (*pair, layer[name][2]) for name, pair in placed.items()}
    assert torch.equal(ktlib.moe_experts(**layer | here), want)
    moved = {name: (*(m.clone() for m in pair), layer[name][2]) for name, pair in placed.items()}
    for pair in placed.values():
        for matrix in pair:
            heap.free(matrix)
    for _, size in list(heap.free_blocks):
        heap.place(torch.full((size // 4,), math.nan))
    assert placed["down_lora"][0].isnan().any(), "the old memory holds others' values now"
    assert torch.equal(ktlib.moe_experts(**layer | moved), want)
