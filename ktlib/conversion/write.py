"""Writes the layouts of :mod:`ktlib.conversion.adapters`: tensors, and the ``adapter_config.json`` beside them."""

import copy
import json
import math
import warnings
from typing import NamedTuple

import torch

from ktlib.conversion.adapter_targets import targets_in_files, warn_of_servers
from ktlib.files import tensor_files
from ktlib.files.tensor_files import Stored
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.model_classes import meta_model
from ktlib.integrations.peft_settings import ADAPTER_FILE, CONFIG, SAVED_DROPOUT
from ktlib.names import PREFIX, bare_model, bare_modules, bare_name, first_of, layer_of
from ktlib.reference import lora_layout

FUSED_FILE = "fused_expert_lora.safetensors"


class Pair(NamedTuple):
    """A LoRA pair of rank r. Its scaling is ``alpha / r``, or ``alpha / sqrt(r)`` with rslora."""

    a: Stored
    b: Stored
    rank: int
    alpha: float


def listed(problems, title):
    """The text of an error: ``title``, then one line for each kind of problem with their number and the first ones."""
    kinds = {}
    for problem in problems:
        kind, _, text = problem.partition(": ")
        kinds.setdefault(kind, []).append(text)
    lines = (f"{kind} ({len(texts)}): {first_of(texts, separator='; ')}" for kind, texts in kinds.items())
    return "\n".join([title, *lines])


# ---------------------------------------------------------------------------------------------------- PEFT's layout


def _peft_config(settings, pairs, config):
    """The stock LoraConfig of these pairs, and the names and shapes of the tensors that PEFT has for it.

    Returns ``(LoraConfig, {weight: (key of lora_A, key of lora_B)}, {key: shape}, {key: name in a file})``. The last
    dict has only tensors that PEFT, loading a file, would not find under their keys.
    """
    from peft import get_peft_model_state_dict

    from ktlib.integrations.peft_lora import lora_config

    model = meta_model(config)
    spelling = ExpertLayout(model)
    linears = {name for name, module in bare_modules(model) if isinstance(module, torch.nn.Linear)}
    names = {weight: weight.removesuffix(".weight") for weight in pairs}
    modules = [name for name in names.values() if name in linears]
    parameters = [weight for weight, name in names.items() if name not in linears]
    options = {name: settings[name] for name in ("use_rslora", "modules_to_save", "task_type") if settings.get(name)}
    made = lora_config(
        model,
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=_dropout(settings),
        target_modules=modules,
        target_parameters=parameters,
        rank_pattern=_pattern({name: pair.rank for name, pair in pairs.items()}, settings["r"], linears),
        alpha_pattern=_pattern({name: pair.alpha for name, pair in pairs.items()}, settings["lora_alpha"], linears),
        **options,
    )
    adapted = adapted_in_silence(model, made, low_cpu_mem_usage=True)
    # PEFT has set the name to that of the model, which has none.
    made.base_model_name_or_path, made.revision = settings.get("base_model_name_or_path"), settings.get("revision")
    made.inference_mode = True
    shapes = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    slots = {weight: keys for weight, (_, keys) in _slots(adapted).items()}
    names, _ = names_for_peft(adapted, list(shapes), spelling)
    return made, slots, {key: tuple(value.shape) for key, value in shapes.items()}, names


