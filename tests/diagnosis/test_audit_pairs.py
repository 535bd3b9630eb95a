"""The adapter audit: what the values of LoRA pairs say about training, and every layout that holds pairs."""

import weakref

import pytest
import torch
from safetensors.torch import save_file
from support.audits import COUNTS, filled, rewrite_config, without_expert

from ktlib.diagnosis import lora_pairs
from ktlib.diagnosis.audit import audit


def test_trained_adapter_is_clean(adapter):
    result = audit(filled(adapter))
    assert result.clean and result.notes == []
    assert {layer for layer, _ in result.layers} == set(range(27)) and not result.flagged.total()
    assert sum(cell.tensors for cell in result.layers.values()) == sum(COUNTS.values())
    assert result.layers[0, "dense_mlp"].tensors == 6 and (0, "routed_experts") not in result.layers


def test_new_adapter_is_noted_and_a_failure_if_it_was_trained(saved, adapter):
    assert audit(saved).notes == ["every B is zero: a new adapter, never trained"]
    problem = "self_attn: 108 of 108 B matrices were never updated"
    assert any(p.startswith(problem) for p in audit(saved, trained=True).problems)
    (adapter / "trainer_state.json").write_text('{"global_step": 40}')
    assert any(p.startswith(problem) for p in audit(adapter).problems)


def test_never_updated_component(adapter):
    result = audit(filled(adapter, layers__5__mlp__shared_experts__up_proj__lora_B=torch.zeros_like))
    assert [p.split(", as")[0] for p in result.problems] == ["shared_experts: 1 of 78 B matrices were never updated"]
    assert result.flagged == {(5, "shared_experts"): 1}


def test_experts_without_tokens(adapter):
    """Only an expert whose two pairs are both untouched got no token."""
    result = audit(filled(adapter, layers__7__mlp__experts=lambda t: t))
    assert result.notes == []
    result = audit(filled(adapter, layers__7__mlp__experts__lora_B=without_expert(2)))
    assert result.notes == []
    both = {"layers__7__mlp__experts__lora_B": without_expert(2)}
    both |= {"layers__7__mlp__experts__base_layer__lora_B": without_expert(2)}
    result = audit(filled(adapter, **both))
    assert result.clean
    assert result.notes == ["routed_experts: 1 experts in 1 layers never received a token, as 2 in layer 7"]


@pytest.mark.parametrize("part", ["layers__3__self_attn__o_proj", "layers__3__mlp__experts__base_layer"])
def test_product_beyond_bf16(adapter, part):
    large = filled(adapter, **{f"{part}__lora_A": lambda t: t * 0 + 1e25, f"{part}__lora_B": lambda t: t * 0 + 1e20})
    result = audit(large)
    assert len(result.problems) == 1 and "A and B are finite" in result.problems[0]
    assert result.flagged.total() == 1 and [layer for layer, _ in result.flagged if result.flagged[layer, _]] == [3]
    fine = filled(adapter, **{f"{part}__lora_A": lambda t: t * 0 + 1e18, f"{part}__lora_B": lambda t: t * 0 + 1e18})
    assert audit(fine).clean, "1e18 * 1e18 * rank * scaling stays below 3.4e38"


def test_the_bound_does_not_decide_alone(adapter):
    """Where the bound says maybe, the product is built: A and B of disjoint supports multiply to zero."""

    def half(rows):
        def change(t):
            t = torch.zeros_like(t)
            (t[:4] if rows else t[:, 4:]).fill_(1e25)
            return t

        return change

    part = "layers__3__self_attn__o_proj"
    assert audit(filled(adapter, **{f"{part}__lora_A": half(True), f"{part}__lora_B": half(False)})).clean


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"lora_alpha": 64}])
def test_the_scaling_counts(adapter, changes):
    """A product of 1e38 is within bf16 with scaling 16 / 8, and beyond it with 16 / sqrt(8) or 64 / 8."""
    part = "layers__3__self_attn__o_proj"
    filled(adapter, **{f"{part}__lora_A": lambda t: t * 0 + 1e18, f"{part}__lora_B": lambda t: t * 0 + 1e20 / 8})
    assert audit(adapter).clean
    rewrite_config(adapter, **changes)
    assert [problem.split(":")[0] for problem in audit(adapter).problems] == ["self_attn"]


def test_the_a_of_one_expert_and_the_b_of_another_do_not_meet(adapter):
    def a_of_expert_0(t):
        t.zero_()[:8] = 1e25
        return t

    def b_of_expert_1(t):
        t.zero_().view(t.shape[0], 8, 4)[:, :, 1] = 1e20
        return t

    part = "layers__3__mlp__experts__base_layer"
    assert audit(filled(adapter, **{f"{part}__lora_A": a_of_expert_0, f"{part}__lora_B": b_of_expert_1})).clean


