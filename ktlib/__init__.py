"""ktlib: fine-tune Mixture-of-Experts models with the routed experts on the CPU.

Importing it registers the experts implementation ``"ktlib"`` with transformers (as soon as that is imported). Names
that need PEFT or transformers are loaded on first use, so that the import itself is fast.
"""

import importlib

from ktlib import environment as _environment  # noqa: F401  first: it says what is wrong here
from ktlib import experts as _experts  # noqa: F401  registers "ktlib" with transformers
from ktlib import reference
from ktlib.audit import audit
from ktlib.cpu import cpu_info
from ktlib.ops import moe_experts

__version__ = "0.1.0"

_LAZY = {
    "export_adapter": "ktlib.adapters",
    "factor_adapters": "ktlib.lora",
    "fuse_checkpoint": "ktlib.fused_checkpoints",
    "import_adapter": "ktlib.adapters",
    "load_lora_config": "ktlib.lora",
    "load_runs": "ktlib.runs",
    "lora_config": "ktlib.lora",
    "pin_experts": "ktlib.placement",
    "place_experts": "ktlib.numa",
    "record": "ktlib.runs",
    "share_experts": "ktlib.placement",
    "trace_nonfinite": "ktlib.trace",
    "StopOnNonFinite": "ktlib.callback",
}

__all__ = ["audit", "cpu_info", "moe_experts", "reference", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ktlib' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
