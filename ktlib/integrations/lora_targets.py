"""Which modules and parameters of a model get adapters, and the names by which PEFT finds exactly these.

PEFT compares every name in ``target_modules`` with the ends of the names of **all** modules, whatever their type, and
every name in ``target_parameters`` with the ends of those of all parameters. An end that is short enough to be read
may therefore also be one of a vision tower's convolution, or of a wrapper that PEFT cannot adapt. Here targets are
chosen module by module, and written down as ends that nothing else in the model has.
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
# What PEFT has a LoRA layer for.
_ADAPTABLE = (
    *(torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
    *(torch.nn.MultiheadAttention, Conv1D),
)
# The layers of ERNIE-4.5-VL's language model have two sets of experts each; no text ever reaches this one.
_EXPERTS_OF_IMAGES = r"\.vision_moe\."


def language_modules(model):
    """Names of the modules that make up the language model: all modules of a model for text, without its output head.

    A multimodal model of transformers is a tree of ``PreTrainedModel``, each with a config. The language model is in
    ``get_decoder()`` and has the config that ``get_text_config`` returns; towers for images, video and audio have
    others, and what joins them (projectors) belongs to the class around them, as heads belong to the class around a
    ``base_model``.

    Returns:
        a set; the names of all modules if the model is not one of transformers, or has no such part.
    """
    modules = dict(bare_modules(model))
    model = modules.get("", model)
    if not isinstance(model, PreTrainedModel):
        return set(modules)
    text = type(model.config.get_text_config(decoder=True))
    decoder = model if model.config.is_encoder_decoder else model.get_decoder()
    innermost, in_decoder, names = {}, set(), set()
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        inside = module if isinstance(module, PreTrainedModel) else innermost.get(parent)
        innermost[name] = inside
        if module is decoder or parent in in_decoder:
            in_decoder.add(name)
            is_text = type(inside.config) is text or inside is decoder is not model
            names |= {name} if is_text and inside.base_model is inside else set()
    return {name for name in names if not re.search(_EXPERTS_OF_IMAGES, f".{name}.")} or set(modules)


def unambiguous_ends(chosen, names, from_layer=False):
    """The shortest ends that by PEFT's rule match every one of the ``chosen`` among ``names``, and no other.

    With ``from_layer`` an end is at least what follows the number of the layer, as "mlp.experts.down_proj".
    Raises ValueError if the whole name of one is the end of another.
    """
    chosen, named, found = set(chosen), by_end(names), set()
    is_own = functools.cache(lambda end: chosen.issuperset(named[end]))  # many experts share an end
    for name in chosen:
        parts = name.split(".")
        last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        starts = range(last_number + 1 if from_layer else len(parts) - 1, -1, -1)
        candidates = (".".join(parts[start:]) for start in starts if start == 0 or not parts[start].isdigit())
        end = next(filter(is_own, candidates), None)
        if end is None:
            other = next(other for other in named[name] if other not in chosen)
            raise ValueError(f"{name}: PEFT cannot adapt it without {other}, whose name ends the same")
        found.add(end)
    return found


# ---- parameters -----------------------------------------------------------------------------------------------------


def chosen_parameters(model, modules, language, targets, excluded):
    """Names of the parameters that ``target_parameters`` of :func:`ktlib.lora_config` means, as PEFT needs them."""
    owners = {
        f"{name}.{own}": name for name, module in modules.items() for own, _ in module.named_parameters(recurse=False)
    }
    if targets is None:
        chosen = _parameters_of_experts(model, modules, language)
    else:
        named, chosen = by_end(owners), []
        for target in targets:
            if target not in named:
                raise ValueError(_unknown("target_parameters", target, owners))
            chosen += [name for name in named[target] if owners[name] in language] or named[target]
    # PEFT does not apply exclude_modules to parameters.
    chosen = [name for name in chosen if not any(matches(part, excluded) for part in (name, owners[name]))]
    return sorted(unambiguous_ends(chosen, owners, from_layer=True))


def _parameters_of_experts(model, modules, language):
    """Names of the 3-D weights of all routed experts in the language model; ValueError if there are none."""
    chosen = [
        f"{name}.{own}"
        for name, module in modules.items()
        if name in language and is_experts(module)
        for own, value in module.named_parameters(recurse=False)
        if value.dim() == 3
    ]
    if chosen:
        return chosen
    model = bare_model(model)
    rest = "target_parameters=[] adapts the other layers alone"
    own_way = [
        name
        for name, module in modules.items()
        if name in language and (name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts"))
    ]
    if not own_way:
        raise ValueError(f"model: {type(model).__name__} has no routed experts; {rest}")
    inside = [name for name in modules if any(f"{name}.".startswith(f"{experts}.") for experts in own_way)]
    layers = [name for name in inside if _can_adapt(modules[name]) and component(name) != "router"]
    weights = [
        f"{name}.{own}"
        for name in inside
        for own, value in modules[name].named_parameters(recurse=False)
        if value.dim() == 3 and not _can_adapt(modules[name])
    ]
    if weights:
        names = ", ".join(map(repr, sorted(unambiguous_ends(weights, weights, from_layer=True))))
        rest += f"; target_parameters=[{names}] adapts them too, as stock PEFT does, by a dense W + BA"
    elif layers:
        rest += f"; target_modules can name the linear layers in them, such as {layers[0]!r}"
    kind = type(modules[own_way[0]]).__name__
    raise ValueError(
        f"model: {type(model).__name__} computes its experts ({kind}, at {own_way[0]}) in a forward of its own and not "
        f"through transformers' experts interface, so ktlib cannot serve them; {rest}"
    )


# ---- layers ---------------------------------------------------------------------------------------------------------


def chosen_layers(model, modules, language, targets):
    """The layers that ``target_modules`` of :func:`ktlib.lora_config` asks for.

    Args:
        model, modules: the base model, and all its modules as ``{name: module}``.
        language: the names in ``modules`` that belong to the language model.
        targets: ``target_modules``: None, "all-linear", a regular expression, or a list of names or ends of names.

    Returns:
        The full names of layers to adapt; and those of a list's targets that stand for routed experts instead, since
        transformers 4 had a layer of that name in each expert. PEFT converts these to names of expert parameters.

    Raises:
        ValueError: a target is not in the model, or PEFT cannot adapt it.
    """
    linears = linear_layers(model, modules)
    of_language = [name for name in linears if name in language]
    if targets is None:
        return [name for name in of_language if component(name) in DEFAULT_COMPONENTS], []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return of_language, []
    if isinstance(targets, str):
        return _matching(targets, modules, linears), []
    chosen, of_experts, named = {}, [], by_end(modules)
    for target in targets:
        found = [name for name in named.get(target, []) if name in language]
        if not found and _of_routed_experts(target) and taken_by_peft(model, [target]):
            of_experts.append(target)
            continue
        found = found or named.get(target, [])
        if not found:
            raise ValueError(_unknown("target_modules", target, modules))
        chosen |= dict.fromkeys(_adaptable(target, found, modules, linears))
    return list(chosen), of_experts


def linear_layers(model, modules):
    """The linear layers that LoRA can sensibly adapt: all but the output head and the routers."""
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
    """Whether PEFT has a LoRA layer for it that computes what LoRA is.

    PEFT takes every subclass of Linear for one. Those of a model's own code with another forward are none, such as
    DeepSeek-V4's linear layer by groups; layers with quantised weights have another forward, but are linear.
    """
    kind = type(module)
    of_a_model = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    other = isinstance(module, torch.nn.Linear) and kind.forward is not torch.nn.Linear.forward and of_a_model
    return isinstance(module, _ADAPTABLE) and not other


def _refused_by_peft(model, name):
    """Whether PEFT refuses a module for the kind of model: Mamba's kernels read the weights past the adapters."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _adaptable(target, found, modules, linears):
    """Of the modules that a target matches the linear layers, or if there are none those that PEFT can adapt too."""
    layers = [name for name in found if name in linears]
    layers = layers or [name for name in found if _can_adapt(modules[name])]
    if not layers:
        raise ValueError(_unfit(target, found[0], modules))
    return layers


