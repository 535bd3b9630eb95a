"""``adapter_config.json``: read and checked, and PEFT's rules for what it says of one weight."""

import re
import sys

from ktlib.files.tensor_files import read_json
from ktlib.integrations.expert_names import FUSED
from ktlib.names import PREFIX

CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MATRIX = re.compile(r"(.*)\.lora_([AB])(?:\.weight)?")  # in a file: the module that a matrix adapts, and which it is
SAVED_DROPOUT = "ktlib_lora_dropout"  # what lora_dropout is called in an adapter_config.json of expert parameters


def read_settings(file):
    """The dict in an ``adapter_config.json``, ``{}`` if there is no such file.

    Raises:
        ValueError: not a JSON object, or a field is nothing LoRA can work with; the file and the field are named.
    """
    settings = read_json(file)
    if settings.get("peft_type", "LORA") == "LORA":  # other kinds mean other things by these names
        check_settings(settings, file)
    return settings


def check_settings(settings, where):
    """ValueError that names ``where`` and the field, if PEFT's rules cannot be applied to what it holds."""
    for name, (is_right, needed) in _NEEDED.items():
        value = settings.get(name)
        if value is not None and not is_right(value):
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


def _is_table(of):
    return lambda value: isinstance(value, dict) and all(_is_expression(key) and of(value[key]) for key in value)


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


# ------------------------------------------------------------------------------------- what other layouts can have

_CARRIED_OVER = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", SAVED_DROPOUT),
    *("target_modules", "target_parameters", "modules_to_save", "exclude_modules"),
}
# what was there when the file was written, and what PEFT looks at only beside another setting, which is refused
_WITHOUT_EFFECT = {
    *("auto_mapping", "peft_version", "runtime_config"),
    *("lora_B_layout", "unsloth_fused_expert_lora"),  # factor_layouts reads these, with auto_mapping and peft_version
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
}


def refuse_unsupported(settings, where):
    """ValueError that names the first setting that may change what the adapter means and is not carried over.

    A field that is off or at LoraConfig's default is fine, also one that the installed PEFT does not know.
    """
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        off = value is None or value is False or value == []
        if name in _CARRIED_OVER | _WITHOUT_EFFECT or off or value == defaults.get(name):
            continue
        if name == "init_lora_weights" and value in ("gaussian", "eva", "orthogonal"):  # others may change the base
            continue
        raise ValueError(f"{where}: {name} is {value!r:.60}, which has no place in the layouts")


# ------------------------------------------------------------------------------------------------------ PEFT's rules


def matches(name, targets):
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def by_end(names):
    """``{end: [names]}``: what :func:`matches` finds for a list that holds one name or end, for all ends at once."""
    found = {}
    for name in names:
        for start in [0, *(dot.end() for dot in re.finditer(r"\.", name))]:
            found.setdefault(name[start:], []).append(name)
    return found


def weight_of(module, settings):
    """Name of the weight that ``lora_A`` and ``lora_B`` of a module adapt, the module named as in an adapter file."""
    module = module.removeprefix(PREFIX)
    experts = module.removesuffix(".base_layer")
    if not f".{experts}".endswith(".experts"):
        return f"{module}.weight"
    weights = [f"{experts}.{leaf}" for leaf in FUSED]
    targeted = [weight for weight in weights if matches(weight, settings.get("target_parameters"))] or weights
    return targeted[0 if experts != module else -1]  # PEFT nests one wrapper per weight, down_proj's outside


def rank_and_alpha(settings, weight):
    """What PEFT gives a weight: the first pattern that matches the end of its name, else r and lora_alpha (or None).

    A linear layer goes by its own name, unless its weight is a target parameter.
    """
    name = weight if matches(weight, settings.get("target_parameters")) else weight.removesuffix(".weight")
    values = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        value, table = settings.get(default), settings.get(pattern)
        if table:
            from peft.utils.other import get_pattern_key  # seconds, which an audit of most files saves

            value = table.get(get_pattern_key(table, name), value)
        values.append(value)
    return values
