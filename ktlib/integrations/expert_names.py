"""How weights are spelled outside transformers 5: one module per expert and projection, and other names.

transformers 5 holds the experts of a layer as ``mlp.experts.gate_up_proj (E, 2I, H)`` and ``mlp.experts.down_proj
(E, H, I)``. Files on the hub and adapters made with transformers 4 have ``mlp.experts.3.gate_proj.weight (I, H)`` and
so on (Mixtral: ``block_sparse_moe.experts.3.w1.weight``). Multimodal checkpoints have other prefixes as well.
transformers says how each of its classes reads its checkpoints; this module only reads what it says.
"""

import re
from typing import NamedTuple

import torch

from ktlib.integrations.model_class import decoder_name
from ktlib.integrations.transformers_experts import is_experts

FUSED = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}  # the second without a gate


class Part(NamedTuple):
    """One projection of one expert: the fused parameter it belongs to, which part of it, and the expert's number."""

    parameter: str
    part: str
    expert: int


class _Spelling(NamedTuple):
    """Where files have a part of a weight whose name ends in ``target``: under ``source``, ``*`` for the expert."""

    part: str
    source: str
    target: str
    group: int | None  # where a list of modules in files holds the experts of several weights: which of them this is
    prefixes: tuple  # what the names begin with


class ExpertLayout:
    """The spelling in files of the weights of a model; the meta device will do.

    Attributes:
        per_expert: whether files have a module per expert and projection.
    """

    def __init__(self, model):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        self.model_type = model.config.model_type
        self.names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.prefix, self.decoder = model.base_model_prefix, decoder_name(model)
        self.experts = {
            f"{name}.{leaf}": getattr(module, leaf).shape[0]
            for name, module in model.named_modules()
            if is_experts(module)
            for leaf in FUSED
            if hasattr(module, leaf)
        }
        rules = get_model_conversion_mapping(model, add_legacy=False)
        self.renames = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        # As transformers saves a model: a prefix that may be there or not when it is read is not added.
        back = [rule for rule in reversed(self.renames) if not isinstance(rule, PrefixChange)]
        self.back = [rule.reverse_transform() for rule in back]
        self.spellings, self.computed = [], []
        for rule in rules:
            if not isinstance(rule, WeightRenaming):
                found = _spellings(rule)
                self.spellings += found
                self.computed += [] if found else [rule]
        self.per_expert = {one.part for one in self.spellings if "*" in one.source} >= {"up", "down"}

    def require_per_expert(self):
        """ValueError if files do not hold these experts one by one."""
        if not self.per_expert:
            of_experts = [rule for rule in self.computed if ".experts" in rule.target_patterns[0]]
            how = sorted({type(one).__name__ for rule in of_experts for one in rule.operations})
            raise ValueError(
                f"model: transformers knows no per-expert spelling of the experts of {self.model_type!r}: checkpoints "
                f"hold them stacked{' (' + ', '.join(how) + ')' if how else ''}, as layout 'peft' does"
            )

    # -------------------------------------------------------------------------------------------- from files

    def located(self, name, other_classes=True):
        """What a weight's name in a file stands for in the model: a :class:`Part`, or a name.

        The name may be in old or new spelling, with ``other_classes`` also that of the text class alone in a file for
        a multimodal one, and the other way round, or that of the model without its head. A name that stands for
        nothing in the model comes out as the part or the name that it would be.
        """
        variants = [name, *(self._of_other_class(name) if other_classes else [])]
        if there := next((one for one in variants if one in self.names), None):
            return there
        renamed = [self._fused_name(one) for one in variants]
        for one in list(renamed) if other_classes else ():
            renamed += [f"{self.prefix}.{one}", *self._of_other_class(one)]
        parts = [part for one in renamed if (part := self._part(one))]
        if part := next((one for one in parts if one.parameter in self.names), None):
            return part
        if there := next((one for one in renamed if one in self.names), None):
            return there
        return parts[0] if parts else renamed[0]

    def _of_other_class(self, name):
        """The name below the decoder of this class of what is below another class's, in a list; none elsewhere."""
        below = next((name.removeprefix(one) for one in _DECODERS if name.startswith(one)), None)
        return [] if below is None else [f"{self.decoder}.{below}"]

    def of_text_class(self, module):
        """The name in the text class of a module in the decoder, else None."""
        return f"model.{module.removeprefix(f'{self.decoder}.')}" if module.startswith(f"{self.decoder}.") else None

    def _fused_name(self, name):
        for rule in self.renames:
            name, _ = rule.rename_source_key(name)
        return name

    def _part(self, name):
        for one in self.spellings:
            pattern = re.escape(one.source).replace(r"\*", r"(\d+)")
            if name.startswith(one.prefixes) and (match := re.fullmatch(rf"(.*?){pattern}", name)):
                expert = int(match[2]) if "*" in one.source else 0
                parameter = match[1] + one.target
                first = self._first(one, parameter)
                if one.group is None or first <= expert < first + self.experts.get(parameter, 0):
                    return Part(parameter, one.part, expert - first)
        return None

    def _first(self, spelling, parameter):
        """The number in files of a weight's first expert."""
        return (spelling.group or 0) * self.experts.get(parameter, 0)

    # ---------------------------------------------------------------------------------------------- to files

    def parts(self, weight):
        """The parts in which files hold a weight, such as ``("gate", "up")``; ``()`` if they hold it whole."""
        return tuple(one.part for one in self._spellings_of(weight))

    def part_name(self, part):
        """The name in files of a :class:`Part`, the inverse of :meth:`located`."""
        one = next(one for one in self._spellings_of(part.parameter) if one.part == part.part)
        expert = part.expert + self._first(one, part.parameter)
        return self._old_name(part.parameter.removesuffix(one.target) + one.source.replace("*", str(expert)))

    def old_name(self, name):
        """The name in files of a weight that they hold whole.

        Raises:
            ValueError: they hold it in another form, which no LoRA pair can be moved to.
        """
        for rule in self.computed:
            back = rule.reverse_transform()
            if back.rename_source_key(name)[1] is not None:
                how = ", ".join(type(one).__name__ for one in rule.operations)
                raise ValueError(
                    f"layout: {name} is adapted, which checkpoints of {self.model_type!r} hold in another form "
                    f"({how}), so it has no name there; layout 'peft' has one"
                )
        return self._old_name(name)

    def name_in_files(self, module):
        """The name in files of a module that they hold whole."""
        return self._old_name(f"{module}.weight").removesuffix(".weight")

    def _old_name(self, name):
        for rule in self.back:
            name, _ = rule.rename_source_key(name)
        return name

    def _spellings_of(self, weight):
        fit = [one for one in self.spellings if weight.endswith(one.target) and weight.startswith(one.prefixes)]
        return list({one.part: one for one in reversed(fit)}.values())[::-1]  # the first, where two rules say the same

    def linears(self, model):
        """``{linear layer as files name it: weight in transformers 5}``, with those of the experts."""
        found = {}
        for name, module in model.named_modules():
            weights = [f"{name}.weight"] if isinstance(module, torch.nn.Linear) else []
            weights += [weight for leaf in FUSED if (weight := f"{name}.{leaf}") in self.experts]
            for weight in weights:
                parts = self.parts(weight)
                old = [Part(weight, part, e) for part in parts for e in range(self.experts.get(weight, 1))]
                names = [self.part_name(part) for part in old] or [self._old_name(weight)]
                found |= {old.removesuffix(".weight"): weight for old in names}
        return found


