"""What ``lora_config`` adapts: a stock LoraConfig with the experts among its targets."""

import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.models import FAMILIES, expert_modules, tiny_config, tiny_model
from test_lora import pair

from ktlib.integrations.peft_lora import load_lora_config, lora_config


def adapted(model):
    return {
        name.split(".lora_")[0].replace(".base_layer", "") for name, _ in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets(family):
    model = tiny_model(family, "ktlib")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in linears if name != "lm_head" and not name.endswith("shared_expert_gate")}
    wanted |= set(expert_modules(model))
    got = {name.removeprefix("base_model.model.") for name in adapted(get_peft_model(model, lora_config(model)))}
    assert got == wanted
    assert not any("gate" in name.split(".") for name in got), "the router was adapted"


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_all_linear_leaves_the_router_alone(family):
    models = [tiny_model(family, "ktlib") for _ in range(2)]
    everything = get_peft_model(models[0], lora_config(models[0], target_modules="all-linear"))
    assert adapted(everything) == adapted(get_peft_model(models[1], lora_config(models[1])))


@pytest.mark.parametrize(
    "targets, count",
    [
        (["q_proj"], 2),
        (["layers.0.self_attn.q_proj", "shared_experts.up_proj"], 2),
        (r".*shared_experts\.(gate|up)_proj", 2),
        (["gate_proj", "up_proj", "down_proj"], 6),
        (["embed_tokens"], 1),
    ],
)
def test_explicit_targets(targets, count):
    model = tiny_model("deepseek_v2", "ktlib")
    model = get_peft_model(model, lora_config(model, target_modules=targets))
    assert len(adapted(model) - {"base_model.model.model.layers.1.mlp.experts"}) == count
    assert model.peft_config["default"].rank_pattern == {}


def test_excluded_modules_are_left_alone():
    """Also those that are adapted by their weight, which PEFT's own exclusion does not look at."""
    model = tiny_model("deepseek_v2", "ktlib")
    names = adapted(get_peft_model(model, lora_config(model, exclude_modules=r".*(shared_experts|q_proj).*")))
    assert not any("shared_experts" in name or "q_proj" in name for name in names) and len(names) == 2 * 3 + 3 + 1


@pytest.mark.parametrize("exclude", [r".*layers\.1\..*", ["layers.1.mlp.experts"], ["layers.1.mlp.experts.down_proj"]])
@pytest.mark.parametrize("targets", [None, ["experts.down_proj"]])
def test_excluded_experts_are_left_alone(exclude, targets):
    """PEFT does not apply exclude_modules to target_parameters."""
    model = tiny_model("qwen3_moe", "ktlib")
    config = lora_config(model, exclude_modules=exclude, target_parameters=targets)
    found = {
        (int(name.split("layers.")[1][0]), module.parameter_name)
        for name, module in get_peft_model(model, config).named_modules()
        if hasattr(module, "parameter_name") and "experts" in name
    }
    wanted = {(0, "down_proj"), (0, "gate_up_proj"), (1, "gate_up_proj")}
    wanted -= {(1, "gate_up_proj")} if targets or exclude != ["layers.1.mlp.experts.down_proj"] else set()
    assert found == wanted - ({(0, "gate_up_proj")} if targets else set())


def test_all_experts_can_be_excluded():
    model = tiny_model("qwen3_moe", "ktlib")
    config = lora_config(model, target_modules=["q_proj", "gate_proj"], exclude_modules=["mlp.experts"])
    assert {name.rsplit(".", 1)[1] for name in adapted(get_peft_model(model, config))} == {"q_proj"}


def test_projection_names_of_models_without_such_layers():
    """Lists written for transformers 4 name the projections of routed experts, which are adapted anyway."""
    model = tiny_model("qwen3_moe", "ktlib")
    config = lora_config(model, r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, config)
    assert {p.shape[0] for name, p in model.named_parameters() if ".experts." in name and "lora_A" in name} == {4 * 8}


def test_each_module_is_adapted_once_and_none_is_empty():
    ours, _ = pair()
    wrapped = [module.get_base_layer() for module in ours.modules() if hasattr(module, "lora_A")]
    parameters = [(id(m.get_base_layer()), getattr(m, "parameter_name", "weight")) for m in ours.modules()
                  if hasattr(m, "lora_A")]  # fmt: skip
    assert len(parameters) == len(set(parameters)) == 2 * 4 + 6 + 2
    assert all(p.numel() > 0 for module in wrapped for p in module.parameters())
    names = [name for name, _ in ours.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in ours.parameters()})
    # the model under the adapters is the stock one: same classes, same parameters
    stock = tiny_model("deepseek_v2")
    assert [type(m) for m in ours.unload().modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize(
    "option, message",
    [
        ({"use_dora": True}, "use_dora: got True"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": "nothing_like_it"}, "matches no linear layer"),
        ({"lora_alpha": math.nan}, "lora_alpha: got nan, needs a finite number"),
        ({"lora_alpha": math.inf}, "lora_alpha: got inf, needs a finite number"),
        ({"lora_alpha": "16"}, "lora_alpha: got '16', needs a finite number"),
    ],
)
def test_impossible_options_are_clear_errors(option, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model("deepseek_v2"), **option)


@pytest.mark.parametrize(
    "targets, message",
    [
        ({"target_modules": ["q_proj", "v_projj"]}, "target_modules: got 'v_projj', .* nearest are .*o_proj"),
        # what PEFT would take for projections of routed experts
        ({"target_modules": ["shared_expert.gate_proj"]}, "got 'shared_expert.gate_proj', .*are shared_experts.gate_"),
        ({"target_modules": ["up_projj"], "target_parameters": []}, "target_modules: got 'up_projj', .* up_proj"),
        ({"target_parameters": ["mlp.experts.downproj"]}, "got 'mlp.experts.downproj', .* are mlp.experts.down_proj"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj", "layers.7.mlp.experts.down_proj"]},
            "target_parameters: got 'layers.7.mlp.experts.down_proj', .* are layers.1.mlp.experts.down_proj",
        ),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters: got 'mlp.experts', needs a name"),
    ],
)
def test_targets_that_are_not_there_are_clear_errors(targets, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model("deepseek_v2"), **targets)


def test_one_name_is_no_list_of_parameters():
    with pytest.raises(TypeError, match="target_parameters: got 'mlp.experts.down_proj', needs a list of names"):
        lora_config(tiny_model("deepseek_v2"), target_parameters="mlp.experts.down_proj")


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="adapter_config.json: (not JSON|needs an object, holds a list)"):
        load_lora_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="none/adapter_config.json is not there"):
        load_lora_config(tmp_path / "none")


def test_a_model_without_experts_is_a_clear_error():
    with pytest.raises(ValueError, match="no routed experts"):
        lora_config(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_config_is_a_stock_config(tmp_path):
    model = tiny_model("deepseek_v2")
    config = lora_config(model, modules_to_save=["lm_head"])
    assert type(config) is LoraConfig and config.task_type == "CAUSAL_LM" and config.modules_to_save == ["lm_head"]
    config.save_pretrained(tmp_path)
    assert "ktlib" not in (tmp_path / "adapter_config.json").read_text()
    assert LoraConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "inference_mode": False}


def test_meta_models_can_be_configured():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("deepseek_v2"))
    assert lora_config(model).target_parameters == lora_config(tiny_model("deepseek_v2")).target_parameters