@pytest.mark.parametrize("pattern", ["down_proj", r"experts\.down_proj"])
def test_the_alpha_of_a_weight_counts(adapter, pattern):
    part = "layers__3__mlp__experts__lora"
    filled(adapter, **{f"{part}_A": lambda t: t * 0 + 1, f"{part}_B": lambda t: t * 0 + 100})
    assert audit(adapter).clean
    rewrite_config(adapter, alpha_pattern={pattern: 1e38})
    assert len(audit(adapter).problems) == 1 and "layers.3.mlp.experts.lora_A" in audit(adapter).problems[0]
    rewrite_config(adapter, alpha_pattern={r"experts\.gate_up_proj": 1e38})
    assert not any("layers.3.mlp.experts.lora_A" in problem for problem in audit(adapter).problems)
    rewrite_config(adapter, alpha_pattern={}, lora_alpha=0)
    assert audit(adapter).clean


def test_experts_of_unknown_rank_are_not_looked_at_one_by_one(adapter):
    assert audit(filled(adapter)).notes == []
    rewrite_config(adapter, r=None)
    assert audit(adapter).notes == ["experts were not looked at one by one: the adapter's rank is not known"]


@pytest.mark.parametrize(
    "a, b", [((8, 6), (16, 4)), ((8, 6), (2, 16, 8)), ((3, 8, 6), (2, 16, 8)), ((8,), (8,)), ((8, 6), (8,)), ((), ())]
)
def test_pairs_that_do_not_multiply_are_problems(tmp_path, a, b):
    stem = "layers.0.mlp.up_proj.lora_"
    save_file({f"{stem}A.weight": torch.ones(a), f"{stem}B.weight": torch.ones(b)}, tmp_path / "x.safetensors")
    report = audit(tmp_path)
    assert report.problems == [f"dense_mlp: {stem}A.weight: A {a} and B {b} do not multiply"]
    assert report.flagged == {(0, "dense_mlp"): 1}


def test_an_empty_matrix_of_a_pair_is_one_problem(tmp_path):
    stem = "layers.0.mlp.up_proj.lora_"
    save_file({f"{stem}A.weight": torch.ones(8, 0), f"{stem}B.weight": torch.ones(6, 8)}, tmp_path / "x.safetensors")
    assert audit(tmp_path).problems == ["dense_mlp: 1 of 2 tensors are empty"]


def test_one_module_per_expert(tmp_path):
    """transformers 4: an expert without tokens is a note, a layer without any update a problem."""
    tensors = {}
    for layer in (1, 2):
        for expert in range(4):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}"
                tensors[f"{stem}.lora_A.weight"] = torch.ones(2, 8)
                tensors[f"{stem}.lora_B.weight"] = torch.full((8, 2), float(expert != 3 and layer == 1))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    result = audit(tmp_path)
    assert result["routed_experts"].tensors == 48
    assert result.notes == ["routed_experts: 1 experts in 1 layers never received a token, as 3 in layer 1"]
    assert [p.split(", as")[0] for p in result.problems] == ["routed_experts: 12 of 24 B matrices were never updated"]
    assert result.flagged[2, "routed_experts"] == 12 and result.flagged[1, "routed_experts"] == 0


def test_one_tensor_per_projection(tmp_path):
    """As KTransformers writes them, beside the adapter of the other modules."""
    e, r, h, i = 4, 2, 8, 6
    tensors = {}
    for projection, inner, outer in (("gate", h, i), ("up", h, i), ("down", i, h)):
        tensors[f"layers.1.experts.{projection}_lora_a"] = torch.ones(e, r, inner)
        tensors[f"layers.1.experts.{projection}_lora_b"] = torch.ones(e, outer, r)
        tensors[f"layers.1.experts.{projection}_lora_b"][1] = 0
    save_file(tensors, tmp_path / "fused_expert_lora.safetensors")
    attention = {f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(attention, tmp_path / "adapter_model.safetensors")
    result = audit(tmp_path)
    assert result.clean and {row.component: row.tensors for row in result.rows} == {
        "self_attn": 2, "routed_experts": 6,
    }  # fmt: skip
    assert result.notes == ["routed_experts: 1 experts in 1 layers never received a token, as 1 in layer 1"]
    tensors["layers.1.experts.up_lora_b"][2, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "fused_expert_lora.safetensors")
    assert audit(tmp_path).problems == ["routed_experts: 1 of 6 tensors contain NaN"]


def test_memory_is_that_of_one_pair(tmp_path):
    """Tensors are read one pair at a time: the references die before the next one is read."""
    tensors = {f"layers.{n}.self_attn.q_proj.lora_{x}.weight": torch.ones(4, 4) for n in range(5) for x in "AB"}
    save_file(tensors, tmp_path / "x.safetensors")
    alive, most, add = [], [], lora_pairs.Pairs.add

    def counting(self, name, a, b, *rest):
        alive.extend(map(weakref.ref, (a, b)))
        most.append(sum(ref() is not None for ref in alive))
        return add(self, name, a, b, *rest)

    lora_pairs.Pairs.add = counting
    try:
        audit(tmp_path)
    finally:
        lora_pairs.Pairs.add = add
    assert len(most) == 5 and max(most) == 2
