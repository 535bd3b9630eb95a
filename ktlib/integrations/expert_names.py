"""Names of weights in files and in models: files hold one module per expert and projection, and other names besides.

transformers 5 holds the experts of a layer as ``mlp.experts.gate_up_proj (E, 2I, H)`` and ``mlp.experts.down_proj
(E, H, I)``. Checkpoints on the hub and adapters made with transformers 4 hold ``mlp.experts.3.gate_proj.weight (I, H)``
and so on (Mixtral: ``block_sparse_moe.experts.3.w1.weight``). In multimodal checkpoints the names also begin otherwise.
transformers has rules by which it reads the checkpoints of each class; this module derives all names from these rules.
"""

import re
from typing import NamedTuple

import torch

from ktlib.integrations.model_classes import decoder_name
from ktlib.integrations.transformers_experts import is_experts

# The projections in each fused parameter. Experts have gate_up_proj, or if they have no gate up_proj.
FUSED = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


class ExpertProjection(NamedTuple):
    """One projection of one expert, by its place in a fused parameter."""

    parameter: str  # the fused parameter's name
    projection: str  # "gate", "up" or "down"
    expert: int


class _Spelling(NamedTuple):
    """How files name a projection of the weights whose names end in ``target``."""

    projection: str
    source: str  # the end of the name in files, with ``*`` for the number of the expert
    target: str
    group: int | None  # if files number the experts of several weights consecutively: which of these weights this is
    prefixes: tuple  # the name begins with one of these


class ExpertLayout:
    """The names in files of the weights of a model; a model on the meta device will do.

    Attributes:
        per_expert: whether files have a module per expert and projection.
    """

    def __init__(self, model):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        self.model_type = model.config.model_type
        self.names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.prefix, self.decoder = model.base_model_prefix, decoder_name(model)
        self.experts = {  # {fused parameter: number of experts}
            f"{name}.{leaf}": getattr(module, leaf).shape[0]
            for name, module in model.named_modules()
            if is_experts(module)
            for leaf in FUSED
            if hasattr(module, leaf)
        }
        rules = get_model_conversion_mapping(model, add_legacy=False)
        self.renames = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        # As when transformers saves a model: prefixes that are optional when a file is read are not added.
        reversible = [rule for rule in reversed(self.renames) if not isinstance(rule, PrefixChange)]
        self.reverse_renames = [rule.reverse_transform() for rule in reversible]
        self.spellings, self.computed = [], []  # `computed`: rules that do more than rename, stack and concatenate
        for rule in rules:
            if not isinstance(rule, WeightRenaming):
                spellings = _spellings(rule)
                self.spellings += spellings
                self.computed += [] if spellings else [rule]
        apart = {spelling.projection for spelling in self.spellings if "*" in spelling.source}
        self.per_expert = apart >= {"up", "down"}

    # -------------------------------------------------------------------------------------------- from files

    def located(self, name, other_classes=True):
        """What a weight's name in a file stands for in the model: an :class:`ExpertProjection`, or a weight's name.

        Args:
            name: as transformers 5 or as files name the weight.
            other_classes: also accept the name that the weight has in the text class if the model is multimodal, in the
                multimodal class if the model is the text class, and in the model without its head.

        If the name stands for nothing in the model, the result is the projection or name that it would stand for.
        """
        variants = [name, *(self._in_this_class(name) if other_classes else [])]
        if known := next((variant for variant in variants if variant in self.names), None):
            return known
        renamed = [self._apply(self.renames, variant) for variant in variants]
        for variant in list(renamed) if other_classes else ():
            renamed += [f"{self.prefix}.{variant}", *self._in_this_class(variant)]
        projections = [projection for variant in renamed if (projection := self._projection(variant))]
        if known := next((projection for projection in projections if projection.parameter in self.names), None):
            return known
        if known := next((variant for variant in renamed if variant in self.names), None):
            return known
        return projections[0] if projections else renamed[0]

    def _in_this_class(self, name):
        """``[name in this class]`` of a weight that ``name`` places in any class's decoder; else ``[]``."""
        prefix = next((prefix for prefix in _DECODERS if name.startswith(prefix)), None)
        return [] if prefix is None else [f"{self.decoder}.{name.removeprefix(prefix)}"]

    def of_text_class(self, module):
        """The name that a module of the decoder has in the text class; None for a module outside the decoder."""
        return f"model.{module.removeprefix(f'{self.decoder}.')}" if module.startswith(f"{self.decoder}.") else None

    def _apply(self, renames, name):
        for rule in renames:
            name, _ = rule.rename_source_key(name)
        return name

    def _projection(self, name):
        """The :class:`ExpertProjection` that a name in files stands for, or None."""
        for spelling in self.spellings:
            pattern = re.escape(spelling.source).replace(r"\*", r"(\d+)")
            if name.startswith(spelling.prefixes) and (match := re.fullmatch(rf"(.*?){pattern}", name)):
                number = int(match[2]) if "*" in spelling.source else 0
                parameter = match[1] + spelling.target
                first = self._first_number(spelling, parameter)
                if spelling.group is None or first <= number < first + self.experts.get(parameter, 0):
                    return ExpertProjection(parameter, spelling.projection, number - first)
        return None

    def _first_number(self, spelling, parameter):
        """The number that files give to the first expert of a fused parameter."""
        return (spelling.group or 0) * self.experts.get(parameter, 0)

    # ---------------------------------------------------------------------------------------------- to files

    def projections(self, weight):
        """The projections in which files hold a weight, such as ``("gate", "up")``; ``()`` if they hold it whole."""
        return tuple(spelling.projection for spelling in self._spellings_of(weight))

    def projection_in_files(self, projection):
        """The name in files of an :class:`ExpertProjection`, the inverse of :meth:`located`."""
        parameter, label, expert = projection
        spelling = next(spelling for spelling in self._spellings_of(parameter) if spelling.projection == label)
        number = expert + self._first_number(spelling, parameter)
        source = spelling.source.replace("*", str(number))
        return self._apply(self.reverse_renames, parameter.removesuffix(spelling.target) + source)

    def weight_in_files(self, name):
        """The name in files of a weight that they hold whole.

        Raises:
            ValueError: files hold values computed from the weight, for which no LoRA pair can stand.
        """
        if (rule := self.computing(name)) is not None:
            raise ValueError(
                f"layout: {name} is adapted, which checkpoints of {self.model_type!r} hold in another form "
                f"({operations_of(rule)}), so it has no name there; layout 'peft' has one"
            )
        return self._apply(self.reverse_renames, name)

    def computing(self, name):
        """The rule of transformers by which a weight is computed from files that hold it in another form, or None."""
        reverses = ((rule, rule.reverse_transform()) for rule in self.computed)
        return next((rule for rule, reverse in reverses if reverse.rename_source_key(name)[1] is not None), None)

    def module_in_files(self, module):
        """The name in files of a module whose weight they hold whole."""
        return self._apply(self.reverse_renames, f"{module}.weight").removesuffix(".weight")

    def _spellings_of(self, weight):
        """One :class:`_Spelling` for each projection of a weight: the first of those that fit."""
        spellings = {}
        for spelling in self.spellings:
            if weight.endswith(spelling.target) and weight.startswith(spelling.prefixes):
                spellings.setdefault(spelling.projection, spelling)
        return list(spellings.values())

    def linears(self, model):
        """``{linear layer as files name it: weight in transformers 5}``, with the projections of the experts."""
        found = {}
        for name, module in model.named_modules():
            weights = [f"{name}.weight"] if isinstance(module, torch.nn.Linear) else []
            weights += [weight for leaf in FUSED if (weight := f"{name}.{leaf}") in self.experts]
            for weight in weights:
                names = [
                    self.projection_in_files(ExpertProjection(weight, projection, expert))
                    for projection in self.projections(weight)
                    for expert in range(self.experts.get(weight, 1))
                ]
                names = names or [self._apply(self.reverse_renames, weight)]
                found |= {name.removesuffix(".weight"): weight for name in names}
        return found