def _matching(pattern, modules, linears):
    """The layers whose whole names match; ValueError if one that PEFT cannot adapt does.

    A pattern may also match what its layers are in (a block), what has no matrix (a norm), routers and experts.
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
    with_chosen, with_matrix = _and_above(chosen), _and_above(matrices)
    for name in found:
        if name in with_matrix and name not in with_chosen and not _can_adapt(modules[name]):
            raise ValueError(_unfit(pattern, name, modules))
    return chosen


def _and_above(names):
    """The names and those of all modules they are in."""
    return {name[:end] for name in names for end in [*(dot.start() for dot in re.finditer(r"\.", name)), len(name)]}


def _unfit(target, name, modules):
    inside = [inner for inner in modules if inner.startswith(f"{name}.") and _can_adapt(modules[inner])]
    hint = f", but {inside[0]} in it is a {type(modules[inside[0]]).__name__}" if inside else ""
    return (
        f"target_modules: got {target!r}, needs layers that can be adapted; {name or 'the model itself'} is a "
        f"{type(modules[name]).__name__}, which PEFT cannot adapt{hint}"
    )


def _unknown(argument, target, names):
    parts = str(target).count(".") + 1
    of_its_length = {".".join(name.split(".")[-parts:]) for name in names}
    near = difflib.get_close_matches(str(target), sorted(of_its_length), n=3, cutoff=0.0)
    return (
        f"{argument}: got {target!r}, needs a name or the end of one in the model, of which the nearest are "
        f"{', '.join(near)}"
    )


def _of_routed_experts(target):
    """True for what transformers 4 called their layers, such as "gate_proj" or "experts.3.gate_proj"."""
    return "." not in target or component(target) == "routed_experts"


def taken_by_peft(model, targets):
    """Those of the target names that PEFT would replace by routed experts, asked from PEFT one by one."""
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
