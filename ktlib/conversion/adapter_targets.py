"""The settings of an adapter with modules per expert, chosen so that every reader applies it to the right weights.

=============================  =====================================================================================
reader                         what it does with the settings
=============================  =====================================================================================
PEFT on transformers 4         adapts the modules that ``target_modules`` names, one per expert, and (since 0.17) the
                               weights that ``target_parameters`` names
PEFT on transformers 5         in many families takes ``gate_proj``, ``up_proj``, ``down_proj`` (``w1``, ``w2``, ``w3``)
                               at the end of any target for the routed experts, so a shared expert's layer is adapted
                               only if ``target_parameters`` names its weight; fuses gate and up, with twice the rank
vLLM (read in 0.33)            reads the names of the tensors; refuses a layer of which only some experts or projections
                               have an adapter; leaves ``kv_b_proj`` out; up to 0.30 it scaled all experts by
                               ``lora_alpha / r``, later versions know ``use_rslora`` and the patterns
SGLang (read in 0.5.23)        reads the last component of each name in ``target_modules``, which has to be a list;
                               scales all pairs by ``lora_alpha / r`` and knows one rank; computes some layers together
                               with others, without which it cannot read their adapters
=============================  =====================================================================================
"""

import contextlib
import re
import warnings

from ktlib.integrations.lora_targets import taken_by_peft, unambiguous_ends
from ktlib.integrations.peft_settings import matches

