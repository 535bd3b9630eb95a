"""The adapter audit: counts per component from the architecture, every kind of bad value, bad files."""

import json
import shutil

import pytest
import torch
from models import tiny_config, tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ktlib.audit import audit, component, expected_adapter_counts
from ktlib.lora import lora_config

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
        "lm_head.mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    result = audit(tmp_path / "x.safetensors")
    assert result["routed_experts"].dtypes == {"bfloat16": 1} and result["routed_experts"].max_abs == 3
    assert result["router"].nan == 1 and result["router"].max_abs == 12 and result["other"].max_abs == 1


def test_missing_and_surplus_tensors_are_problems(adapter, lite):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    dropped = next(name for name in tensors if ".experts." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, file)
    assert audit(adapter).clean
    result = audit(adapter, lite.get_base_model())
    assert result.problems == ["routed_experts: 103 LoRA tensors, the architecture has 104"]


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
    assert audit(model).problems == [problem]
    model.peft_config["default"].save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" in name}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert audit(tmp_path, plain).problems == [problem]
    assert audit(get_peft_model(plain, lora_config(plain))).clean


def test_empty_tensors_are_problems(tmp_path):
    save_file({"layers.0.mlp.up_proj.lora_A.weight": torch.empty(8, 0)}, tmp_path / "x.safetensors")
    assert audit(tmp_path).problems == ["dense_mlp: 1 of 1 tensors are empty"]


def test_live_models(lite):
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
    with pytest.raises(ValueError, match="needed a .safetensors file"):
        audit(tmp_path / "adapter_model.bin")
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="adapter_model.safetensors: damaged"):
            audit(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="no .*adapter_config.json"):
        audit(adapter, tiny_config("deepseek_v2", **LITE))


def test_bad_arguments(lite):
    with pytest.raises(ValueError, match="layout: got 'packed'"):
        expected_adapter_counts(lite, lite.peft_config["default"], layout="packed")
    with pytest.raises(KeyError, match="'experts' is no component"):
        audit(lite)["experts"]


def test_config_as_read_from_json(lite, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert expected_adapter_counts(lite, config) == COUNTS


def test_audit_of_a_reloaded_adapter(saved):
    model = PeftModel.from_pretrained(tiny_model("deepseek_v2", "ktlib", **LITE), saved)
    assert {row.component: row.tensors for row in audit(model).rows} == COUNTS
