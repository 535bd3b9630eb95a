"""Adapters with modules per expert give the logits that were trained, whoever reads them.

Stock PEFT with transformers 5 converts them. It takes ``gate_proj``, ``up_proj`` and ``down_proj`` in such a file for
the routed experts, shared experts' layers too; what the file says has to come out right nevertheless. Where experts are
modules, PEFT adapts the modules that the settings name: they have to be the right ones.
"""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from support.experts_apart import ExpertsApart
from support.models import random_adapter, relative_error, tiny_config, tiny_model, tokens

import ktlib
from ktlib.conversion.adapter_targets import LONGEST
from ktlib.integrations.peft_lora import lora_config

CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj"]


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def attention(family):
    names = {name.rpartition(".")[2] for name, _ in tiny_model(family).named_modules()}
    return [name for name in ATTENTION if name in names]


def exported(family, folder, **options):
    """``(logits, folder of the export)`` of a random adapter."""
    model = tiny_model(family)
    model = random_adapter(get_peft_model(model, lora_config(model, **{"r": 4, "lora_alpha": 6} | options)))
    model.save_pretrained(folder / "fused")
    ktlib.export_adapter(folder / "fused", folder / "apart", tiny_config(family))
    return logits(model), folder / "apart"


def read_by_stock(family, folder):
    """``(logits, warnings)`` of the adapter in stock PEFT."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(tiny_model(family), folder)
    return logits(model), [str(one.message) for one in caught if "adapter keys" in str(one.message)]


def read_by_modules(family, folder):
    """Logits of the adapter in stock PEFT on modules per expert, which has to adapt those of the file and no other."""
    config = LoraConfig.from_pretrained(folder)
    config.task_type = None  # PEFT's classes for tasks need a model of transformers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some patterns match nothing here: they are for other readers of the file
        model = PeftModel.from_pretrained(ExpertsApart(tiny_model(family)), folder, config=config)
    assert get_peft_model_state_dict(model).keys() == load_file(folder / ADAPTER_FILE).keys()
    with torch.no_grad():
        return model.eval()(tokens())


TARGETED = {"everything": {}, "experts alone": {"target_modules": []}, "no experts": {"target_parameters": []}}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "qwen3_moe", "mixtral", "glm4_moe", "ernie4_5_moe"])
@pytest.mark.parametrize("targeted", ["experts and attention", *TARGETED])
def test_stock_peft_reads_what_was_trained(family, targeted, tmp_path):
    wanted, folder = exported(family, tmp_path, **TARGETED.get(targeted, {"target_modules": attention(family)}))
    got, missing = read_by_stock(family, folder)
    assert missing == []
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(read_by_modules(family, folder), wanted) < 1e-5
    assert relative_error(logits(tiny_model(family)), wanted) > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"experts.gate_up_proj": 6, "experts.down_proj": 3}},
        {"alpha_pattern": {"experts.gate_up_proj": 9, "experts.down_proj": 2, r"shared_experts\.up_proj": 5}},
        {"rank_pattern": {r"shared_experts\.gate_proj": 3, r"layers\.0\.self_attn\.o_proj": 2}},
        {"rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 6}, "use_rslora": True},
        {"use_rslora": True},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []},
        {"target_parameters": [], "target_modules": ["gate_proj", "o_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore:rank_pattern, alpha_pattern")
def test_ranks_alphas_and_single_projections_come_out_right(family, options, tmp_path):
    wanted, folder = exported(family, tmp_path, **options)
    got, missing = read_by_stock(family, folder)
    if options.get("target_parameters") == ["mlp.experts.gate_up_proj"]:
        assert "experts.lora_A" in missing[0] and "base_layer" not in missing[0], "down_proj, which stays as it was"
    else:
        assert missing == []
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(read_by_modules(family, folder), wanted) < 1e-5


def test_some_layers_come_out_right_although_peft_adapts_all(tmp_path):
    options = {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}
    wanted, folder = exported("qwen3_moe", tmp_path, **options)
    got, missing = read_by_stock("qwen3_moe", folder)
    assert "layers.0.mlp.experts.lora_A" in missing[0] and "layers.1.mlp.experts.base_layer" not in missing[0]
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(read_by_modules("qwen3_moe", folder), wanted) < 1e-5


def test_a_file_of_many_names_is_written_as_a_pattern(tmp_path, monkeypatch):
    """PEFT compares every name in a list with every other. Names of experts have no number where PEFT asks for them."""
    monkeypatch.setattr("ktlib.conversion.adapter_targets.LONGEST", 20)
    wanted, folder = exported("deepseek_v2", tmp_path, target_modules=attention("deepseek_v2"))
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    assert isinstance(targets, str) and r"experts\.(\d+\.)?gate_proj" in targets
    got, missing = read_by_stock("deepseek_v2", folder)
    assert (relative_error(got, wanted) < 1e-5, missing) == (True, [])
    assert relative_error(read_by_modules("deepseek_v2", folder), wanted) < 1e-5
    assert LONGEST > 3 * 512, "a list is what SGLang takes; published models have up to 512 experts"


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe", "mixtral"])
def test_readers_of_modules_find_each_tensor_once(family, tmp_path):
    """PEFT on transformers 4 goes by ``target_modules`` for modules, by ``target_parameters`` for weights."""
    _, folder = exported(family, tmp_path)
    settings = json.loads((folder / CONFIG).read_text())
    assert isinstance(settings["target_modules"], list), "SGLang takes no pattern"
    keys = [key for key in load_file(folder / ADAPTER_FILE) if "lora_A" in key]
    modules = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in keys}

    def named(name, targets):
        return any(name == target or name.endswith(f".{target}") for target in targets or ())

    for name in modules:
        as_module = named(name, settings["target_modules"])
        as_weight = named(f"{name}.weight", settings["target_parameters"])
        assert as_module + as_weight == 1, name
    router = next(name for name, _ in tiny_model(family).named_modules() if name.endswith("mlp.gate"))
    assert not named(router, settings["target_modules"])


def test_servers_that_know_one_scaling_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"scalings from 0.75 to 1.5 in one adapter.*SGLang and, up to 0.30, vLLM"):
        exported("qwen3_moe", tmp_path, alpha_pattern={"experts.down_proj": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ktlib.export_adapter(*save(tmp_path / "plain", rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 3}))


def save(folder, **options):
    model = tiny_model("qwen3_moe")
    get_peft_model(model, lora_config(model, r=4, lora_alpha=6, **options)).save_pretrained(folder / "a")
    return folder / "a", folder / "b", tiny_config("qwen3_moe")


@pytest.mark.parametrize(
    "excluded", [["o_proj"], r".*layers\.0\.self_attn.*", ["shared_experts.up_proj", "mlp.experts.down_proj"]]
)
def test_what_was_excluded_is_said_by_the_targets(excluded, tmp_path):
    wanted, folder = exported("deepseek_v2", tmp_path, exclude_modules=excluded)
    for layout in ("peft", "per_expert"):
        ktlib.export_adapter(tmp_path / "fused", tmp_path / layout, tiny_config("deepseek_v2"), layout)
        assert not json.loads((tmp_path / layout / CONFIG).read_text()).get("exclude_modules")
        got, missing = read_by_stock("deepseek_v2", tmp_path / layout)
        assert relative_error(got, wanted) < 1e-5
    ktlib.import_adapter(folder, tmp_path / "back", tiny_config("deepseek_v2"))
    assert load_file(tmp_path / "back" / ADAPTER_FILE).keys() == load_file(tmp_path / "fused" / ADAPTER_FILE).keys()
