"""``adapter_config.json`` of an adapter with modules per expert, such that each of its readers takes it as it is meant.

=============================  =====================================================================================
reader                         what it does with the settings
=============================  =====================================================================================
PEFT on transformers 4         adapts the modules that ``target_modules`` names, one per expert, and (since 0.17) the
                               weights that ``target_parameters`` names
PEFT on transformers 5         in many families takes ``gate_proj``, ``up_proj``, ``down_proj`` (``w1``, ``w2``, ``w3``)
                               at the end of any target for the routed experts, so a shared expert's layer is adapted
                               only if ``target_parameters`` names its weight; fuses gate and up, with twice the rank
vLLM                           goes by the names of the tensors; before it knew ``rank_pattern`` and ``alpha_pattern``
                               it scaled all of them by ``lora_alpha / r``
SGLang                         goes by the last parts of ``target_modules``, which has to be a list
=============================  =====================================================================================
"""

import contextlib
import re
import warnings

from ktlib.integrations.lora_targets import taken_by_peft, unambiguous_ends
from ktlib.integrations.peft_settings import matches

LONGEST = 2000  # names in target_modules; PEFT compares each with each


def targets_in_files(model, spelling, modules, settings, made=None):
    """``target_modules``, ``target_parameters`` and patterns for ``{module in files: (weight, Pair)}``.

    Args:
        model, spelling: the base model on the meta device, and its
            :class:`ktlib.integrations.expert_names.ExpertLayout`.
        settings: with ``r`` and ``lora_alpha``, what the patterns make exceptions from.
        made: the LoraConfig of the adapter in PEFT's layout, or None for a reader that adapts modules alone.
    """
    in_peft = made.target_parameters if made else ()
    of_experts = {name for name, (weight, _) in modules.items() if weight in spelling.experts}
    by_weight = {name for name, (weight, _) in modules.items() if matches(weight, in_peft)} - of_experts
    both = {name: {name, *_in_transformers_5(weight)} for name, (weight, _) in modules.items()}
    as_modules = set().union(*(both[name] for name in both.keys() - by_weight))
    as_weights = {f"{one}.weight" for name in by_weight for one in both[name]}

    everything = {name for name, _ in model.named_modules()}
    everything |= {spelling.module_in_files(name) for name in everything} | set(spelling.linears(model))
    targets = _names_or_pattern(as_modules, everything)
    fused = _converted_by_peft(model, of_experts)
    rest = [one for one in in_peft if any(matches(name, [one]) for name in spelling.experts)]
    # PEFT converts gate and up to the name that they have where down_proj is adapted too.
    alone = [f"{one.removesuffix('gate_up_proj')}down_proj" for one in rest if one.endswith("gate_up_proj")]
    rest = sorted({*alone} - {*rest}) if fused else sorted({*rest, *alone})
    parameters = unambiguous_ends(as_weights, {f"{name}.weight" for name in everything})
    return {
        "target_modules": targets,
        "target_parameters": sorted({*parameters, *rest}) or None,
        **_patterns(modules, both, of_experts, by_weight, settings, fused if made else None),
    }


def _in_transformers_5(weight):
    """The module of a weight, if LoRA adapts it as a module there."""
    return [weight.removesuffix(".weight")] if weight.endswith(".weight") else []


def _names_or_pattern(chosen, everything):
    """``target_modules`` for these of all names: a list, or a pattern if that is too long or an end is another's."""
    with contextlib.suppress(ValueError):
        if len(ends := unambiguous_ends(chosen, everything)) <= LONGEST:
            return sorted(ends)
    return "|".join(sorted(set(map(_pattern, chosen))))


def _converted_by_peft(model, modules):
    """Whether PEFT, given the names of these modules of experts, adapts the parameters that hold them instead."""
    ends = {".".join(name.split(".")[-3:]) for name in modules}
    return bool(ends) and taken_by_peft(model, ends) == ends


def _pattern(name):
    """The name as a regular expression, with any number of an expert in it or none, as PEFT asks for the layer."""
    return re.sub(r"(?<=\\\.experts\\\.)\d+\\\.", r"(\\d+\\.)?", re.escape(name))


def _patterns(modules, both, of_experts, by_weight, settings, fused):
    """``rank_pattern`` and ``alpha_pattern``: what differs from the settings, and from what PEFT makes of them.

    ``fused`` says whether PEFT itself doubles rank and alpha of gate and up; None, that nobody fuses them.
    """
    growth = 2**0.5 if settings.get("use_rslora") else 2  # of alpha where the rank doubles, for the same scaling
    tables = {}
    for table, field, default in (("rank_pattern", "rank", "r"), ("alpha_pattern", "alpha", "lora_alpha")):
        kinds = {}
        for name, (weight, pair) in modules.items():
            value, usual = getattr(pair, field), settings[default]
            if name not in of_experts:
                for one in both[name]:
                    key = re.escape(one) + (r"(\.weight)?" if name in by_weight else "")
                    kinds.setdefault(key, {})[key] = value, usual
                continue
            _of_experts(kinds, re.sub(r"(?<=\.experts\.)\d+", "#", name), value, usual)
            if fused is not None:
                doubled = (2 if field == "rank" else growth) if weight.endswith("gate_up_proj") else 1
                _of_experts(kinds, weight, value * doubled, usual * 2 if fused and doubled != 1 else usual)
        found = {}
        for kind, of in kinds.items():
            of = {kind: next(iter(of.values()))} if len(set(of.values())) == 1 else of
            found |= {key: value for key, (value, usual) in of.items() if value != usual}
        tables[table] = found
    return tables


def _of_experts(kinds, name, value, usual):
    """One pattern for all layers' experts if they agree, else one for each layer's. ``#`` is any expert's number."""
    key = re.escape(name).replace(r"\#", r"\d+")
    kinds.setdefault(rf"experts{key.rpartition('experts')[2]}", {})[key] = value, usual


def warn_of_one_scaling(modules, settings):
    """A warning if tensors have different scalings: servers have been known to give one scaling to all."""
    power = 0.5 if settings.get("use_rslora") else 1
    scalings = sorted({round(pair.alpha / pair.rank**power, 9) for _, pair in modules.values()})
    if len(scalings) > 1:
        warnings.warn(
            f"rank_pattern, alpha_pattern: scalings from {scalings[0]:.4g} to {scalings[-1]:.4g} in one adapter, which "
            "PEFT applies each to its own weights; vLLM up to 0.30 scales all of them by lora_alpha / r",
            stacklevel=4,
        )
