"""The adapter audit: counts per component from the architecture, every kind of bad value, bad files."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.audits import COUNTS, LITE, filled, rewrite_config, set_first_value
from support.models import tiny_config, tiny_model

import ktlib
from ktlib.diagnosis.audit import audit, component, expected_adapter_counts
from ktlib.integrations.peft_lora import lora_config


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
    count = set_first_value(adapter, name, value)
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
        "layers.0.mlp.shared_experts.scale": torch.tensor([130, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "lm_head.mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    result = audit(tmp_path / "x.safetensors")
    assert result["routed_experts"].dtypes == {"bfloat16": 1} and result["routed_experts"].max_abs == 3
    assert result["router"].nan == 1 and result["router"].max_abs == 12 and result["other"].max_abs == 1
    assert result["router"].dtypes["uint16"] == 1 and result["dense_mlp"].max_abs == 1
    assert result["shared_experts"].nan == 1 and result["shared_experts"].max_abs == 8


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
    found = [problem for problem in report.problems if not problem.startswith("no LoRA pair fits DeepseekV2")]
    assert len(found) == problems and sum(map(len, found)) < 1000 * problems
    assert all(re.match(r"\w+: (missing|extra|wrong shape) \(\d+\), as ", problem) for problem in found)
    assert (len(found) < len(report.problems)) == (problems == 8), "where no pair has the name of a module"
    assert report.flagged.total() >= problems


def test_a_problem_of_names_says_how_many_and_the_first(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(narrowed(load_file(file)), file)
    (problem,) = audit(adapter, tiny_config("deepseek_v2", **LITE)).problems
    first = "model.layers.0.self_attn.q_proj.weight has lora_A (8, 15) and lora_B (24, 8), needs (8, 16) and (24, 8)"
    assert problem.startswith(f"self_attn: wrong shape (27), as {first} at rank 8; model.layers.1.")
    assert problem.count("needs") == 3 and problem.endswith(" ...")


def test_an_adapter_of_another_model_is_called_that_with_the_model_it_names(tmp_path):
    model = tiny_model("qwen3_moe")
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path)
    rewrite_config(tmp_path, base_model_name_or_path="Qwen/Qwen3-30B-A3B")
    first, *others = audit(tmp_path, tiny_config("deepseek_v2", hidden_size=32)).problems
    assert first == (
        "no LoRA pair fits DeepseekV2ForCausalLM: an adapter of another model; base_model_name_or_path in "
        "adapter_config.json is 'Qwen/Qwen3-30B-A3B'"
    )
    assert {problem.split(" (")[0] for problem in others} >= {"self_attn: extra", "routed_experts: wrong shape"}


def test_an_adapter_with_names_of_another_class_is_told_from_one_of_another_model(adapter, tmp_path):
    file, config = adapter / "adapter_model.safetensors", tiny_config("deepseek_v2", **LITE)
    save_file(renamed(lambda name: name.replace("model.layers", "model.language_model.layers"))(load_file(file)), file)
    assert audit(adapter, config).problems[0] == (
        "no LoRA pair fits DeepseekV2ForCausalLM: names are those of another class of the model; "
        "ktlib.import_adapter rewrites them"
    )
    assert audit(ktlib.import_adapter(adapter, tmp_path / "rewritten", config), config).clean


def test_every_tensor_beside_the_pairs_is_compared_too(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"step": torch.ones(1)}, file)
    rewrite_config(adapter, modules_to_save=["lm_head"])
    assert audit(adapter, tiny_config("deepseek_v2", **LITE)).problems == [
        "other: missing (1), as lm_head.weight of modules_to_save",
        "other: extra (1), as step is not in the base model",
    ]


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


def test_the_text_is_the_same_whatever_the_hash_seed(tmp_path):
    """Lines come in the order of components: that of a set of names would change from process to process."""
    modules = ("self_attn.q_proj", "linear_attn.in_proj", "mlp.up_proj", "mlp.shared_experts.up_proj", "norm")
    names = [f"model.layers.{layer}.{module}.lora_{x}.weight" for layer in range(3) for module in modules for x in "AB"]
    save_file({name: torch.full((2, 2), float("lora_A" in name)) for name in names}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", f"import ktlib; print(ktlib.audit({str(tmp_path)!r}, trained=True))"]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("0", "1")]
    first, second = (subprocess.check_output(command, env=environment, text=True) for environment in environments)
    assert first == second and first.count("were never updated") == 4


def test_figure(adapter):
    import matplotlib

    matplotlib.use("Agg")
    set_first_value(filled(adapter), "layers.4.self_attn.q_proj", float("nan"))
    ax = audit(adapter).plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "self_attn",
        "shared_experts",
        "routed_experts",
        "dense_mlp",
    ]
    assert [text.get_text() for text in ax.texts] == ["2"] and len(ax.patches) == 27 + 26 + 26 + 1
    matplotlib.pyplot.close(ax.figure)
