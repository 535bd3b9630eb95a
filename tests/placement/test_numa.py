"""Row blocks of the weights on NUMA nodes, and recomputation: neither of them changes a bit of a result."""

import re
from types import SimpleNamespace

import pytest
import torch
from support.models import expert_modules, tiny_model, tokens

import ktlib
from ktlib.lab.validation import random_layer
from ktlib.placement import numa

ISAS = [name for name, missing in ktlib.cpu_info()["isas"].items() if not missing]
LAYOUTS = [{}, {"interleaved": True}, {"transposed": True}]


def results(layer, **options):
    """Output and all gradients of a call of the operator."""
    layer = dict(layer)
    for name in ("hidden_states", "top_k_weights"):
        layer[name] = layer[name].clone().requires_grad_()
    for name in ("gate_up_lora", "down_lora"):
        layer[name] = (*(t.clone().requires_grad_() for t in layer[name][:2]), layer[name][2])
    output = ktlib.moe_experts(**layer, **options)
    wrt = (layer["hidden_states"], layer["top_k_weights"], *layer["gate_up_lora"][:2], *layer["down_lora"][:2])
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    return output, *torch.autograd.grad(output, wrt, gradient)


def stored(layer, options):
    names = ("gate_up_proj", "down_proj") if options.get("transposed") else ()
    return layer | {name: layer[name].transpose(1, 2).contiguous() for name in names}


@pytest.fixture(scope="module")
def layer():
    return random_layer("trained", tokens=150, experts=5, top_k=2, hidden=200, intermediate=136, rank=3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("change", [{"recompute": True}, *({"parts": n} for n in (2, 3, 7, 500))], ids=str)
def test_not_a_bit_changes(layer, isa, options, change):
    layer = stored(layer, options)
    want = results(layer, isa=isa, **options)
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = results(layer, isa=isa, **options, **change)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("biases", [False, True])
def test_recomputation_saves_arguments_only(layer, biases):
    """With recomputation autograd saves nothing but the arguments, and gradients of weights are the same bits."""
    layer = dict(layer)
    if biases:
        layer |= {"gate_up_bias": torch.randn(5, 272), "down_bias": torch.randn(5, 200)}
    layer["gate_up_proj"] = layer["gate_up_proj"].clone().requires_grad_()
    saved_bytes, gradients = {}, {}
    for recompute in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            output = ktlib.moe_experts(**layer, recompute=recompute)
        arguments = {t.data_ptr() for t in layer.values() if isinstance(t, torch.Tensor)}
        arguments |= {t.data_ptr() for name in ("gate_up_lora", "down_lora") for t in layer[name][:2]}
        saved_bytes[recompute] = sum(t.nbytes for t in saved if t.data_ptr() not in arguments)
        (gradients[recompute],) = torch.autograd.grad(output.sum(), layer["gate_up_proj"])
    slots, inter, rank = 300, 136, 3
    assert saved_bytes == {False: 2 * slots * (2 * inter + 4 * rank), True: 0}
    assert torch.equal(gradients[False], gradients[True])


@pytest.mark.parametrize("parts, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_wrong_parts(layer, parts, error):
    with pytest.raises(error, match="parts: got"):
        ktlib.moe_experts(**layer, parts=parts)
    with pytest.raises(error, match="parts: got"):
        ktlib.place_experts(tiny_model("qwen3_moe", "ktlib"), parts)


def test_row_blocks_are_those_of_the_operator():
    """csrc/layer/forward_in_place.cpp: row r of n is in row block r * parts / n."""
    for size in (1, 5, 64, 1408):
        for parts in (1, 2, 3, 7, 100):
            slices = numa.row_blocks(size, parts)
            assert [r * parts // size for r in range(size)] == [
                number for number, rows in enumerate(slices) for _ in range(rows.start, rows.stop)
            ]


def test_nodes_are_those_with_memory_that_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(numa, "NODES_WITH_MEMORY", tmp_path / "has_memory")
    monkeypatch.setattr(numa, "PROCESS_STATUS", tmp_path / "status")
    assert numa.numa_nodes() == [0]
    for text, allowed, nodes in (
        ("0\n", "0", [0]),
        ("0-1\n", "0-1", [0, 1]),
        ("0-1\n", "0", [0]),
        ("0,2-4,8\n", "0-63", [0, 2, 3, 4, 8]),
        ("0,2-4,8-11\n", "3-8,10", [3, 4, 8, 10]),
    ):
        numa.NODES_WITH_MEMORY.write_text(text)
        numa.PROCESS_STATUS.write_text(
            f"Name:\tpython\nMems_allowed:\t00000000,00000001\nMems_allowed_list:\t{allowed}\n"
        )
        assert numa.numa_nodes() == nodes
    numa.PROCESS_STATUS.write_text("Name:\tpython\n")
    assert numa.numa_nodes() == [0, 2, 3, 4, 8, 9, 10, 11]


def policies(tensor):
    """The memory policies, as the kernel reports them, of this process's mappings that overlap the tensor."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    starts = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(a, 16) for a in re.match(r"(\w+)-(\w+)", line).groups())
            if first < end and last > begin:
                starts.append(first)
    with open("/proc/self/numa_maps") as lines:
        found = dict(line.split()[:2] for line in lines)
    return {policy for start, policy in found.items() if int(start, 16) in starts}


def test_pages_are_placed_and_the_model_computes_the_same():
    model = tiny_model("deepseek_v2", "ktlib", hidden_size=256, moe_intermediate_size=256)
    want = model(tokens()).logits
    try:
        assert ktlib.place_experts(model, parts=2) is model
    except RuntimeError as error:
        pytest.skip(f"this system does not let a process place memory: {error}")
    module = next(iter(expert_modules(model).values()))
    assert module.ktlib_parts == 2
    assert f"prefer:{numa.numa_nodes()[0]}" in policies(module.gate_up_proj)
    assert torch.equal(model(tokens()).logits, want)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="Linear has no submodule with routed experts"):
        ktlib.place_experts(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="transposed"):
        ktlib.place_experts(tiny_model("gpt_oss", "ktlib"))
    placed = []
    with monkeypatch.context() as patch:
        patch.setattr(numa, "_kernels", SimpleNamespace(place_pages=lambda *arguments: placed.append(arguments)))
        model = tiny_model("qwen3_moe", "ktlib")
        list(expert_modules(model).values())[-1].to("meta")
        with pytest.raises(ValueError, match="gate_up_proj is on meta, needs expert weights on the CPU"):
            ktlib.place_experts(model)
    assert placed == []
    monkeypatch.setattr(numa, "numa_nodes", lambda: [1000])
    with pytest.raises(RuntimeError, match="NUMA node 1000: "):
        ktlib.place_experts(tiny_model("qwen3_moe", "ktlib"))
