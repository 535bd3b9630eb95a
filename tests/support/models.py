"""Tiny random models of real MoE families, built from their transformers configs (nothing is downloaded)."""

import torch
import transformers

VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
}
FAMILIES = {
    "deepseek_v2": ("DeepseekV2Config", {**_MLA, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8, "head_dim": 16, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 8, "shared_expert_intermediate_size": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "intermediate_size": 48}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "intermediate_size": 48}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "intermediate_size": 48, "head_dim": 16}),
}
MORE_FAMILIES = {  # for what does not need to be tested with each
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "dots1": ("Dots1Config", {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_experts": 8,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
PER_EXPERT = [family for family in FAMILIES if family != "gpt_oss"]  # those that files may hold expert by expert


def tiny_config(family, **changes):
    """Config of a two-layer model of the family (with a dense first layer where the family has one)."""
    name, specific = (FAMILIES | MORE_FAMILIES)[family]
    return getattr(transformers, name)(**{**_COMMON, **specific, **changes})


def tiny_model(family, experts="eager", dtype=torch.float32, experts_dtype=None, seed=0, **changes):
    """A random model whose every weight is representable in bf16, so that models of all dtypes hold equal weights.

    Args:
        experts: the experts implementation. The weights of "ktlib" experts are frozen.
        dtype, experts_dtype: of all parameters, and of the routed experts' (default: bf16 for "ktlib", else dtype).
        changes: entries of the config.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    model.set_experts_implementation(experts)
    experts_dtype = experts_dtype or (torch.bfloat16 if experts == "ktlib" else dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                parameter.normal_(std=0.3)  # routers that are sure of their choice
            if name.endswith("_proj_bias"):
                parameter.normal_(std=0.3)  # transformers starts them at zero
            parameter.copy_(parameter.bfloat16())
            parameter.data = parameter.data.to(experts_dtype if ".experts." in name else dtype)
            parameter.requires_grad_(experts != "ktlib" or ".experts." not in name)
    return model.eval()


def tiny_checkpoint(folder, family, **changes):
    """Save a tiny model in bf16 as on the hub, with the built-in model's tokenizer; returns the folder."""
    from ktlib.assets import BASE  # here, since processes that must not know ktlib use this file too

    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(family, dtype=torch.bfloat16, **{"vocab_size": len(tokenizer), **special, **changes}).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def expert_modules(model):
    """The modules that hold routed experts, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}


def random_adapter(model, seed=1, scale=0.1):
    """Give every LoRA matrix of the model random bf16-representable values (B included), the same for equal names."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            values = scale * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values.bfloat16())
    return model


def tokens(rows=2, length=12, seed=0):
    """input_ids (rows, length) without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative_error(got, want):
    """Relative L2 error of a tensor, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