def operations_of(rule):
    """The names of a rule's operations, for errors."""
    return ", ".join(type(operation).__name__ for operation in rule.operations)


def is_transposed_by_shape(rule):
    """Whether all that a rule does is to transpose weights, and only those whose shape is not that of the class."""
    kinds = [(type(operation).__name__, getattr(operation, "check_dims", False)) for operation in rule.operations]
    return kinds == [("Transpose", True)]


_DECODERS = ("model.language_model.", "language_model.model.", "model.")  # longest first


def _spellings(rule):
    """The list of :class:`_Spelling` that a rule of transformers means; [] if it does not stack or fuse projections."""
    operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in rule.operations]
    targets = [target.replace(r"\.", ".") for target in rule.target_patterns]
    sources = [source.replace(r"\.", ".") for source in rule.source_patterns]
    leaf = targets[0].removesuffix(".weight").rpartition(".")[2]
    projections = FUSED.get(leaf, ())
    if all("*" in source for source in sources):
        known = (
            [("MergeModulelist", 0), ("Concatenate", 1)][: len(projections)],
            # files number the experts of several weights consecutively, in equal groups
            [("ErnieFuseAndSplitTextVisionExperts", None)],
        )
    else:
        known = ([("Concatenate", 0)],)
    if not projections or len(sources) != len(projections) or operations not in known:
        return []
    prefixes = ("",)
    if rule.scope_prefix is not None:
        scope = f"{rule.scope_prefix}." if rule.scope_prefix else ""
        prefixes = (f"{rule.base_model_prefix}.{scope}", scope)
    return [
        _Spelling(projection, source, target, group if len(targets) > 1 else None, prefixes)
        for group, target in enumerate(targets)
        for projection, source in zip(projections, sources, strict=True)
    ]
