"""Adapters in and out: bit for bit there and back, the same numbers when merged in float64, wrong files refused."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import PER_EXPERT, random_adapter, tiny_config, tiny_model, tokens

import ktlib
from ktlib.conversion.adapters import export_adapter, import_adapter
from ktlib.files import ownership
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.peft_lora import lora_config
from ktlib.integrations.peft_settings import rank_and_alpha

ADAPTER_FILE, CONFIG, FUSED = "adapter_model.safetensors", "adapter_config.json", "fused_expert_lora.safetensors"


def save_peft(folder, family="deepseek_v2", **options):
    """A stock PEFT adapter of random values, saved; returns (folder, base config)."""
    model = tiny_model(family)
    random_adapter(get_peft_model(model, lora_config(model, **{"r": 4, "lora_alpha": 6} | options))).save_pretrained(
        folder
    )
    return folder, tiny_config(family)


def per_expert_names(family):
    """``{module in the old spelling: (out, in)}`` of all experts, written down without ktlib."""
    config, model = tiny_config(family), tiny_model(family)
    names = {}
    for name, value in model.named_parameters():
        if value.dim() != 3:
            continue
        experts, out, inner = value.shape
        stem = name.rpartition(".")[0]
        for e in range(experts):
            if config.model_type == "mixtral":
                stem, (gate, up, down) = stem.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
            else:
                gate, up, down = "gate_proj", "up_proj", "down_proj"
            if name.endswith("gate_up_proj"):
                names[f"{stem}.{e}.{gate}"] = names[f"{stem}.{e}.{up}"] = (out // 2, inner)
            else:
                names[f"{stem}.{e}.{down}"] = (out, inner)
    return names


def save_per_expert(folder, family="deepseek_v2", r=3, alpha=5, attention=True, **settings):
    """An adapter as PEFT on transformers 4 writes it, every matrix different; returns (folder, base config)."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    shapes = per_expert_names(family)
    if attention:
        model = tiny_model(family)
        shapes |= {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("self_attn.o_proj")}
    for name, (out, inner) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, inner, generator=generator).bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, r, generator=generator).bfloat16()
    experts = "w1|w2|w3" if family == "mixtral" else "gate_proj|up_proj|down_proj"
    targets = rf".*\.experts\.\d+\.({experts})" + (r"|.*\.o_proj" if attention else "")
    folder.mkdir()
    save_file(tensors, folder / ADAPTER_FILE)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "target_modules": targets}
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder, tiny_config(family)


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


def assert_same_files(one, other, *names):
    for name in names or (ADAPTER_FILE,):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.dtype == second[key].dtype and torch.equal(value, second[key]), key


def settings_of(folder, *names):
    config = json.loads((folder / CONFIG).read_text())
    return [config.get(name) for name in names]


# ------------------------------------------------------------------------------------------------ there and back


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
    assert experts and all(a.shape[0] == 2 * 3 * tiny_experts(family) for a in experts), "gate and up keep their own A"
    export_adapter(tmp_path / "peft", tmp_path / "back", config)
    assert_same_files(source, tmp_path / "back")
    back = json.loads((tmp_path / "back" / CONFIG).read_text())
    modules = [key.removesuffix(".lora_A.weight") for key in load_file(source / ADAPTER_FILE) if "lora_A" in key]
    assert {tuple(rank_and_alpha(back, f"{module}.weight")) for module in modules} == {(3, 5)}


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


# ------------------------------------------------------------------------------------------------ refusals


def changed(folder, change):
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)


def pop(*ends):
    def change(tensors):
        for key in [key for key in tensors if key.endswith(ends)]:
            del tensors[key]

    return change


def add(key, *shape):
    return lambda tensors: tensors.update({f"base_model.model.{key}": torch.zeros(shape)})


