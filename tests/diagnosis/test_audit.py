"""The adapter audit: counts per component from the architecture, every kind of bad value, bad files."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import tiny_config, tiny_model

import ktlib
from ktlib.diagnosis import lora_pairs
from ktlib.diagnosis.audit import audit, component, expected_adapter_counts
from ktlib.integrations.peft_lora import lora_config

# DeepSeek-V2-Lite's structure: 27 layers, the first dense; q, kv_a, kv_b, o in attention; shared experts.
LITE = {"num_hidden_layers": 27, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
LITE |= {"num_attention_heads": 1, "num_key_value_heads": 1, "n_routed_experts": 4, "kv_lora_rank": 8}
COUNTS = {"self_attn": 27 * 4 * 2, "shared_experts": 26 * 3 * 2, "routed_experts": 26 * 2 * 2, "dense_mlp": 3 * 2}


@pytest.fixture(scope="module")
def lite():
    model = tiny_model("deepseek_v2", "ktlib", **LITE)
    return get_peft_model(model, lora_config(model, r=8))


@pytest.fixture(scope="module")
def saved(lite, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    lite.save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def change(adapter, name, value):
    """Set the first element of the tensors whose name contains ``name``; return how many there are."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = [key for key in tensors if name in key]
    for key in names:
        tensors[key].view(-1)[0] = value
    save_file(tensors, file)
    return len(names)


def test_counts_of_deepseek_v2_lite(lite, saved):
    assert COUNTS == {"self_attn": 216, "shared_experts": 156, "routed_experts": 104, "dense_mlp": 6}
    config = lite.peft_config["default"]
    assert expected_adapter_counts(tiny_config("deepseek_v2", **LITE), config) == COUNTS
    projections = expected_adapter_counts(lite.get_base_model(), config, layout="per_projection")
    assert projections == {**COUNTS, "routed_experts": 156}
    assert sum(projections.values()) - projections["routed_experts"] == 216 + 156 + 6
    for result in (audit(lite), audit(saved), audit(saved, tiny_config("deepseek_v2", **LITE))):
        assert {row.component: row.tensors for row in result.rows} == COUNTS
        assert result.clean and result["router"].tensors == 0


def test_new_adapter(lite, saved):
    result = audit(saved)
    routed = result["routed_experts"]
    assert routed.parameters == 26 * 4 * 8 * (16 + 16 + 8 + 16)
    assert routed.zero == 104 // 2, "lora_B starts as zero"
    assert routed.dtypes == {"float32": 104}
    weights = [p.abs().max() for name, p in lite.named_parameters() if "lora_A" in name and ".experts." in name]
    assert routed.max_abs == max(weights).item()
    assert "routed_experts" in str(result) and str(result).endswith("clean")
    assert result.table().splitlines()[0].split() == [
        "component",
        *"tensors parameters NaN Inf zero max |x| dtype".split(),
    ]


@pytest.mark.parametrize("value, kind", [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "inf")])
@pytest.mark.parametrize("part, name", [("dense_mlp", "layers.0.mlp"), ("shared_experts", "shared_experts.up_proj")])
def test_finds_every_bad_tensor(adapter, value, kind, part, name):
    count = change(adapter, name, value)
    result = audit(adapter)
    assert not result.clean
    assert {row.component: getattr(row, kind) for row in result.rows if getattr(row, kind)} == {part: count}
    other = {"nan": "inf", "inf": "nan"}[kind]
    assert sum(getattr(row, other) for row in result.rows) == 0
    assert result[part].max_abs == (
        float("inf") if kind == "inf" else result[part].max_abs < 1 and result[part].max_abs
    )
    assert f"{part}: {count} of {COUNTS[part]} tensors contain" in str(result)