_DECODERS = ("model.language_model.", "language_model.model.", "model.")  # longest first


def _spellings(rule):
    """The :class:`_Spelling` s that a rule of transformers says, if it stacks experts or joins parts; else none."""
    operations = [(type(one).__name__, getattr(one, "dim", None)) for one in rule.operations]
    targets = [target.replace(r"\.", ".") for target in rule.target_patterns]
    sources = [source.replace(r"\.", ".") for source in rule.source_patterns]
    leaf = targets[0].removesuffix(".weight").rpartition(".")[2]
    parts = FUSED.get(leaf, ())
    stacked = all("*" in source for source in sources)
    ways = {True: ([("MergeModulelist", 0), ("Concatenate", 1)][: len(parts)],), False: ([("Concatenate", 0)],)}
    ernie = [("ErnieFuseAndSplitTextVisionExperts", None)]  # the first half of the list are one module's, and so on
    known = operations in ways[stacked] or (stacked and operations == ernie)
    if not parts or len(sources) != len(parts) or not known:
        return []
    prefixes = ("",)
    if rule.scope_prefix is not None:
        scope = f"{rule.scope_prefix}." if rule.scope_prefix else ""
        prefixes = (f"{rule.base_model_prefix}.{scope}", scope)
    return [
        _Spelling(part, source, target, group if len(targets) > 1 else None, prefixes)
        for group, target in enumerate(targets)
        for part, source in zip(parts, sources, strict=True)
    ]
