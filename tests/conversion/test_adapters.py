"""Adapters in and out: bit for bit there and back, and the same numbers when merged in float64."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapter_files import (
    ADAPTER_FILE,
    CONFIG,
    FUSED,
    assert_same_files,
    save_peft,
    save_per_expert,
    settings_of,
)
from support.models import PER_EXPERT, tiny_config, tiny_model, tokens

import ktlib
from ktlib.conversion.adapters import export_adapter, import_adapter
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.peft_settings import rank_and_alpha


def merged_by_peft(folder, family):
    """float64 state dict, in transformers 5's names, of the base model with the adapter merged by stock PEFT."""
    model = tiny_model(family, dtype=torch.float64)
    return (
        PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).double().merge_and_unload().state_dict()
    )


def merged_by_hand(folder, family):
    """The same for the other layouts, from the definition ``W + s B A``, one projection of one expert at a time."""
    settings = json.loads((folder / CONFIG).read_text())
    s = settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1)
    result = {name: value.clone() for name, value in tiny_model(family, dtype=torch.float64).state_dict().items()}
    rows = {"gate_proj": 0, "w1": 0, "gate": 0, "up_proj": 1, "w3": 1, "up": 1}

    def add(stem, expert, leaf, a, b):
        fused = result[f"{stem}.{'gate_up_proj' if leaf in rows else 'down_proj'}"][expert]
        half = fused.chunk(2)[rows[leaf]] if leaf in rows else fused
        half += s * (b.double() @ a.double())

    tensors = load_file(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).exists() else {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            name, b = name.replace("block_sparse_moe", "mlp"), tensors[key.replace("lora_A", "lora_B")]
            if ".experts." in name:
                stem, _, rest = name.rpartition(".experts.")
                expert, leaf = rest.split(".")
                add(f"{stem}.experts", int(expert), leaf, a, b)
            else:
                result[f"{name}.weight"] += s * (b.double() @ a.double())
    if (folder / FUSED).exists():
        for key, a in (stacks := load_file(folder / FUSED)).items():
            if key.endswith("_lora_a"):
                _, layer, _, name = key.split(".")
                for e, (one_a, one_b) in enumerate(zip(a, stacks[key[:-1] + "b"], strict=True)):
                    add(f"model.layers.{layer}.mlp.experts", e, name.removesuffix("_lora_a"), one_a, one_b)
    return result


def assert_same_weights(got, wanted):
    """Equal but for the order of the float64 sums."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    base = tiny_model("deepseek_v2", dtype=torch.float64).state_dict()
    assert any(name not in base or not torch.equal(value, base[name]) for name, value in wanted.items())


@pytest.mark.compatible("per-expert adapters (transformers 4, vLLM, SGLang), both ways")
@pytest.mark.parametrize("family", PER_EXPERT)
def test_peft_to_per_expert_and_back(family, tmp_path):
    source, config = save_peft(tmp_path / "peft", family)
    export_adapter(source, tmp_path / "apart", config)
    assert_same_weights(merged_by_hand(tmp_path / "apart", family), merged_by_peft(source, family))
    import_adapter(tmp_path / "apart", tmp_path / "back", config)
    assert_same_files(source, tmp_path / "back")
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "task_type")
    assert list(map(as_set, settings_of(source, *names))) == list(map(as_set, settings_of(tmp_path / "back", *names)))


def test_the_name_of_the_base_model_survives(tmp_path):
    source, config = save_per_expert(tmp_path / "apart", base_model_name_or_path="org/model", revision="v2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        import_adapter(source, tmp_path / "peft", config)
        for layout in ("peft", "per_expert", "ktransformers"):
            export_adapter(tmp_path / "peft", tmp_path / f"as {layout}", config, layout)
    for folder in ("peft", "as peft", "as per_expert", "as ktransformers"):
        assert settings_of(tmp_path / folder, "base_model_name_or_path", "revision") == ["org/model", "v2"]


def as_set(value):
    return sorted(value) if isinstance(value, list) else value


@pytest.mark.compatible("per-expert adapters (transformers 4, vLLM, SGLang), both ways")
@pytest.mark.parametrize("family", PER_EXPERT)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_per_expert_to_peft_and_back(family, settings, tmp_path):
    source, config = save_per_expert(tmp_path / "apart", family, **settings)
    import_adapter(source, tmp_path / "peft", config)
    assert_same_weights(merged_by_peft(tmp_path / "peft", family), merged_by_hand(source, family))
    experts = [v for k, v in load_file(tmp_path / "peft" / ADAPTER_FILE).items() if "experts.base_layer.lora_A" in k]
    assert experts and all(a.shape[0] == 2 * 3 * tiny_experts(family) for a in experts), "gate and up have an A each"
    export_adapter(tmp_path / "peft", tmp_path / "back", config)
    assert_same_files(source, tmp_path / "back")
    back = json.loads((tmp_path / "back" / CONFIG).read_text())
    modules = [key.removesuffix(".lora_A.weight") for key in load_file(source / ADAPTER_FILE) if "lora_A" in key]
    plain = 5 * 3**0.5 if settings else 5  # without rslora, which not every server knows
    assert {tuple(rank_and_alpha(back, f"{module}.weight")) for module in modules} == {(3, plain)}
    assert not back.get("use_rslora")


def tiny_experts(family):
    return next(p.shape[0] for p in tiny_model(family).parameters() if p.dim() == 3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_peft_reads_per_expert_files_the_same_way(family, tmp_path):
    """PEFT converts such adapters itself when it loads them: the independent judge of names and of the formula."""
    source, config = save_per_expert(tmp_path / "apart", family)
    listed = ["o_proj", "w1", "w2", "w3"] if family == "mixtral" else ["o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(settings | {"target_modules": listed}))
    import_adapter(source, tmp_path / "peft", config)
    by_peft = PeftModel.from_pretrained(tiny_model(family), source)
    ours = PeftModel.from_pretrained(tiny_model(family), tmp_path / "peft")
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, by_peft(tokens()).logits)
        assert not torch.equal(ours(tokens()).logits, tiny_model(family)(tokens()).logits)


@pytest.mark.compatible("KTransformers' adapters, both ways")
def test_ktransformers_and_back(tmp_path):
    source, config = save_peft(tmp_path / "peft")
    export_adapter(source, tmp_path / "kt", config, layout="ktransformers")
    stacks = load_file(tmp_path / "kt" / FUSED)
    shapes = {key: tuple(value.shape) for key, value in stacks.items()}
    assert shapes == {
        "layers.1.experts.gate_lora_a": (8, 4, 64), "layers.1.experts.gate_lora_b": (8, 48, 4),
        "layers.1.experts.up_lora_a": (8, 4, 64), "layers.1.experts.up_lora_b": (8, 48, 4),
        "layers.1.experts.down_lora_a": (8, 4, 48), "layers.1.experts.down_lora_b": (8, 64, 4),
    }  # fmt: skip
    assert not any(".experts." in key for key in load_file(tmp_path / "kt" / ADAPTER_FILE))
    assert_same_weights(merged_by_hand(tmp_path / "kt", "deepseek_v2"), merged_by_peft(source, "deepseek_v2"))
    import_adapter(tmp_path / "kt", tmp_path / "back", config)
    assert_same_files(source, tmp_path / "back")


@pytest.mark.compatible("KTransformers' adapters, both ways")
def test_an_adapter_of_ktransformers(tmp_path):
    """Gate and up have their own A there; the file may be alone."""
    config, generator, stacks = tiny_config("deepseek_v2"), torch.Generator().manual_seed(2), {}
    for name, out, inner in (("gate", 48, 64), ("up", 48, 64), ("down", 64, 48)):
        stacks[f"layers.1.experts.{name}_lora_a"] = torch.randn(8, 2, inner, generator=generator).bfloat16()
        stacks[f"layers.1.experts.{name}_lora_b"] = torch.randn(8, out, 2, generator=generator).bfloat16()
    source = tmp_path / "kt"
    source.mkdir()
    save_file(stacks, source / FUSED)
    (source / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": []}))
    import_adapter(source, tmp_path / "peft", config)
    assert_same_weights(merged_by_peft(tmp_path / "peft", "deepseek_v2"), merged_by_hand(source, "deepseek_v2"))
    export_adapter(tmp_path / "peft", tmp_path / "back", config, layout="ktransformers")
    assert_same_files(source, tmp_path / "back", FUSED)
    assert settings_of(tmp_path / "back", "r", "lora_alpha") == [2, 8]

    # Experts may have a rank and an alpha of their own, and have no rslora even if the other layers have it.
    (source / "kt_adapter_manifest.json").write_text(json.dumps({"status": "ready", "lora": {"rank": 2, "alpha": 8.0}}))
    config_of_others = {"peft_type": "LORA", "r": 16, "lora_alpha": 3, "target_modules": [], "use_rslora": True}
    (source / CONFIG).write_text(json.dumps(config_of_others))
    import_adapter(source, tmp_path / "own", config)
    assert_same_weights(
        merged_by_peft(tmp_path / "own", "deepseek_v2"), merged_by_peft(tmp_path / "peft", "deepseek_v2")
    )
    assert ktlib.audit(source, config).clean
    export_adapter(tmp_path / "own", tmp_path / "back of own", config, layout="ktransformers")
    assert_same_files(source, tmp_path / "back of own", FUSED)
    rank, alpha = settings_of(tmp_path / "back of own", "r", "lora_alpha")
    assert rank == 2 and alpha == pytest.approx(8)
    (source / "kt_adapter_manifest.json").write_text('{"lora": {"rank": "2"}}')
    with pytest.raises(ValueError, match="kt_adapter_manifest.json: rank_pattern is .*, needs regular"):
        import_adapter(source, tmp_path / "refused", config)


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]},
        {"rank_pattern": {"experts.gate_up_proj": 5, "o_proj": 2}, "alpha_pattern": {"experts.down_proj": 3}},
        {"rank_pattern": {r"shared_experts\.gate_proj": 3}},
        {"use_rslora": True},
        {"r": 1, "modules_to_save": ["lm_head"]},
        {"target_parameters": [], "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ],
)
def test_subsets_ranks_and_alphas_survive(options, tmp_path):
    source, config = save_peft(tmp_path / "peft", **options)
    export_adapter(source, tmp_path / "apart", config)
    import_adapter(tmp_path / "apart", tmp_path / "back", config)
    assert_same_files(source, tmp_path / "back")
    assert_same_weights(merged_by_peft(tmp_path / "back", "deepseek_v2"), merged_by_peft(source, "deepseek_v2"))


def test_some_layers_only(tmp_path):
    source, config = save_peft(
        tmp_path / "peft", "qwen3_moe", target_modules=[], target_parameters=["layers.1.mlp.experts.gate_up_proj"]
    )
    export_adapter(source, tmp_path / "apart", config)
    (targets,) = settings_of(tmp_path / "apart", "target_modules")
    assert targets == sorted(f"layers.1.mlp.experts.{e}.{name}" for e in range(8) for name in ("gate_proj", "up_proj"))
    import_adapter(tmp_path / "apart", tmp_path / "back", config)
    assert_same_files(source, tmp_path / "back")


def test_fp32_adapters_and_live_bases(tmp_path):
    source, config = save_peft(tmp_path / "peft")
    assert {value.dtype for value in load_file(source / ADAPTER_FILE).values()} == {torch.float32}
    config.save_pretrained(tmp_path / "base")
    for i, base in enumerate((config, tmp_path / "base", tiny_model("deepseek_v2"))):
        export_adapter(source, tmp_path / f"{i}", base)
    assert_same_files(tmp_path / "0", tmp_path / "1")
    assert_same_files(tmp_path / "0", tmp_path / "2")


def test_an_imported_adapter_takes_the_fast_path(tmp_path):
    source, config = save_per_expert(tmp_path / "apart")
    import_adapter(source, tmp_path / "peft", config)
    model = PeftModel.from_pretrained(tiny_model("deepseek_v2", "ktlib"), tmp_path / "peft")
    assert ktlib.factor_adapters(model) == 2
    stock = PeftModel.from_pretrained(tiny_model("deepseek_v2"), tmp_path / "peft")
    with torch.no_grad():
        ours, wanted = model(tokens()).logits, stock(tokens()).logits
    assert (ours - wanted).norm() < 0.01 * wanted.norm()
    assert ktlib.audit(tmp_path / "peft", config).clean


def test_spellings_are_inverse():
    for family in PER_EXPERT:
        layout = ExpertLayout(tiny_model(family))
        stem = next(name for name, p in tiny_model(family).named_parameters() if p.dim() == 3).rpartition(".")[0]
        for projection, leaf in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
            place = ExpertProjection(f"{stem}.{leaf}", projection, 3)
            assert layout.located(layout.projection_in_files(place)) == place
        assert layout.located("model.layers.0.self_attn.o_proj.weight") == "model.layers.0.self_attn.o_proj.weight"
