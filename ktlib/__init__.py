"""ktlib: fine-tune Mixture-of-Experts models with the routed experts on the CPU.

Importing ktlib registers the experts implementation ``"ktlib"`` with transformers, or as soon as transformers is
imported. Functions that need PEFT or transformers are imported on first use, so that ``import ktlib`` is fast.
"""

import importlib

from ktlib.system import environment as _environment  # noqa: F401  first, since it checks the environment

# isort: split
from ktlib import reference
from ktlib.diagnosis.audit import audit
from ktlib.integrations import registration as _registration  # noqa: F401  makes "ktlib" known to transformers
from ktlib.operator.moe_experts import moe_experts
from ktlib.operator.weight import Weight
from ktlib.system.cpu import cpu_info

__version__ = "0.1.0"

_LAZY = {
    "export_adapter": "ktlib.conversion.adapters",
    "factor_adapters": "ktlib.integrations.peft_lora",
    "fuse_checkpoint": "ktlib.conversion.fuse",
    "import_adapter": "ktlib.conversion.adapters",
    "load_lora_config": "ktlib.integrations.peft_lora",
    "load_runs": "ktlib.runs.notebooks",
    "lora_config": "ktlib.integrations.peft_lora",
    "merge_adapter": "ktlib.conversion.merge",
    "pin_experts": "ktlib.placement.pin",
    "place_experts": "ktlib.placement.numa",
    "record": "ktlib.runs.notebooks",
    "share_experts": "ktlib.placement.pin",
    "stack_experts": "ktlib.integrations.stored_weight",
    "trace_nonfinite": "ktlib.diagnosis.trace",
    "StopOnNonFinite": "ktlib.diagnosis.trainer_guard",
}

__all__ = ["Weight", "audit", "cpu_info", "moe_experts", "reference", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ktlib' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
