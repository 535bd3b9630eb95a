"""The adapter audit of live models: several adapters, ranks of their own, what is saved beside the LoRA matrices."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import family_models
from support.audits import without_expert
from support.models import tiny_config, tiny_model

from ktlib.diagnosis.audit import audit
from ktlib.integrations.peft_lora import lora_config


def nan_in(model, name):
    with torch.no_grad():
        for key, parameter in model.named_parameters(remove_duplicate=False):
            if name in key:
                parameter.view(-1)[0] = float("nan")


def test_a_model_without_adapters_is_audited_whole():
    plain = tiny_model("qwen3_moe")
    result = audit(plain)
    assert sum(row.parameters for row in result.rows) == sum(p.numel() for p in plain.parameters())
    assert result["router"].tensors == 2 and result.clean
    with pytest.raises(ValueError, match="no adapter"):
        audit(plain, plain)
    with torch.no_grad():
        plain.model.layers[0].mlp.experts.down_proj[3, 2, 1] = float("nan")
    assert audit(plain).problems == ["routed_experts: 1 of 4 tensors contain NaN"]


def test_dtypes_are_counted_per_component():
    model = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    model = get_peft_model(model, lora_config(model), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".self_attn." in name and ".lora_" in name:
            parameter.data = parameter.data.float()
    result = audit(model)
    assert result["routed_experts"].dtypes == {"bfloat16": 4}
    assert result["self_attn"].dtypes == {"float32": 16}


class WrapperThatKeepsTheOriginal(torch.nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.experts, self.gate, self.shared_experts = moe.experts, moe.gate, moe.shared_experts
        self.original_moe = moe


def test_a_module_under_two_names_is_a_problem(tmp_path):
    model, plain = tiny_model("deepseek_v2", "ktlib"), tiny_model("deepseek_v2", "ktlib")
    model.model.layers[1].mlp = WrapperThatKeepsTheOriginal(model.model.layers[1].mlp)
    model = get_peft_model(model, lora_config(model))
    problem = "shared_experts: 12 LoRA tensors, the architecture has 6"
    report = audit(model)
    assert report.problems[1:] == [problem]
    assert report.problems[0].startswith("shared_experts: 6 tensors are stored under two names, as ")
    assert "layers.1.mlp.original_moe.shared_experts" in report.problems[0]
    assert report.flagged == {(1, "shared_experts"): 12}
    model.peft_config["default"].save_pretrained(tmp_path)
    tensors = {k.replace(".default", ""): v.clone() for k, v in model.state_dict().items() if ".lora_" in k}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (named,) = audit(tmp_path, plain).problems[1:]
    assert named.startswith("shared_experts: extra (3), as model.layers.1.mlp.original_moe.shared_experts.")
    assert audit(get_peft_model(plain, lora_config(plain))).clean


@pytest.mark.parametrize(
    "family, name, alike",
    [
        ("axk2", "AXK2ForCausalLM", "_layernorm.mlp."),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", "_moe.experts."),
    ],
)
def test_modules_of_equal_structure_in_a_layer_are_not_one_under_two_names(family, name, alike):
    model = family_models.tiny_model(family, name)
    assert sum(alike in key for key, _ in model.named_parameters()) >= 4
    assert audit(model).clean


def test_a_wrapper_around_one_of_two_such_modules_is_one_under_two_names(tmp_path):
    ways = ("text_moe", "vision_moe", "original_moe.text_moe")
    names = [f"model.layers.1.mlp.{way}.experts.lora_A.weight" for way in ways]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    problem = next(text for text in audit(tmp_path).problems if "two names" in text)
    first, second = sorted((names[0], names[2]))
    assert problem == f"routed_experts: 1 tensors are stored under two names, as {first} and {second}"


@pytest.mark.parametrize(
    "options, name",
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_tokens_delta"),
    ],
)
def test_what_is_saved_beside_lora_is_looked_at(options, name, tmp_path):
    model = tiny_model("deepseek_v2", "ktlib")
    model = get_peft_model(model, lora_config(model, **options))
    assert audit(model).clean and audit(model)["other"].tensors == 1
    nan_in(model, name)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        assert audit(source).problems == ["other: 1 of 1 tensors contain NaN"]


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj"], "lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_biases_and_embeddings(options, tmp_path):
    model = tiny_model("qwen2_moe")
    model = get_peft_model(model, LoraConfig(r=4, **options))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for report in (audit(model), audit(tmp_path, tiny_config("qwen2_moe"))):
        assert report.clean and sum(row.tensors for row in report.rows) == 6
        assert report.notes == ["every B is zero: a new adapter, never trained"]
    for source in (model, tmp_path):
        problems = audit(source, trained=True).problems
        assert [problem.partition(",")[0] for problem in problems] == [
            "self_attn: 2 of 2 B matrices were never updated",
            *["other: 1 of 1 A matrices were never updated"] * ("embed_tokens" in options["target_modules"]),
        ]


@pytest.mark.parametrize(
    "options, old, new, part",
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens", "wte", "other"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "0.self_attn.q_proj.lora_B.bias", "7.lora_B.bias", "other"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head", "head.lm_head", "other"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head", "model.norm", "other"),
    ],
)
def test_what_is_saved_beside_lora_is_compared_with_the_base_model(options, old, new, part, tmp_path):
    config = tiny_config("qwen2_moe")
    model = get_peft_model(tiny_model("qwen2_moe"), LoraConfig(r=4, **options))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert audit(tmp_path, config).clean
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)
    found = [text for text in audit(tmp_path, config).problems if text.startswith(f"{part}: ") and new in text]
    assert len(found) == 1 and ("wrong shape (1)" if new == "model.norm" else "extra (") in found[0]


def with_adapters(**adapters):
    """A live model with adapters of random values; of each, options of lora_config, and an expert without tokens."""
    model = tiny_model("deepseek_v2", "ktlib")
    for name, options in adapters.items():
        expert = options.pop("without", None)
        config = lora_config(model, **options)
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
        for key, parameter in model.named_parameters():
            if f".lora_B.{name}." in key:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
                if ".experts." in key and expert is not None:
                    without_expert(expert, 8)(parameter.data)
    return model


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_experts_of_any_rank_are_looked_at_one_by_one(parameters, tmp_path):
    options = {"target_parameters": [f"mlp.experts.{name}" for name in parameters], "without": 5}
    model = with_adapters(one=options | {"r": 4, "rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 3}})
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path / "one"):
        assert audit(source).notes == ["routed_experts: 1 experts in 1 layers never received a token, as 5 in layer 1"]


def test_each_adapter_of_a_live_model_is_judged_by_its_own_settings():
    model = with_adapters(one={"r": 2, "lora_alpha": 2}, two={"r": 8, "lora_alpha": 1e41, "without": 3})
    report = audit(model)
    note = "routed_experts: 1 experts in 1 layers never received a token, as 3 in layer 1"
    assert report.notes == [f"adapter two: {note}"]
    assert len(report.problems) == 16 and all("lora_A.two.weight: A and B" in problem for problem in report.problems)
    assert audit(with_adapters(two={"r": 8, "lora_alpha": 1e41})).problems
    assert audit(with_adapters(two={"r": 8}, one={"r": 2})).clean
