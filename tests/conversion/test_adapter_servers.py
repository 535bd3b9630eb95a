"""Exported adapters under the rules of vLLM and SGLang: each tensor is used, with the scaling it was trained with.

Servers are not installed here; ``support/servers.py`` has their rules, and refuses what they would leave out.
"""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.experts_apart import ExpertsApart
from support.models import PER_EXPERT, relative_error, tiny_model, tokens
from support.servers import SGLANG, VLLM, apply_as
from test_adapter_readers import exported

FAMILIES = [*PER_EXPERT, "ernie4_5_moe"]


def served(server, folder, family):
    with torch.no_grad():
        return apply_as(server, folder, ExpertsApart(tiny_model(family)))(tokens())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"exclude_modules": ["kv_b_proj"]}, {"target_modules": []}, {"use_rslora": True}], ids=str
)
def test_servers_use_every_tensor_as_it_was_trained(family, options, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wanted, folder = exported(family, tmp_path, **options)
    said = [str(one.message) for one in caught if "vLLM" in str(one.message) or "SGLang" in str(one.message)]
    refusals = {}
    if "deepseek" in family and "use_rslora" in options:
        refusals[VLLM] = "kv_b_proj is used as it was", "kv_b_proj has an adapter, which vLLM leaves out"
    if family == "deepseek_v2" and "target_modules" not in options:  # as DeepSeek-V2-Lite, without q_lora_rank
        refusals[SGLANG] = "_proj.* without", "q_a_proj beside it has none; SGLang does not read that"
    for server in (VLLM, SGLANG):
        if server in refusals:
            with pytest.raises(ValueError, match=refusals[server][0]):
                served(server, folder, family)
        else:
            assert relative_error(served(server, folder, family), wanted) < 1e-5, server
    assert len(said) == len(refusals)
    assert all(any(warning in one for one in said) for _, warning in refusals.values())


@pytest.mark.filterwarnings("ignore:rank_pattern, alpha_pattern")
def test_vllm_knows_ranks_and_alphas_of_single_layers(tmp_path):
    options = {"rank_pattern": {"experts.gate_up_proj": 6}, "alpha_pattern": {"experts.down_proj": 3, "o_proj": 9}}
    wanted, folder = exported("qwen2_moe", tmp_path, **options)
    assert relative_error(served(VLLM, folder, "qwen2_moe"), wanted) < 1e-5
    with pytest.raises(ValueError, match="SGLang: rank 6 of .* is not r"):
        served(SGLANG, folder, "qwen2_moe")


@pytest.mark.parametrize(
    "options, server, warning, refusal",
    [
        (
            {"target_parameters": ["mlp.experts.down_proj"]},
            VLLM,
            r"gate_up_proj has no adapter; vLLM takes",
            "gate, up and",
        ),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            VLLM,
            "down_proj has no adapter; vLLM takes",
            "gate, up and",
        ),
        ({"target_modules": ["q_proj"]}, SGLANG, "q_proj has an adapter and v_proj beside it", "q_proj without v_proj"),
        ({"modules_to_save": ["lm_head"]}, VLLM, "modules_to_save: vLLM refuses", "no LoRA matrix"),
        ({"modules_to_save": ["lm_head"]}, SGLANG, "modules_to_save: .* SGLang leaves", "no LoRA matrix"),
    ],
)
def test_an_export_says_what_servers_do_not_take(options, server, warning, refusal, tmp_path):
    with pytest.warns(UserWarning, match=warning):
        _, folder = exported("qwen3_moe", tmp_path, **options)
    with pytest.raises(ValueError, match=refusal):
        served(server, folder, "qwen3_moe")


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_shared_experts_without_routed_ones_need_an_option_of_sglang(family, tmp_path):
    """PEFT takes their names in target_modules for routed experts, so these cannot list them, as SGLang needs it."""
    with pytest.warns(UserWarning, match="lacks down_proj, gate_proj, up_proj, .* --lora-target-modules all"):
        wanted, folder = exported(family, tmp_path, target_parameters=[], exclude_modules=["kv_b_proj"])
    assert relative_error(served(VLLM, folder, family), wanted) < 1e-5
    with pytest.raises(ValueError, match=r"SGLang: .*(gate|up|down)_proj is not in target_modules"):
        served(SGLANG, folder, family)


def test_a_pattern_is_not_for_sglang(tmp_path, monkeypatch):
    monkeypatch.setattr("ktlib.conversion.adapter_targets.LONGEST", 20)
    with pytest.warns(UserWarning, match="a pattern, .* SGLang takes lists only"):
        wanted, folder = exported("glm4_moe", tmp_path)
    assert relative_error(served(VLLM, folder, "glm4_moe"), wanted) < 1e-5
    with pytest.raises(ValueError, match="SGLang: target_modules is a pattern"):
        served(SGLANG, folder, "glm4_moe")


@pytest.mark.parametrize("server", [VLLM, SGLANG])
def test_the_readers_of_servers_are_strict(server, tmp_path):
    wanted, folder = exported("qwen3_moe", tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    assert relative_error(served(server, folder, "qwen3_moe"), wanted) < 1e-5
    for change in (
        lambda key: key.replace("experts.3.", "experts.8."),
        lambda key: key.replace("mlp.experts.", "experts."),
        lambda key: key.replace("o_proj.lora_A.weight", "o_proj.lora_A.default.weight"),
        lambda key: key.replace("base_model.model.", ""),
    ):
        save_file({change(key): tensor for key, tensor in tensors.items()}, file)
        with pytest.raises(ValueError, match=f"{server}: (no modules|.* is no LoRA matrix)"):
            served(server, folder, "qwen3_moe")