# SGLang computes these layers together with others, and does not read the first without the second.
NEEDED_BY_SGLANG = {
    **{"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "kv_a_proj_with_mqa": "q_a_proj"},
    **{"up_proj": "gate_proj", "w3": "w1"},
}
# vLLM has the experts of these families stacked, as files on the hub mostly have them.
STACKED_BY_VLLM = "gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe"
LONGEST = 2000  # names in target_modules; PEFT compares every name with every module


def targets_in_files(model, spelling, modules, settings, made=None):
    """``target_modules``, ``target_parameters``, ``rank_pattern`` and ``alpha_pattern`` of an adapter.

    Args:
        model, spelling: the base model on the meta device, and its
            :class:`ktlib.integrations.expert_names.ExpertLayout`.
        modules: ``{module in files: (weight, Pair)}``.
        settings: has ``r`` and ``lora_alpha``; a pattern stands for each exception from these.
        made: the LoraConfig of the adapter in PEFT's layout, or None for a reader that adapts modules alone.
    """
    in_peft = made.target_parameters if made else ()
    of_experts = {name for name, (weight, _) in modules.items() if weight in spelling.experts}
    by_weight = {name for name, (weight, _) in modules.items() if matches(weight, in_peft)} - of_experts
    # The names of each module in files and, for a reader that has transformers 5, in the model.
    both = {name: {name, *_module_of(weight)} for name, (weight, _) in modules.items()}
    as_modules = set().union(*(both[name] for name in both.keys() - by_weight))
    as_weights = {f"{module}.weight" for name in by_weight for module in both[name]}

    everything = {name for name, _ in model.named_modules()}
    everything |= {spelling.module_in_files(name) for name in everything} | set(spelling.linears(model))
    targets = _names_or_pattern(as_modules, everything)
    fused = _converted_by_peft(model, of_experts)
    experts = {target for target in in_peft if any(matches(name, [target]) for name in spelling.experts)}
    # PEFT converts gate and up to the name that they have if down_proj is adapted, too. So down_proj must be a target.
    down = {f"{name.removesuffix('gate_up_proj')}down_proj" for name in experts if name.endswith("gate_up_proj")}
    experts = down - experts if fused else experts | down
    parameters = unambiguous_ends(as_weights, {f"{name}.weight" for name in everything})
    return {
        "target_modules": targets,
        "target_parameters": sorted({*parameters, *experts}) or None,
        **_patterns(modules, both, of_experts, by_weight, settings, fused if made else None),
    }


def _module_of(weight):
    """``[module]`` of a weight in transformers 5 that LoRA adapts as a module, else ``[]``."""
    return [weight.removesuffix(".weight")] if weight.endswith(".weight") else []


def _names_or_pattern(chosen, everything):
    """``target_modules`` for the ``chosen`` names: a list of ends that match no other name in ``everything``, or a
    regular expression if there is no such list or if it is too long."""
    with contextlib.suppress(ValueError):
        if len(ends := unambiguous_ends(chosen, everything)) <= LONGEST:
            return sorted(ends)
    return "|".join(sorted(set(map(_pattern, chosen))))


def _converted_by_peft(model, modules):
    """Whether PEFT, if these modules of experts are targets, adapts the fused parameters of the experts instead."""
    ends = {".".join(name.split(".")[-3:]) for name in modules}
    return bool(ends) and taken_by_peft(model, ends) == ends


def _pattern(name):
    """A regular expression for the name with any expert's number, or without, as PEFT looks for a layer's experts."""
    return re.sub(r"(?<=\\\.experts\\\.)\d+\\\.", r"(\\d+\\.)?", re.escape(name))


def _patterns(modules, both, of_experts, by_weight, settings, fused):
    """``rank_pattern`` and ``alpha_pattern`` of the pairs that differ from the settings, or from PEFT's use of them.

    ``fused`` says whether PEFT itself doubles rank and alpha of gate and up as it fuses them; None means that no reader
    fuses them.
    """
    tables = {}
    for table, field, default in (("rank_pattern", "rank", "r"), ("alpha_pattern", "alpha", "lora_alpha")):
        kinds = {}
        for name, (weight, pair) in modules.items():
            value, usual = getattr(pair, field), settings[default]
            if name not in of_experts:
                for module in both[name]:
                    key = re.escape(module) + (r"(\.weight)?" if name in by_weight else "")
                    kinds.setdefault(key, {})[key] = value, usual
                continue
            _add_experts(kinds, re.sub(r"(?<=\.experts\.)\d+", "#", name), value, usual)
            if fused is not None:
                doubled = 2 if weight.endswith("gate_up_proj") else 1
                _add_experts(kinds, weight, value * doubled, usual * doubled if fused else usual)
        tables[table] = {}
        for kind, by_key in kinds.items():
            patterns = {kind: next(iter(by_key.values()))} if len(set(by_key.values())) == 1 else by_key
            tables[table] |= {pattern: value for pattern, (value, usual) in patterns.items() if value != usual}
    return tables


def _add_experts(kinds, name, value, usual):
    """Add experts to ``{pattern for all layers: {pattern for one layer: (value, usual value)}}``.

    ``#`` in ``name`` stands for any expert's number.
    """
    key = re.escape(name).replace(r"\#", r"\d+")
    kinds.setdefault(rf"experts{key.rpartition('experts')[2]}", {})[key] = value, usual


def warn_of_servers(modules, spelling, settings):
    """Warn of what PEFT reads from these ``{module in files: (weight, Pair)}`` and servers do not.

    ``settings`` are those of the file, with ``target_modules``.
    """
    for text in _not_for_servers(modules, spelling, settings):
        warnings.warn(text, stacklevel=4)


def _not_for_servers(modules, spelling, settings):
    scalings = sorted({round(pair.alpha / pair.rank, 9) for _, pair in modules.values()})
    if len(scalings) > 1:
        yield (
            f"rank_pattern, alpha_pattern: scalings from {scalings[0]:.4g} to {scalings[-1]:.4g} in one adapter, which "
            "PEFT applies each to its own weights; SGLang and, up to 0.30, vLLM scale all of them by lora_alpha / r"
        )
    adapted = {weight for weight, _ in modules.values()}
    layers = {weight.rpartition(".")[0] for weight in adapted if weight in spelling.experts}
    if layers and spelling.model_type.startswith(STACKED_BY_VLLM):
        yield f"layout: vLLM has the experts of {spelling.model_type!r} stacked and needs layout 'peft'"
    for weight in spelling.experts:
        if weight.rpartition(".")[0] in layers and weight not in adapted:
            yield f"target_parameters: {weight} has no adapter; vLLM takes gate, up and down of a layer together only"
            break
    for name in modules:
        stem, _, leaf = name.rpartition(".")
        needed = NEEDED_BY_SGLANG.get(leaf)
        if needed and f"{stem}.{needed}" not in modules:
            yield f"target_modules: {name} has an adapter and {needed} beside it has none; SGLang does not read that"
            break
    targets, leaves = settings["target_modules"], {name.rpartition(".")[2] for name in modules}
    if "kv_b_proj" in leaves:
        yield (
            "target_modules: kv_b_proj has an adapter, which vLLM leaves out without a word, since it multiplies that "
            "layer into others when it starts; adapt the model without kv_b_proj, or merge the adapter, for vLLM"
        )
    if isinstance(targets, str):
        yield "target_modules: a pattern, because a list would be very long; SGLang takes lists only"
    elif unnamed := leaves - {target.rpartition(".")[2] for target in targets}:
        yield (
            f"target_modules: lacks {', '.join(sorted(unnamed))}, which PEFT would take for routed experts; start "
            "SGLang with --lora-target-modules all"
        )
    if settings.get("modules_to_save"):
        yield "modules_to_save: vLLM refuses adapters with whole layers, and SGLang leaves the layers out"
