"""Chooses the modules and parameters that get adapters, and names by which PEFT finds exactly these.

PEFT compares every name in ``target_modules`` with the ends of the names of **all** modules, whatever their type, and
every name in ``target_parameters`` with the ends of the names of all parameters. A short end may therefore also match
a vision tower's convolution, or a wrapper that PEFT cannot adapt. Here targets are chosen module by module, and given
to PEFT as ends that no other module or parameter of the model has.
"""

import difflib
import functools
import re

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ktlib.integrations.peft_settings import by_end, matches
from ktlib.integrations.transformers_experts import is_experts
from ktlib.names import bare_model, bare_modules, component

DEFAULT_COMPONENTS = ("self_attn", "shared_experts", "dense_mlp")
# The module types for which PEFT has a LoRA layer.
_ADAPTABLE = (
    *(torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
    *(torch.nn.MultiheadAttention, Conv1D),
)
# Each layer of ERNIE-4.5-VL's language model has two sets of experts; these are never given a text token.
_EXPERTS_OF_IMAGES = r"\.vision_moe\."


def language_modules(model):
    """The set of names of a model's language modules, without the output head.

    A multimodal model of transformers is a tree of ``PreTrainedModel``, each with a config. The language model is in
    ``get_decoder()`` and has the config that ``get_text_config`` returns. Towers for images, video and audio have
    other configs. Projectors between towers and language model, and output heads, belong to classes further outside.

    If the model is not of transformers, or has no language model, the set holds the names of all modules.
    """
    modules = dict(bare_modules(model))
    model = modules.get("", model)
    if not isinstance(model, PreTrainedModel):
        return set(modules)
    text_config_class = type(model.config.get_text_config(decoder=True))
    decoder = model if model.config.is_encoder_decoder else model.get_decoder()
    owners, in_decoder, names = {}, set(), set()  # owners: the innermost PreTrainedModel around each module
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        owner = owners[name] = module if isinstance(module, PreTrainedModel) else owners.get(parent)
        if module is decoder or parent in in_decoder:
            in_decoder.add(name)
            is_text = type(owner.config) is text_config_class or owner is decoder is not model
            names |= {name} if is_text and owner.base_model is owner else set()
    return {name for name in names if not re.search(_EXPERTS_OF_IMAGES, f".{name}.")} or set(modules)


def unambiguous_ends(chosen, names, from_layer=False):
    """The shortest ends of names that by PEFT's rule match all ``chosen`` of ``names``, and no other name.

    Args:
        from_layer: whether an end begins at or before the name that follows the layer's number, as in
            "mlp.experts.down_proj".

    Raises:
        ValueError: a chosen name is the end of a name that is not chosen.
    """
    chosen, matching, ends = set(chosen), by_end(names), set()
    matches_chosen_only = functools.cache(lambda end: chosen.issuperset(matching[end]))  # many experts share an end
    for name in chosen:
        words = name.split(".")
        last_number = max((i for i, word in enumerate(words) if word.isdigit()), default=-1)
        starts = range(last_number + 1 if from_layer else len(words) - 1, -1, -1)
        candidates = (".".join(words[start:]) for start in starts if start == 0 or not words[start].isdigit())
        end = next(filter(matches_chosen_only, candidates), None)
        if end is None:
            other = next(other for other in matching[name] if other not in chosen)
            raise ValueError(f"{name}: PEFT cannot adapt it without {other}, whose name ends the same")
        ends.add(end)
    return ends


# ---- parameters -----------------------------------------------------------------------------------------------------


def chosen_parameters(model, modules, language, targets, excluded):
    """The ends of names, for PEFT, of the parameters that ``target_parameters`` of :func:`ktlib.lora_config` means."""
    owners = {
        f"{name}.{leaf}": name for name, module in modules.items() for leaf, _ in module.named_parameters(recurse=False)
    }
    if targets is None:
        chosen = _parameters_of_experts(model, modules, language)
    else:
        matching, chosen = by_end(owners), []
        for target in targets:
            if target not in matching:
                raise ValueError(_unknown("target_parameters", target, owners))
            chosen += [name for name in matching[target] if owners[name] in language] or matching[target]
    # PEFT does not apply exclude_modules to parameters.
    chosen = [name for name in chosen if not (matches(name, excluded) or matches(owners[name], excluded))]
    return sorted(unambiguous_ends(chosen, owners, from_layer=True))


def _parameters_of_experts(model, modules, language):
    """Names of the 3-D weights of all routed experts in the language model; ValueError if there are none."""
    chosen = [
        f"{name}.{leaf}"
        for name, module in modules.items()
        if name in language and is_experts(module)
        for leaf, value in module.named_parameters(recurse=False)
        if value.dim() == 3
    ]
    if chosen:
        return chosen
    model = bare_model(model)
    advice = "target_parameters=[] adapts the other layers alone"
    own_forward = [  # modules of routed experts that transformers' interface does not reach
        name
        for name, module in modules.items()
        if name in language and (name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts"))
    ]
    if not own_forward:
        raise ValueError(f"model: {type(model).__name__} has no routed experts; {advice}")
    inside = [name for name in modules if any(f"{name}.".startswith(f"{experts}.") for experts in own_forward)]
    layers = [name for name in inside if _can_adapt(modules[name]) and component(name) != "router"]
    weights = [
        f"{name}.{leaf}"
        for name in inside
        for leaf, value in modules[name].named_parameters(recurse=False)
        if value.dim() == 3 and not _can_adapt(modules[name])
    ]
    if weights:
        names = ", ".join(map(repr, sorted(unambiguous_ends(weights, weights, from_layer=True))))
        advice += f"; target_parameters=[{names}] adapts them too, as stock PEFT does, by a dense W + BA"
    elif layers:
        advice += f"; target_modules can name the linear layers in them, such as {layers[0]!r}"
    name = own_forward[0]
    raise ValueError(
        f"model: {type(model).__name__} computes its experts ({type(modules[name]).__name__}, at {name}) in a forward "
        f"of its own and not through transformers' experts interface, so ktlib cannot serve them; {advice}"
    )


# ---- layers ---------------------------------------------------------------------------------------------------------


def chosen_layers(model, modules, language, targets):
    """The layers that ``target_modules`` of :func:`ktlib.lora_config` asks for.

    Args:
        model, modules: the base model, and all its modules as ``{name: module}``.
        language: the names in ``modules`` that belong to the language model.
        targets: ``target_modules``: None, "all-linear", a regular expression, or a list of names or ends of names.

    Returns:
        The full names of the layers to adapt, and a list of targets that mean routed experts: names of layers that
        each expert had in transformers 4, and that PEFT converts to names of expert parameters.

    Raises:
        ValueError: a target is not in the model, or PEFT cannot adapt it.
    """
    linears = linear_layers(model, modules)
    language_linears = [name for name in linears if name in language]
    if targets is None:
        return [name for name in language_linears if component(name) in DEFAULT_COMPONENTS], []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return language_linears, []
    if isinstance(targets, str):
        return _matching(targets, modules, linears), []
    chosen, expert_targets, matching = {}, [], by_end(modules)
    for target in targets:
        found = [name for name in matching.get(target, []) if name in language]
        if not found and _may_mean_routed_experts(target) and taken_by_peft(model, [target]):
            expert_targets.append(target)
            continue
        found = found or matching.get(target, [])
        if not found:
            raise ValueError(_unknown("target_modules", target, modules))
        chosen |= dict.fromkeys(_adaptable(target, found, modules, linears))
    return list(chosen), expert_targets


def linear_layers(model, modules):
    """``{name: module}`` of the linear layers that PEFT can adapt, without the output head and the routers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and _can_adapt(module)
        and module is not head
        and component(name) != "router"
        and not _refused_by_peft(model, name)
    }


def _can_adapt(module):
    """Whether PEFT has a LoRA layer for a module that computes LoRA of the module's function.

    PEFT treats every subclass of Linear as a linear layer. But a subclass in a model's own code whose forward is not
    that of Linear may compute something else, as DeepSeek-V4's grouped linear layer does. Subclasses elsewhere, such as
    layers with quantised weights, are linear although their forward is another one.
    """
    cls = type(module)
    of_a_model = cls.__module__.startswith(("transformers.models.", "transformers_modules."))
    nonlinear = isinstance(module, torch.nn.Linear) and cls.forward is not torch.nn.Linear.forward and of_a_model
    return isinstance(module, _ADAPTABLE) and not nonlinear


def _refused_by_peft(model, name):
    """Whether PEFT refuses a module because Mamba's kernels read its weight directly and would ignore the adapter."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _adaptable(target, found, modules, linears):
    """Those of the ``found`` modules that are linear layers; if none is, those that PEFT can adapt; else ValueError."""
    layers = [name for name in found if name in linears]
    layers = layers or [name for name in found if _can_adapt(modules[name])]
    if not layers:
        raise ValueError(_unfit(target, found[0], modules))
    return layers


def _matching(pattern, modules, linears):
    """The layers whose full names match a pattern; ValueError if a matching layer cannot be adapted.

    The pattern may also match modules around these layers (a block), modules without a matrix (a norm), routers and
    experts: they are ignored.
    """
    found = [name for name in modules if matches(name, pattern)]
    if not found:
        raise ValueError(f"target_modules: the pattern {pattern!r} matches no linear layer of the model")
    chosen = _adaptable(pattern, found, modules, linears)
    matrices = [
        name
        for name, module in modules.items()
        if any(value.dim() > 1 for value in module.parameters(recurse=False))
        and not is_experts(module)
        and component(name) != "router"
    ]
    around_chosen, around_matrices = _with_parents(chosen), _with_parents(matrices)
    for name in found:
        if name in around_matrices and name not in around_chosen and not _can_adapt(modules[name]):
            raise ValueError(_unfit(pattern, name, modules))
    return chosen


def _with_parents(names):
    """The set of the names and of the names of all modules around them."""
    return {name[:end] for name in names for end in [*(dot.start() for dot in re.finditer(r"\.", name)), len(name)]}


def _unfit(target, name, modules):
    """The error text for a target that matches a module which PEFT cannot adapt."""
    inside = [inner for inner in modules if inner.startswith(f"{name}.") and _can_adapt(modules[inner])]
    hint = f", but {inside[0]} in it is a {type(modules[inside[0]]).__name__}" if inside else ""
    return (
        f"target_modules: got {target!r}, needs layers that can be adapted; {name or 'the model itself'} is a "
        f"{type(modules[name]).__name__}, which PEFT cannot adapt{hint}"
    )


def _unknown(argument, target, names):
    """The error text for a target that matches nothing, with the ends of names that are most like it."""
    length = str(target).count(".") + 1
    ends = {".".join(name.split(".")[-length:]) for name in names}
    near = difflib.get_close_matches(str(target), sorted(ends), n=3, cutoff=0.0)
    return (
        f"{argument}: got {target!r}, needs a name or the end of one in the model, of which the nearest are "
        f"{', '.join(near)}"
    )


def _may_mean_routed_experts(target):
    """Whether a target may be the name of an expert's layer in transformers 4: "gate_proj", "experts.3.gate_proj"."""
    return "." not in target or component(target) == "routed_experts"


def taken_by_peft(model, targets):
    """Those ``targets`` that PEFT would replace by parameters of routed experts, found by a trial of each."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    model = bare_model(model)
    taken = set()
    for target in targets:
        trial = LoraConfig(target_modules=[target])
        try:
            convert_peft_config_for_transformers(trial, model, None)
        except ValueError:  # "cannot convert gate_proj without up_proj"
            taken.add(target)
        else:
            if target not in trial.target_modules:
                taken.add(target)
    return taken