@pytest.mark.parametrize(
    "change, message",
    [
        (pop("experts.5.up_proj.lora_B.weight"), r"missing \(1\): lora_B of up in .*layers.1.mlp.experts.*expert 5"),
        (pop("experts.7.down_proj.lora_A.weight", "experts.7.down_proj.lora_B.weight"), r"missing \(2\): .*expert 7"),
        (pop("0.self_attn.o_proj.lora_A.weight", "0.self_attn.o_proj.lora_B.weight"), r"both .* of model.layers.0"),
        (add("model.layers.1.mlp.experts.8.up_proj.lora_A.weight", 3, 64), r"extra \(1\): up of .*expert 8"),
        (add("model.layers.7.self_attn.o_proj.lora_A.weight", 3, 64), r"missing \(1\): lora_B of model.layers.7"),
        (add("model.layers.1.mlp.experts.0.up_proj.lora_A.weight", 4, 64), r"wrong shape .*\(4, 64\), needs \(3, 64\)"),
        (add("model.layers.1.mlp.experts.0.up_proj.lora_magnitude_vector", 4), r"unknown \(1\): .*magnitude"),
        (add("model.layers.1.mlp.experts.0.up_proj.lora_A.weight", 3, 64), r"wrong dtype \(1\)"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_listed(change, message, tmp_path):
    source, config = save_per_expert(tmp_path / "apart")
    changed(source, change)
    with pytest.raises(ValueError, match=message):
        import_adapter(source, tmp_path / "out", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart"], "nothing may be left behind"


@pytest.mark.parametrize("layer_keys", [("1.mlp.experts.lora_A.weight", "1.mlp.experts.lora_B.weight")])
def test_a_stock_adapter_without_a_layer_is_refused(layer_keys, tmp_path):
    source, config = save_peft(tmp_path / "peft")
    changed(source, pop(*layer_keys))
    for convert in (import_adapter, export_adapter):
        with pytest.raises(ValueError, match="missing .*both matrices of model.layers.1.mlp.experts.down_proj"):
            convert(source, tmp_path / "out", config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_nan_or_inf_is_refused_by_name_unless_asked_for(value, tmp_path):
    source, config = save_peft(tmp_path / "peft")
    broken = ["1.mlp.experts.base_layer.lora_B", "1.mlp.shared_experts.up_proj.lora_A"]

    def break_two(tensors):
        for name in broken:
            tensors[f"base_model.model.model.layers.{name}.weight"].view(-1)[7] = value

    changed(source, break_two)
    for convert in (import_adapter, export_adapter):
        with pytest.raises(ValueError, match=r"NaN or Inf \(2\): .*; ") as refused:
            convert(source, tmp_path / "out", config)
        assert all(name in str(refused.value) for name in (*broken, "allow_nonfinite=True", "--allow-nonfinite"))
        convert(source, tmp_path / convert.__name__, config, allow_nonfinite=True)
    for folder, count in (("import_adapter", 2), ("export_adapter", 2)):
        bad = [k for k, v in load_file(tmp_path / folder / ADAPTER_FILE).items() if not v.isfinite().all()]
        assert len(bad) == count, "as many as there were, and no more"
    assert {p.split(":")[0] for p in ktlib.audit(source, config).problems} == {"routed_experts", "shared_experts"}


def test_one_tensor_by_two_names_is_refused(tmp_path):
    source, config = save_peft(tmp_path / "peft")
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    changed(source, lambda tensors: tensors.update({key.removeprefix("base_model.model."): tensors[key] + 1}))
    with pytest.raises(ValueError, match=rf"twice \(1\): .*{key.removeprefix('base_model.model.')} is another name"):
        import_adapter(source, tmp_path / "out", config)


def test_lists_are_in_alphabetical_order(tmp_path):
    """In an error's text and in the written file: the order of a set would change from process to process."""
    source, config = save_peft(tmp_path / "peft")
    import_adapter(source, tmp_path / "out", config)
    for targets in settings_of(tmp_path / "out", "target_modules", "target_parameters"):
        assert targets == sorted(targets) and len(targets) > 3
    changed(source, pop(*[f"self_attn.{name}.lora_{x}.weight" for name in ("q_proj", "o_proj") for x in "AB"]))
    with pytest.raises(ValueError, match="both matrices of") as refused:
        import_adapter(source, tmp_path / "refused", config)
    listed = str(refused.value).partition(r"missing (4): ")[2].split("; ")
    assert len(listed) == 4 and listed == sorted(listed)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_intermediate_size": 32}, "wrong shape .*experts"),
        ({"hidden_size": 32}, "wrong shape"),
        ({"n_routed_experts": 4}, r"extra \(12\): .*expert 4"),
        ({"n_routed_experts": 16}, "missing .*expert 8"),
        ({"num_hidden_layers": 1}, "extra .*layers.1.mlp.experts.gate_up_proj is not in the base model"),
        ({"num_hidden_layers": 3}, "missing .*both matrices of model.layers.2"),
    ],
)
def test_another_base_is_refused(changes, message, tmp_path):
    source, _ = save_per_expert(tmp_path / "apart")
    with pytest.raises(ValueError, match=message):
        import_adapter(source, tmp_path / "out", tiny_config("deepseek_v2", **changes))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 4}, r"wrong shape .*needs \(4, 64\) and \(64, 4\) at rank 4"),
        ({"rank_pattern": {r"experts\.3\.up_proj": 5}}, "different ranks or alphas"),
        ({"alpha_pattern": {r"experts\.\d+\.up_proj": 7}}, "gate and up of .* differ in rank or alpha"),
        ({"use_dora": True}, "adapter_config.json: use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"peft_type": "LOHA"}, "adapter_config.json: peft_type is 'LOHA', needs 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which has no place"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens is \[3, 4\]"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"kasa_config": {}}, "kasa_config is {}"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True"),
        ({"something_of_a_later_peft": 16}, "something_of_a_later_peft is 16"),
    ],
)
def test_settings_without_a_place_are_refused(settings, message, tmp_path):
    source, config = save_per_expert(tmp_path / "apart")
    rewrite_config(source, **settings)
    for convert in (import_adapter, export_adapter):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", config)