def test_bf16_and_eight_bit_tensors(tmp_path):
    tensors = {
        "layers.1.mlp.experts.lora_A.weight": torch.full((2, 2), -3.0, dtype=torch.bfloat16),
        "layers.1.mlp.gate.weight": torch.tensor([-12.0, float("nan")]).to(torch.float8_e4m3fn),
        "layers.1.mlp.gate.steps": torch.tensor([7]),
        "layers.1.mlp.gate.counts": torch.tensor([7, 12], dtype=torch.uint16),
        "layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "layers.0.mlp.up_proj.lora_B.weight": torch.ones(2, 2, dtype=torch.uint32),
        "lm_head.mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    result = audit(tmp_path / "x.safetensors")
    assert result["routed_experts"].dtypes == {"bfloat16": 1} and result["routed_experts"].max_abs == 3
    assert result["router"].nan == 1 and result["router"].max_abs == 12 and result["other"].max_abs == 1
    assert result["router"].dtypes["uint16"] == 1 and result["dense_mlp"].max_abs == 1


def test_missing_and_surplus_tensors_are_problems(adapter, lite):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    dropped = next(name for name in tensors if ".experts." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, file)
    report = audit(adapter)
    assert len(report.problems) == 1 and "has no partner" in report.problems[0] and report.flagged.total() == 1
    result = audit(adapter, lite.get_base_model())
    assert result.problems[1:] == ["routed_experts: missing (1), as lora_A of model.layers.1.mlp.experts.gate_up_proj"]
    assert result.flagged == {(1, "routed_experts"): 2}


def renamed(change):
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def narrowed(tensors):
    return {k: v[:, :-1].contiguous() if ".q_proj.lora_A." in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "change, base, problems",
    [
        (renamed(lambda name: name.replace("model.layers", "model.language_model.layers")), {}, 8),
        (renamed(lambda name: name.replace("model.model.", "model.model.model.")), {}, 8),
        (renamed(lambda name: name.replace("model.model.", "model.")), {}, 8),
        (renamed(lambda name: f"module.{name}"), {}, 8),
        (renamed(lambda name: name.removeprefix("base_model.model.")), {}, 4),
        (renamed(lambda name: name.replace("layers.1.", "layers.28.")), {}, 6),
        (narrowed, {}, 1),
        (dict, {"hidden_size": 24}, 4),
        (dict, {"moe_intermediate_size": 12}, 2),
        (dict, {"n_routed_experts": 8}, 1),
    ],
)
def test_names_and_widths_of_another_model_are_problems_though_counts_agree(adapter, change, base, problems):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    config = tiny_config("deepseek_v2", **(LITE | base))
    assert {row.component: row.tensors for row in audit(adapter).rows} == expected_adapter_counts(
        config, json.loads((adapter / "adapter_config.json").read_text())
    )
    report = audit(adapter, config)
    assert len(report.problems) == problems and sum(map(len, report.problems)) < 1000 * problems
    assert all(re.match(r"\w+: (missing|extra|wrong shape) \(\d+\), as ", problem) for problem in report.problems)
    assert report.flagged.total() >= problems


def test_a_problem_of_names_says_how_many_and_the_first(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(narrowed(load_file(file)), file)
    (problem,) = audit(adapter, tiny_config("deepseek_v2", **LITE)).problems
    first = "model.layers.0.self_attn.q_proj.weight has lora_A (8, 15) and lora_B (24, 8), needs (8, 16) and (24, 8)"
    assert problem.startswith(f"self_attn: wrong shape (27), as {first} at rank 8; model.layers.1.")
    assert problem.count("needs") == 3 and problem.endswith(" ...")


@pytest.mark.parametrize("layout", ["per_expert", "ktransformers"])
def test_other_layouts_are_compared_with_the_base_model_too(layout, tmp_path):
    model, config = tiny_model("qwen3_moe"), tiny_config("qwen3_moe")
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path / "peft")
    ktlib.export_adapter(tmp_path / "peft", tmp_path / "other", config, layout)
    assert audit(tmp_path / "other", config).clean
    (problem,) = audit(tmp_path / "other", tiny_config("qwen3_moe", num_experts=4)).problems[:1]
    assert problem.startswith("routed_experts: ")


def test_empty_tensors_are_problems(tmp_path):
    save_file({"layers.0.mlp.up_proj.lora_A.weight": torch.empty(8, 0)}, tmp_path / "x.safetensors")
    assert audit(tmp_path).problems[1:] == ["dense_mlp: 1 of 1 tensors are empty"]


def test_a_file_without_tensors_is_a_problem(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    assert audit(tmp_path).problems == ["no tensors"]


def test_the_base_model_beside_an_adapter_is_not_counted(adapter, saved):
    save_file({"model.layers.0.mlp.gate.weight": torch.full((2, 2), float("nan"))}, adapter / "model.safetensors")
    assert audit(adapter).table() == audit(saved).table()


def test_settings_of_other_adapters_are_not_lora(adapter, saved):
    """AdaLoRA keeps which ranks are left in rank_pattern, OFT has r = 0."""
    rewrite_config(adapter, peft_type="ADALORA", rank_pattern={"q_proj.lora_E": [True, False]})
    assert audit(adapter).table() == audit(saved).table()


def test_excluded_modules_are_not_expected(lite):
    config = lite.peft_config["default"].to_dict() | {"exclude_modules": ["q_proj"]}
    assert expected_adapter_counts(lite, config) == {**COUNTS, "self_attn": 27 * 3 * 2}


@pytest.mark.parametrize(
    "name, label",
    [
        ("base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight", "routed_experts"),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", "shared_experts"),
        ("model.layers.3.mlp.shared_expert.gate_proj.weight", "shared_experts"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate_proj", "dense_mlp"),
        ("model.layers.3.self_attn.q_proj", "self_attn"),
        ("model.layers.3.feed_forward.router.weight", "router"),
        ("model.embed_tokens.weight", "other"),
        ("lm_head", "other"),
    ],
)
def test_components(name, label):
    assert component(name) == label


def test_bad_inputs(adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        audit(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no .*safetensors"):
        audit(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="adapter_model.bin: pickled"):
        audit(tmp_path)
    with pytest.raises(ValueError, match="adapter_model.bin: pickled"):
        audit(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="needed a .safetensors file"):
        audit(adapter / "adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="adapter_model.safetensors: damaged"):
            audit(adapter)
    file.write_bytes(content)
    for changes, message in (
        ({"target_modules": "(q_proj"}, r"target_modules is '\(q_proj', needs a list of names or a regular"),
        ({"target_modules": 7}, "target_modules is 7, needs a list of names or a regular"),
        ({"target_modules": None, "target_parameters": None}, "needs target_modules or target_parameters to compare"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*, needs a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*, needs regular expressions, each with a number >= 1"),
    ):
        settings = (adapter / "adapter_config.json").read_text()
        rewrite_config(adapter, **changes)
        with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
            audit(adapter, tiny_config("deepseek_v2", **LITE))
        (adapter / "adapter_config.json").write_text(settings)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="no .*adapter_config.json"):
        audit(adapter, tiny_config("deepseek_v2", **LITE))


def test_bad_arguments(lite):
    with pytest.raises(ValueError, match="layout: got 'packed'"):
        expected_adapter_counts(lite, lite.peft_config["default"], layout="packed")
    with pytest.raises(ValueError, match="layers_to_transform is not supported"):
        expected_adapter_counts(lite, {"target_modules": ["q_proj"], "layers_to_transform": [1]})
    with pytest.raises(ValueError, match="config: target_modules is 7, needs a list"):
        expected_adapter_counts(lite, {"target_modules": 7})
    with pytest.raises(ValueError, match="config: needs target_modules or target_parameters"):
        expected_adapter_counts(lite, {})
    with pytest.raises(KeyError, match="'experts' is no component"):
        audit(lite)["experts"]


def test_config_as_read_from_json(lite, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert expected_adapter_counts(lite, config) == COUNTS


def test_audit_of_a_reloaded_adapter(saved):
    model = PeftModel.from_pretrained(tiny_model("deepseek_v2", "ktlib", **LITE), saved)
    assert {row.component: row.tensors for row in audit(model).rows} == COUNTS


# ---- what the values of a pair say ---------------------------------------------------------------------------------


def filled(adapter, **changes):
    """Write random values into every B of the saved adapter, as training would, then ``name -> function`` changes."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for number, name in enumerate(sorted(tensors)):
        if "lora_B" in name:
            tensors[name].normal_(std=0.01, generator=torch.Generator().manual_seed(number))
    for part, change in changes.items():
        for name in tensors:
            if part.replace("__", ".") in name:
                tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)
    return adapter


def without_expert(expert, experts=4):
    def change(b):
        b.view(b.shape[0], -1, experts)[:, :, expert] = 0
        return b

    return change


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


def test_the_text_is_the_same_whatever_the_hash_seed(tmp_path):
    """Lines come in the order of components: that of a set of names would change from process to process."""
    modules = ("self_attn.q_proj", "linear_attn.in_proj", "mlp.up_proj", "mlp.shared_experts.up_proj", "norm")
    names = [f"model.layers.{layer}.{module}.lora_{x}.weight" for layer in range(3) for module in modules for x in "AB"]
    save_file({name: torch.full((2, 2), float("lora_A" in name)) for name in names}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", f"import ktlib; print(ktlib.audit({str(tmp_path)!r}, trained=True))"]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("0", "1")]
    first, second = (subprocess.check_output(command, env=environment, text=True) for environment in environments)
    assert first == second and first.count("were never updated") == 4


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


def rewrite_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


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


def test_shards(adapter, saved):
    tensors = list(load_file(adapter / "adapter_model.safetensors").items())
    (adapter / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = len(tensors) // 2 + 1  # a pair's A and B lie in different files
    save_file(dict(tensors[:half]), adapter / names[0])
    save_file(dict(tensors[half:]), adapter / names[1])
    index = {name: names[i >= half] for i, (name, _) in enumerate(tensors)}
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert audit(adapter).table() == audit(saved).table()
    (adapter / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    assert audit(adapter).table() == audit(saved).table(), "PEFT loads the one file, not those of the index beside it"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match="lacks adapter_model-00002"):
        audit(adapter)


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


def test_figure(adapter):
    import matplotlib

    matplotlib.use("Agg")
    change(filled(adapter), "layers.4.self_attn.q_proj", float("nan"))
    ax = audit(adapter).plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "self_attn",
        "shared_experts",
        "routed_experts",
        "dense_mlp",
    ]
    assert [text.get_text() for text in ax.texts] == ["2"] and len(ax.patches) == 27 + 26 + 26 + 1
    matplotlib.pyplot.close(ax.figure)