def adapted_in_silence(model, config, **options):
    """``peft.get_peft_model``, without the warning that PEFT asks transformers by a name that is going to change."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*checkpointing", category=FutureWarning)
        return get_peft_model(model, config, **options)


def _slots(adapted):
    """``{weight: (its LoRA layer, (key of lora_A, key of lora_B))}`` of a model with adapters."""
    slots = {}
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            weight = f"{bare_name(name)}.{getattr(module, 'parameter_name', 'weight')}"
            slots[weight] = module, tuple(f"{name}.lora_{letter}.weight" for letter in "AB")
    return slots


def _refuse_what_peft_misreads(config, settings, modules):
    """ValueError if PEFT would not load these ``{module in files: (weight, Pair)}`` as the adapter that they are.

    PEFT cannot convert the experts of some families: those without a gate and those of some multimodal models. It drops
    their tensors with a warning.
    """
    import peft
    import transformers

    model = meta_model(config)
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters")
    given = {name: settings[name] for name in fields if settings.get(name) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some patterns match nothing here: they are for other readers of the file
        adapted = peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(given)), low_cpu_mem_usage=True)
    tensors = {
        f"{PREFIX}{name}.lora_{letter.upper()}.weight": torch.empty(getattr(pair, letter).shape, device="meta")
        for name, (_, pair) in modules.items()
        for letter in "ab"
    }
    read, slots = _as_peft_reads(adapted, tensors), _slots(adapted)
    weights = dict(modules.values())
    lost = [weight for weight, pair in weights.items() if not _is_read(pair, read, *slots.get(weight, (None, ())))]
    if lost:
        raise ValueError(
            f"layout: got 'per_expert', but PEFT {peft.__version__} on transformers {transformers.__version__} cannot "
            f"read {len(lost)} of the {len(weights)} adapted weights of {type(model).__name__} from such a file, such "
            f"as {lost[0]}; needs layout 'peft', which it reads"
        )


def _is_read(pair, read, layer, keys):
    """Whether the LoRA ``layer`` with these ``keys`` gets both matrices and the scaling of ``pair`` as PEFT loads it.

    ``read`` is ``{key: tensor}`` of all that PEFT loads. No layer (None) has no keys, and gets nothing.
    """
    if not keys or any(key not in read for key in keys):
        return False
    shapes = [getattr(layer, f"lora_{letter}")["default"].weight.shape for letter in "AB"]
    return [read[key].shape for key in keys] == shapes and math.isclose(
        layer.scaling["default"], pair.alpha / pair.rank
    )


def _as_peft_reads(adapted, tensors):
    """``{key: tensor}`` that PEFT, loading an adapter, makes of ``{name in a file: tensor}``."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        return tensors
    adapter = adapted.active_adapter
    return convert_peft_adapter_state_dict_for_transformers(adapted, adapted.peft_config[adapter], tensors, adapter)


def read_by_peft(adapted, names):
    """``{name in a file: the key under which PEFT loads the tensor, or None}``.

    PEFT applies transformers' renames for checkpoints to every adapter, even to one that has the names of transformers
    5. Some families' renames then change right names: ``mlp.experts`` becomes ``mlp.mlp.experts``.
    """
    numbered = {name: torch.tensor(i, device="cpu") for i, name in enumerate(names)}
    keys = {int(number): key for key, number in _as_peft_reads(adapted, numbered).items()}
    return {name: keys.get(i) for i, name in enumerate(names)}


def names_for_peft(adapted, keys, spelling):
    """Other names for the tensors that PEFT, loading a file, would not find under their own keys.

    Returns:
        ``{key: name in a file}``, where the name is the one that checkpoints use and PEFT finds; and the list of keys
        that PEFT finds under neither name.
    """
    names = {}
    for key, read in read_by_peft(adapted, keys).items():
        if read != key:
            module, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
            names[key] = f"{PREFIX}{spelling.module_in_files(module)}.lora_{rest}"
    read = read_by_peft(adapted, [names.get(key, key) for key in keys]) if names else {}
    lost = [key for key, name in names.items() if read[name] != key]
    return {key: name for key, name in names.items() if key not in lost}, lost


def rename_for_peft(adapted, folder=None):
    """Rename tensors of the adapter in ``folder`` so that PEFT finds all of them when it loads the adapter.

    ``adapted.save_pretrained`` has just written the adapter, and nobody else uses the folder yet. Without a folder this
    is only a check.

    Raises:
        ValueError: PEFT would not find a tensor under any known name.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    base = bare_model(adapted)
    keys = list(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    names, lost = names_for_peft(adapted, keys, ExpertLayout(base))
    if lost:
        raise ValueError(
            f"model: PEFT saves adapters of {type(base).__name__} under names that it takes for others when it loads "
            f"them ({len(lost)} of {len(keys)} tensors, such as {lost[0]}), needs another model, or targets without "
            "these"
        )
    if names and folder is not None:
        # Tensors that load_file returns may be views of the file, which save_file overwrites: hence copies.
        tensors = {names.get(key, key): tensor.clone() for key, tensor in load_file(folder / ADAPTER_FILE).items()}
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})


def _dropout(settings):
    """The dropout in the settings of an adapter by ktlib or, under PEFT's own name, by another program."""
    return settings.get(SAVED_DROPOUT) or settings.get("lora_dropout") or 0.0


