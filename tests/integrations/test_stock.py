"""The statements of ktlib/integrations/README.md about stock code: if a test fails, one of them is out of date."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import relative_error, tiny_model, tokens
from support.quantised_files import save_quantised
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ktlib.integrations.peft_lora import ParamWrapper, lora_config

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- packed samples ------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
    "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA = {
    "num_experts": 4, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
HYBRID = {
    "Qwen3NextConfig": DELTA,
    "Qwen3_5MoeTextConfig": DELTA,
    "GraniteMoeHybridConfig": {
        "num_local_experts": 4, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    },
    "JambaConfig": {
        "num_experts": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
    },
    "Lfm2MoeConfig": {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "MiniMaxConfig": {
        "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 16,
    },
}  # fmt: skip


def leak(name, **settings):
    """Relative error of a sample's logits when another is packed before it, positions beginning anew."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**SIZES, **settings), dtype=torch.float32
    ).eval()
    first, second = tokens(2, 24).split(1)
    positions = torch.arange(24).repeat(2)[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        assert relative_error(packed[:, :24], model(first).logits) < 1e-5
        return relative_error(packed[:, 24:], model(second).logits)


def test_packed_samples_leak_where_a_layer_has_a_state():
    errors = {name: leak(name, **settings) for name, settings in HYBRID.items()}
    assert all(0.3 < error < 0.8 for error in errors.values()), errors
    assert leak("Qwen3MoeConfig", num_experts=4) < 1e-5


# ---- resume --------------------------------------------------------------------------------------------------------


def test_a_stock_trainer_resumes_bf16_adapters_as_fp32(tmp_path):
    def trainer(steps):
        model = tiny_model("olmoe", dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens(8, 12)])

    def dtypes(trainer):
        return {parameter.dtype for name, parameter in trainer.model.named_parameters() if "lora_" in name}

    first, second = trainer(1), trainer(2)
    first.train()
    assert dtypes(first) == dtypes(second) == {torch.bfloat16}
    second.train(resume_from_checkpoint=True)
    assert dtypes(second) == {torch.float32}


# ---- quantised checkpoints -----------------------------------------------------------------------------------------

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8(name, weight):
    """The tensors of a weight in a DeepSeek-style FP8 checkpoint, of blocks of 128 x 128, and its value."""
    if weight.dim() != 2 or "proj" not in name:
        return None
    assert weight.shape[0] % 128 == weight.shape[1] % 128 == 0
    blocks = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales[:, None, :, None]
    codes = (blocks / spread).to(torch.float8_e4m3fn)
    stored = {name: codes.flatten(2).flatten(0, 1), f"{name}_scale_inv": scales}
    return stored, (codes.float() * spread).flatten(2).flatten(0, 1).bfloat16()


def mxfp4(name, weight):
    """The same of a gpt-oss checkpoint: two codes a byte and a power of two for every 32 of them."""
    if weight.dim() != 3 or not name.endswith("_proj"):
        return None
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    codes = (groups / 2 ** exponents[..., None])[..., None].sub(FP4).abs().argmin(-1)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    stored = {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}
    return stored, (FP4[codes] * 2 ** exponents[..., None]).flatten(2).transpose(1, 2).bfloat16().contiguous()


SIDE = {"hidden_size": 128, "intermediate_size": 128}
QUANTISED = {
    "fp8": (
        "qwen3_moe", fp8, SIDE | {"moe_intermediate_size": 128, "head_dim": 64, "num_attention_heads": 2},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "mxfp4": (
        "gpt_oss", mxfp4, SIDE,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
    ),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, transformers keeps the codes")
@pytest.mark.parametrize("family, quantise, sizes, settings", QUANTISED.values(), ids=QUANTISED)
def test_quantised_checkpoints_train_in_bf16_without_a_gpu(family, quantise, sizes, settings, tmp_path):
    tiny_model(family, dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path)
    weights, stored, meant = load_file(tmp_path / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        found = quantise(name, weight)
        stored |= found[0] if found else {name: weight}
        meant[name] = found[1] if found else weight
    assert len(stored) > len(weights)

    def load(tensors, config, experts):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation=experts)

    config, ids = json.loads((tmp_path / "config.json").read_text()), tokens(2, 12)
    with torch.no_grad():
        want = load(meant, config, "eager")(ids).logits
        model = load(stored, config | {"quantization_config": settings}, "ktlib")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert relative_error(model(ids).logits, want) < 0.02
    adapted = get_peft_model(model, lora_config(model, r=4))
    assert sum(isinstance(module, ParamWrapper) for module in adapted.modules()) == 4
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(adapted(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


# ---- quantised checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "right"), [(128, True), (160, False)])
def test_transformers_divides_fp8_matrices_evenly_among_their_scales(rows, right, tmp_path):
    sizes = {"hidden_size": 128, "moe_intermediate_size": rows, "intermediate_size": 128}
    decoded = save_quantised(tmp_path, "fp8", **sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="eager")
    weight = model.model.layers[1].mlp.experts.down_proj[3]  # its columns are the rows of gate and up
    wanted = decoded["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(weight, wanted) is right and (right or relative_error(weight, wanted) > 0.005)
