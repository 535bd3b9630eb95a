"""ktlib: fine-tune Mixture-of-Experts models with the routed experts on the CPU.

Importing it registers the experts implementation ``"ktlib"`` with transformers and the factored LoRA path with PEFT.
"""

from ktlib import experts as _experts  # noqa: F401  registers "ktlib" with transformers
from ktlib.audit import audit
from ktlib.cpu import cpu_info
from ktlib.lora import lora_config
from ktlib.ops import moe_experts

__all__ = ["audit", "cpu_info", "lora_config", "moe_experts"]
__version__ = "0.1.0"