def _pattern(values, default, linears):
    """PEFT's ``rank_pattern`` or ``alpha_pattern`` for the weights whose value is not the default.

    Experts have one pattern for each projection if all layers agree, else one for each layer.
    """
    kinds, table = {}, {}
    for weight, value in values.items():
        name = weight.removesuffix(".weight")
        name = name if name in linears else weight
        _, experts, kind = name.rpartition(".experts.")
        kinds.setdefault(rf"experts\.{kind}" if experts else name, {})[name] = value
    for kind, by_name in kinds.items():
        patterns = {kind: next(iter(by_name.values()))} if len(set(by_name.values())) == 1 else by_name
        table |= {pattern: value for pattern, value in patterns.items() if value != default}
    return table


def check_against_peft(settings, pairs, saved, config):
    """The LoraConfig and ``{name in the file: Stored}`` of an adapter in PEFT's layout.

    Raises:
        ValueError: PEFT, asked for these targets, expects other tensors; they are listed.
    """
    made, slots, shapes, renamed = _peft_config(settings, pairs, config)
    tensors = {key: matrix for name, pair in pairs.items() for key, matrix in zip(slots[name], pair[:2], strict=True)}
    tensors |= saved
    problems = [f"missing: {key}" for key in shapes if key not in tensors]
    problems += [f"extra: {key}" for key in tensors if key not in shapes]
    for key, shape in shapes.items():
        if key in tensors and tensors[key].shape != shape:
            problems.append(f"wrong shape: {key} is {tensors[key].shape}, needs {shape}")
    if problems:
        raise ValueError(listed(problems, "the adapter is not what PEFT expects"))
    return made, {renamed.get(key, key): tensor for key, tensor in tensors.items()}


def write_peft(folder, settings, pairs, saved, config):
    """A stock PEFT adapter for transformers 5 in ``folder``."""
    made, tensors = check_against_peft(settings, pairs, saved, config)
    tensor_files.write(folder / ADAPTER_FILE, tensors)
    # PEFT holds the targets in sets and would save them in the order of a set, which changes with Python's hash seed.
    made.target_modules, made.target_parameters = sorted(made.target_modules), sorted(made.target_parameters)
    made.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------- the other layouts


def write_per_projection(folder, settings, pairs, saved, config, layout, made):
    """Write the adapter with one pair per projection: as tensors per expert, or as KTransformers' stacks.

    ``made`` is the LoraConfig of the same adapter in PEFT's layout.
    """
    model = meta_model(config)
    spelling = ExpertLayout(model)
    if layout == "ktransformers" or any(weight in spelling.experts for weight in pairs):
        if not spelling.per_expert:
            raise ValueError(
                f"layout: got {layout!r}, but transformers knows no per-expert spelling of the experts of "
                f"{spelling.model_type!r}: files hold them stacked, as layout 'peft' does, which is needed here"
            )
    # SGLang, older versions of vLLM and KTransformers scale experts by lora_alpha / r, whatever use_rslora says.
    rslora = settings.get("use_rslora")
    settings = settings | {"use_rslora": False, "lora_alpha": _plain(settings["lora_alpha"], settings["r"], rslora)}
    modules, stacked = {}, {}  # {module in files: (weight, Pair)} and {weight of experts: {projection: Pair of stacks}}
    for weight, pair in pairs.items():
        if not (projections := spelling.projections(weight)):
            pair = pair._replace(alpha=_plain(pair.alpha, pair.rank, rslora))
            modules[spelling.weight_in_files(weight).removesuffix(".weight")] = weight, pair
            continue
        by_projection = _split(weight, pair, pairs, projections, rslora)
        if weight in spelling.experts and layout == "ktransformers":
            stacked[weight] = by_projection
            continue
        for projection, stack in by_projection.items():
            for expert in range(stack.a.shape[0]):
                place = ExpertProjection(weight, projection, expert)
                name = spelling.projection_in_files(place).removesuffix(".weight")
                modules[name] = weight, stack._replace(a=_slice(stack.a, expert), b=_slice(stack.b, expert))
    settings = settings | {"target_parameters": None, "exclude_modules": None, "inference_mode": True}
    if layout == "ktransformers":
        settings["r"], settings["lora_alpha"] = _one_rank_and_alpha(stacked, spelling)
        tensors = {}
        for weight, by_projection in stacked.items():
            for projection, pair in by_projection.items():
                name = f"layers.{layer_of(weight)}.experts.{projection}_lora_"
                tensors |= {f"{name}{letter}": getattr(pair, letter) for letter in "ab"}
        tensor_files.write(folder / FUSED_FILE, tensors)
    dropout = _dropout(settings)
    settings.pop(SAVED_DROPOUT, None)
    if layout == "ktransformers":
        settings |= targets_in_files(model, spelling, modules, settings) | {"lora_dropout": dropout}
    else:
        settings |= targets_in_files(model, spelling, modules, settings, made)
        _refuse_what_peft_misreads(config, settings, modules)
        settings |= {"lora_dropout": 0.0, SAVED_DROPOUT: dropout} if made.target_parameters and dropout else {}
        warn_of_servers(modules, spelling, settings)
    tensors = {}
    for name, (_, pair) in modules.items():
        tensors |= {f"{PREFIX}{name}.lora_{letter.upper()}.weight": getattr(pair, letter) for letter in "ab"}
    if tensors or saved:
        tensor_files.write(folder / ADAPTER_FILE, tensors | saved)
    tensor_files.write_text(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True))


