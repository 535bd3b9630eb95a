"""Reads and checks ``adapter_config.json``, and applies PEFT's rules for one weight to it."""

import re
import sys

from ktlib.files.tensor_files import read_json
from ktlib.integrations.expert_names import FUSED
from ktlib.names import PREFIX

CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MATRIX = re.compile(r"(.*)\.lora_([AB])(?:\.weight)?")  # a LoRA matrix's name in a file: the adapted module, A or B
MANIFEST = "kt_adapter_manifest.json"  # of KTransformers, which may give routed experts a rank and alpha of their own
SAVED_DROPOUT = "ktlib_lora_dropout"  # the name of lora_dropout in files of adapters with expert parameters


def read_settings(file):
    """The dict in an ``adapter_config.json``; ``{}`` if there is no such file.

    If a file of KTransformers beside it says what rank and alpha the routed experts have, it has patterns for them.

    Raises:
        ValueError: the file holds no JSON object, or PEFT cannot use the value of a field.
    """
    settings = read_json(file)
    if settings.get("peft_type", "LORA") != "LORA":  # other methods give other meanings to the same names
        return settings
    check_settings(settings, file)
    manifest = file.with_name(MANIFEST)
    if settings and isinstance(of_experts := read_json(manifest).get("lora"), dict):
        patterns = {
            f"{name}_pattern": {r"experts\.(gate|up|down)_proj": of_experts[name]}
            | (settings.get(f"{name}_pattern") or {})
            for name in ("rank", "alpha")
            if name in of_experts
        }
        check_settings(patterns, manifest)
        settings |= patterns
    return settings


def check_settings(settings, where):
    """ValueError if PEFT cannot use the value of a field; ``where`` is what the error calls the settings."""
    for name, (is_valid, needed) in _NEEDED.items():
        value = settings.get(name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{where}: {name} is {value!r:.60}, needs {needed}")


def _is_alpha(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_rank(value):
    return type(value) is int and 1 <= value <= sys.float_info.max


def _is_expression(value):
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _is_names(value):
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def _is_target(value):
    return _is_names(value) or _is_expression(value)


def _is_table(is_valid):
    """The check of a dict of regular expressions, whose values ``is_valid`` checks."""
    return lambda value: isinstance(value, dict) and all(_is_expression(key) and is_valid(value[key]) for key in value)


_NEEDED = {
    "r": (_is_rank, "a number >= 1"),
    "lora_alpha": (_is_alpha, "a number"),
    "rank_pattern": (_is_table(_is_rank), "regular expressions, each with a number >= 1"),
    "alpha_pattern": (_is_table(_is_alpha), "regular expressions, each with a number"),
    "target_modules": (_is_target, "a list of names or a regular expression"),
    "exclude_modules": (_is_target, "a list of names or a regular expression"),
    "target_parameters": (_is_names, "a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
}


# --------------------------------------------------------------------------- settings that other layouts can express

_CARRIED_OVER = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", SAVED_DROPOUT),
    *("target_modules", "target_parameters", "modules_to_save", "exclude_modules"),
}
# Settings that record how the file was written, and those that PEFT reads only beside a setting that is refused.
_WITHOUT_EFFECT = {
    *("auto_mapping", "peft_version", "runtime_config"),
    *("lora_B_layout", "unsloth_fused_expert_lora"),  # factor_layouts reads these, with auto_mapping and peft_version
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
}


def refuse_unsupported(settings, where, why="which has no place in the layouts"):
    """ValueError for the first setting that may change what the adapter computes and that conversion would lose.

    Settings that are off or have LoraConfig's default are accepted, even if the installed PEFT does not know them.
    """
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        off = value is None or value is False or value == []
        if name in _CARRIED_OVER | _WITHOUT_EFFECT or off or value == defaults.get(name):
            continue
        if name == "init_lora_weights" and value in ("gaussian", "eva", "orthogonal"):  # others change base weights
            continue
        raise ValueError(f"{where}: {name} is {value!r:.60}, {why}")


# ------------------------------------------------------------------------------------------------------ PEFT's rules


def matches(name, targets):
    """Whether ``targets`` names a module or parameter, by PEFT's rule.

    A string is a regular expression for the whole name; a list holds names or ends of names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def by_end(names):
    """``{end: names that it matches}`` by the rule of :func:`matches` for lists, for every end of every name."""
    found = {}
    for name in names:
        for start in [0, *(dot.end() for dot in re.finditer(r"\.", name))]:
            found.setdefault(name[start:], []).append(name)
    return found


def weight_of(module, settings):
    """The name of the weight that ``lora_A`` and ``lora_B`` of a module adapt; ``module`` as in an adapter file."""
    module = module.removeprefix(PREFIX)
    experts = module.removesuffix(".base_layer")
    if not f".{experts}".endswith(".experts"):
        return f"{module}.weight"
    weights = [f"{experts}.{leaf}" for leaf in FUSED]
    targeted = [weight for weight in weights if matches(weight, settings.get("target_parameters"))] or weights
    # PEFT puts one wrapper per weight around the experts; that of down_proj is the outer one, without ".base_layer".
    return targeted[0 if experts != module else -1]


def rank_and_alpha(settings, weight):
    """``[rank, alpha]`` that PEFT gives a weight, each by the first pattern that matches the end of the weight's name.

    Without such a pattern they are ``r`` and ``lora_alpha``, or None where the settings lack these. Patterns match the
    name of a linear layer without ``.weight``, unless its weight is one of ``target_parameters``.
    """
    name = weight if matches(weight, settings.get("target_parameters")) else weight.removesuffix(".weight")
    values = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        value, table = settings.get(default), settings.get(pattern)
        if table:
            from peft.utils.other import get_pattern_key  # here, because it takes seconds to import

            value = table.get(get_pattern_key(table, name), value)
        values.append(value)
    return values
