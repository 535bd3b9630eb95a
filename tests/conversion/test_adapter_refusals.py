"""Adapters in and out: files and settings that are wrong, damaged or of another model are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_files import ADAPTER_FILE, CONFIG, assert_same_files, save_peft, save_per_expert, settings_of
from support.models import tiny_config

import ktlib
from ktlib.conversion.adapters import export_adapter, import_adapter
from ktlib.files import ownership


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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("layout", ["peft", "per_expert", "ktransformers"])
def test_nan_and_inf_are_refused_in_every_layout(layout, value, tmp_path):
    source, config = save_peft(tmp_path / "peft", modules_to_save=["lm_head"])
    export_adapter(source, tmp_path / "made", config, layout)
    files = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(files) == (2 if layout == "ktransformers" else 1)
    for file in files:
        whole = load_file(file)
        tensors = {key: tensor.clone() for key, tensor in whole.items()}
        broken = [max(tensors), min(tensors)]  # the first name is that of the output head, which is trained whole
        for key in broken:
            tensors[key].view(-1)[-1] = value
        save_file(tensors, file)
        there = sorted(tmp_path.rglob("*"))
        calls = [lambda: import_adapter(tmp_path / "made", tmp_path / "out", config)]
        if layout == "peft":
            calls += [
                lambda to=to: export_adapter(tmp_path / "made", tmp_path / "out", config, to)
                for to in ("peft", "per_expert", "ktransformers")
            ]
        for call in calls:
            with pytest.raises(ValueError, match=r"NaN or Inf \(2\)") as refused:
                call()
            assert all(key in str(refused.value) for key in broken)
        assert sorted(tmp_path.rglob("*")) == there, "nothing may be written"
        save_file(whole, file)


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
    source, _ = save_per_expert(tmp_path / "apart", base_model_name_or_path="org/model")
    with pytest.raises(ValueError, match=message) as refused:
        import_adapter(source, tmp_path / "out", tiny_config("deepseek_v2", **changes))
    assert "apart: does not fit DeepseekV2ForCausalLM, names 'org/model' as its base\n" in str(refused.value)


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
    source, config = save_peft(tmp_path / "stacked", "gpt_oss")
    with pytest.raises(ValueError, match="layout: got 'per_expert', .*no per-expert spelling of .* 'gpt_oss'"):
        export_adapter(source, tmp_path / "out", config)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    source, config = save_per_expert(tmp_path / "apart")
    replaced = ownership.os.fsync
    monkeypatch.setattr(ownership.os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_adapter(source, tmp_path / "out", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart"]
    monkeypatch.setattr(ownership.os, "fsync", replaced)
    assert import_adapter(source, tmp_path / "out", config).is_dir()
