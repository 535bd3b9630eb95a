"""The layer of routed experts in plain torch at float64: the definition that kernels are tested against."""

from ktlib.reference.gates import apply_gate, clamp_gate
from ktlib.reference.layer import drop_threshold, keep_mask, lora_delta, moe_experts, philox

__all__ = ["apply_gate", "clamp_gate", "drop_threshold", "keep_mask", "lora_delta", "moe_experts", "philox"]