def rewrite_config(folder, **settings):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": False, "exclude_modules": [], "layers_pattern": None},
        {"init_lora_weights": "gaussian", "bias": "none", "fan_in_fan_out": False, "megatron_core": "megatron.core"},
        {"enable_lora": None, "merge_weights": False},  # of the first versions of PEFT
        {"peft_version": "0.30.0", "auto_mapping": {"parent_library": "transformers"}, "inference_mode": True},
        {"qalora_group_size": 32, "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}},  # not asked for
    ],
)
def test_settings_without_effect_are_not_in_the_way(settings, tmp_path):
    source, config = save_per_expert(tmp_path / "apart")
    import_adapter(source, tmp_path / "plain", config)
    rewrite_config(source, revision="v2", **settings)
    import_adapter(source, tmp_path / "peft", config)
    assert_same_files(tmp_path / "plain", tmp_path / "peft")
    assert settings_of(tmp_path / "peft", "revision", "init_lora_weights") == ["v2", True]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{'r'", "adapter_config.json: not JSON"),
        ("[]", "adapter_config.json: needs an object, holds a list"),
        ('{"peft_type": "LORA", "lora_alpha": 8}', "adapter_config.json: has no r, needs a number"),
        ('{"peft_type": "LORA", "r": 3, "lora_alpha": null}', "adapter_config.json: has no lora_alpha"),
        ('{"peft_type": "LORA", "r": "3"}', "adapter_config.json: r is '3', needs a number >= 1"),
        ('{"rank_pattern": {"o_proj": 0}}', "adapter_config.json: rank_pattern is {'o_proj': 0}, needs regular"),
        ('{"alpha_pattern": {"(o_proj": 2}}', r"adapter_config.json: alpha_pattern is {'\(o_proj': 2}, needs regular"),
        ('{"target_modules": 7}', "adapter_config.json: target_modules is 7, needs a list of names or a regular"),
        ('{"target_parameters": "experts"}', "adapter_config.json: target_parameters is 'experts', needs a list"),
        ('{"modules_to_save": [3]}', r"adapter_config.json: modules_to_save is \[3\], needs a list of names"),
    ],
)
def test_damaged_settings_are_named(content, message, tmp_path):
    source, config = save_per_expert(tmp_path / "apart")
    (source / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=message):
        import_adapter(source, tmp_path / "out", config)


@pytest.mark.parametrize(
    "name", ["layers.1.foo_lora_a", "layers.1.experts.foo_lora_a", "gate_lora_b", "layers.lora_A."]
)
def test_names_of_no_layout_are_listed(name, tmp_path):
    source, config = save_peft(tmp_path / "peft")
    changed(source, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    with pytest.raises(ValueError, match=rf"unknown \(1\): {name}"):
        import_adapter(source, tmp_path / "out", config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank_pattern": {"experts.down_proj": 3}}, "one rank and alpha for all experts"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "adapts all experts, not adapted are .*gate_up_proj"),
        ({"use_rslora": True}, "no rslora"),
    ],
)
def test_what_ktransformers_cannot_have_is_refused(options, message, tmp_path):
    source, config = save_peft(tmp_path / "peft", **options)
    with pytest.raises(ValueError, match=f"layout: ktransformers.*{message}"):
        export_adapter(source, tmp_path / "out", config, layout="ktransformers")


def test_files_and_folders_are_checked(tmp_path):
    source, config = save_peft(tmp_path / "peft")
    with pytest.raises(ValueError, match="layout: got 'fused', needs one of peft, per_expert, ktransformers"):
        export_adapter(source, tmp_path / "out", config, layout="fused")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        import_adapter(source, tmp_path / "full", config)
    (source / ADAPTER_FILE).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="neither adapter_model.safetensors nor"):
        import_adapter(source, tmp_path / "out", config)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        import_adapter(tmp_path, tmp_path / "out", config)
    with pytest.raises(ValueError, match="knows no per-expert spelling of the experts of 'gpt_oss'"):
        ExpertLayout(tiny_model("gpt_oss")).require_per_expert()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    source, config = save_per_expert(tmp_path / "apart")
    replaced = ownership.os.fsync
    monkeypatch.setattr(ownership.os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_adapter(source, tmp_path / "out", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart"]
    monkeypatch.setattr(ownership.os, "fsync", replaced)
    assert import_adapter(source, tmp_path / "out", config).is_dir()


def test_spellings_are_inverse():
    for family in PER_EXPERT:
        layout = ExpertLayout(tiny_model(family))
        stem = next(name for name, p in tiny_model(family).named_parameters() if p.dim() == 3).rpartition(".")[0]
        for part, leaf in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
            one = ExpertProjection(f"{stem}.{leaf}", part, 3)
            assert layout.located(layout.projection_in_files(one)) == one
        assert layout.located("model.layers.0.self_attn.o_proj.weight") == "model.layers.0.self_attn.o_proj.weight"
