"""How the experts of a model family are spelled outside transformers 5: one module per expert and projection.

transformers 5 holds the experts of a layer as ``mlp.experts.gate_up_proj (E, 2I, H)`` and ``mlp.experts.down_proj
(E, H, I)``. Files on the hub and adapters made with transformers 4 have ``mlp.experts.3.gate_proj.weight (I, H)`` and
so on (Mixtral: ``block_sparse_moe.experts.3.w1.weight``). transformers says which family spells them how; this module
only reads what it says.
"""

import re
from typing import NamedTuple

import torch

from .experts import is_experts

FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class Part(NamedTuple):
    """One projection of one expert: the fused parameter it belongs to, which part of it, and the expert's number."""

    parameter: str
    part: str
    expert: int


class ExpertLayout:
    """The per-expert spelling of a model family.

    Args:
        model_type: of a transformers config, such as "deepseek_v2".

    Raises:
        ValueError: transformers knows no per-expert spelling of this family, or one that is not stacked and
            concatenated only.
    """

    def __init__(self, model_type):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        self.model_type, self.renames, self.spellings = model_type, [], {}
        for rule in get_checkpoint_conversion_mapping(model_type) or ():
            (target, *others), operations = rule.target_patterns, getattr(rule, "operations", None) or []
            leaf = target.rpartition(".")[2]
            if not operations and not others and len(rule.source_patterns) == 1:
                self.renames.append((rule.source_patterns[0], target))
            elif leaf in FUSED and ".experts" in target:
                kinds = [(type(one).__name__, one.dim) for one in operations]
                wanted = [("MergeModulelist", 0), ("Concatenate", 1)][: len(FUSED[leaf])]
                if kinds != wanted or len(rule.source_patterns) != len(FUSED[leaf]):
                    raise ValueError(f"model: {model_type} stores {leaf} in a way that is not supported: {kinds}")
                sources = (pattern.removeprefix(".") for pattern in rule.source_patterns)
                for part, source in zip(FUSED[leaf], sources, strict=True):
                    self.spellings[part] = (source, target.removeprefix("."))
        if set(self.spellings) != {"gate", "up", "down"}:
            raise ValueError(f"model: transformers knows no per-expert spelling of the experts of {model_type!r}")

    def fused_name(self, name):
        """The name in transformers 5 of a weight that is no expert's, such as ``model.norm.weight``."""
        for source, target in self.renames:
            name = re.sub(source, target, name)
        return name

    def part(self, name):
        """The :class:`Part` that a per-expert weight's name stands for, or None: ``...experts.3.up_proj.weight``."""
        name = self.fused_name(name)
        for part, (source, target) in self.spellings.items():
            pattern = re.escape(source).replace(r"\*", r"(\d+)")
            if match := re.fullmatch(rf"(.*?){pattern}", name):
                return Part(match[1] + target, part, int(match[2]))
        return None

    def per_expert_name(self, part):
        """The name of the weight of a :class:`Part`, the inverse of :meth:`part`."""
        source, target = self.spellings[part.part]
        name = part.parameter.removesuffix(target) + source.replace("*", str(part.expert))
        return self.old_name(name)

    def old_name(self, name):
        """The inverse of :meth:`fused_name`."""
        for source, target in reversed(self.renames):
            name = name.replace(target, source)
        return name

    def linears(self, model):
        """``{linear layer in the old spelling: weight in transformers 5}``, with those of the experts."""
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                found[self.old_name(name)] = f"{name}.weight"
            for leaf, parts in FUSED.items() if is_experts(module) else ():
                parameter = f"{name}.{leaf}"
                for expert in range(getattr(module, leaf).shape[0]):
                    for part in parts:
                        old = self.per_expert_name(Part(parameter, part, expert))
                        found[old.removesuffix(".weight")] = parameter
        return found