def _slice(stack, expert):
    return Stored(stack.shape[1:], stack.dtype, lambda: tensor_files.recent(stack)[expert])


def _plain(alpha, rank, rslora):
    """The alpha that without rslora gives the same scaling."""
    return alpha * rank**0.5 if rslora else alpha


def _split(weight, pair, pairs, projections, rslora):
    """``{projection: Pair}`` of A (E, r, in) and B (E, out, r) from a pair in PEFT's layout; E = 1 without experts.

    The alphas of the result are those without rslora.
    """
    rank, alpha = pair.rank, pair.alpha
    experts, inner = pair.a.shape[0] // rank, pair.a.shape[1]
    out = pair.b.shape[0] // len(projections)

    def b_of_experts():
        return lora_layout.split_b(tensor_files.recent(pair.b), experts)

    down = pairs.get(weight.replace("gate_up_proj", "down_proj"))
    half = rank // 2
    is_block_form = len(projections) == 2 and rank == 2 * half and (down is None or rank == 2 * down.rank)
    if is_block_form:
        b = b_of_experts()
        is_block_form = not b[:, :out, half:].any() and not b[:, out:, :half].any()
    width = half if is_block_form else rank
    if is_block_form:  # Import multiplied alpha. An integer alpha must come back as that integer.
        alpha = alpha / 2**0.5 if rslora else alpha / 2
        alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
    alpha = _plain(alpha, width, rslora)
    result = {}
    for i, projection in enumerate(projections):
        columns = slice(i * width, (i + 1) * width) if is_block_form else slice(None)
        rows = slice(i * out, (i + 1) * out)

        def load_a(columns=columns):
            return lora_layout.split_a(tensor_files.recent(pair.a), experts)[:, columns]

        def load_b(rows=rows, columns=columns):
            return b_of_experts()[:, rows, columns]

        a = Stored((experts, width, inner), pair.a.dtype, load_a)
        result[projection] = Pair(a, Stored((experts, out, width), pair.b.dtype, load_b), width, alpha)
    return result


def _one_rank_and_alpha(stacked, spelling):
    """``(rank, alpha)`` of all experts; ValueError if KTransformers' layout cannot represent these adapters."""
    lacking = [name for name in spelling.experts if name not in stacked]
    kinds = {(pair.rank, pair.alpha) for by_projection in stacked.values() for pair in by_projection.values()}
    if lacking:
        more = " ..." if len(lacking) > 4 else ""
        raise ValueError(f"layout: ktransformers adapts all experts, not adapted are {', '.join(lacking[:4])}{more}")
    if len(kinds) > 1:
        raise ValueError(f"layout: ktransformers has one rank and alpha for all experts, here are {sorted(kinds)}")
    return kinds.pop()
