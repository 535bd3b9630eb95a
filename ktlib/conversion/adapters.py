"""Adapters in and out: stock PEFT, one module per expert (transformers 4), and KTransformers' fused files.

====================  ====================================================================  =======================
layout                tensors of routed experts, E experts, rank r                          rest
====================  ====================================================================  =======================
peft                  experts.base_layer.lora_A (E*r, H), lora_B (2I, r*E): gate_up_proj;   the same names in
                      experts.lora_A (E*r, I), lora_B (H, r*E): down_proj                   all three layouts:
per_expert            experts.3.gate_proj.lora_A (r, H), lora_B (I, r), also up and down    attention, shared
ktransformers         layers.1.experts.gate_lora_a (E, r, H), gate_lora_b (E, I, r), ...    experts, dense MLPs
====================  ====================================================================  =======================

PEFT gives gate and up one A. Two separate adapters of rank r, ``s B_g A_g`` and ``s B_u A_u``, are one of rank 2r::

    A = [A_g; A_u] (2r, H)      B = [[B_g, 0], [0, B_u]] (2I, 2r)      alpha doubled (rslora: times sqrt 2): same s

If A_g equals A_u in every expert of a layer, it is ``A = A_g, B = [B_g; B_u]`` of rank r. The other way, any adapter
of rank R is a pair of rank R, ``A_g = A_u = A``; and one of the block form above, with twice the rank of down_proj's
adapter (or without one), is the pair of rank R/2. No element is computed, only moved: there and back is bit for bit.

Files of the first layout by PEFT before 0.19.1 or by Unsloth hold other factors: see
:mod:`ktlib.integrations.factor_layouts`.
"""

import copy
import functools
import os
import re
from pathlib import Path

import torch

from ktlib.conversion.write import FUSED_FILE, Pair, check_against_peft, listed, write_apart, write_peft
from ktlib.files import tensor_files
from ktlib.files.ownership import new_folder
from ktlib.files.tensor_files import Stored
from ktlib.integrations.expert_names import FUSED, ExpertLayout, ExpertProjection
from ktlib.integrations.factor_layouts import Base, as_peft_has_it, check_options, layouts_of
from ktlib.integrations.model_class import meta_model
from ktlib.integrations.peft_settings import (
    ADAPTER_FILE,
    CONFIG,
    MATRIX,
    matches,
    rank_and_alpha,
    read_settings,
    refuse_unsupported,
    weight_of,
)
from ktlib.integrations.transformers_experts import is_experts
from ktlib.names import PREFIX, bare_model
from ktlib.reference import lora_layout

LAYOUTS = ("peft", "per_expert", "ktransformers")
_STACK = re.compile(r"layers\.(\d+)\.experts\.(gate|up|down)_lora_([ab])")


def import_adapter(source, out, base, lora_b_order=None, lora_a_features=None, allow_nonfinite=False):
    """Write the adapter in folder ``source``, in any of the layouts above, as a stock PEFT adapter; returns ``out``.

    The result is for ``PeftModel.from_pretrained`` with transformers 5 (with or without :func:`ktlib.factor_adapters`).
    Values are moved, not computed; one layer is in memory at a time; ``out`` appears complete or not at all.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or
            ``fused_expert_lora.safetensors``, or both. Another checkpoint or partial folder is refused.
        out: a folder that does not exist or is empty.
        base: the base model's checkpoint folder, its transformers config, or the model: weights are not looked at. Its
            ``architectures`` name the class, multimodal or not, that the adapter is for. A file made for the text class
            of a multimodal model, or the other way round, gets the names of the class of ``base``.
        lora_b_order: "rank_major" or "grouped_by_expert", the order of lora_B's columns in a file with routed experts
            in the first layout. Default: as the file records it, else PEFT's, rank-major. It is needed for a file by
            Unsloth that does not record it; before 2026.9.6 Unsloth grouped by expert, for most models.
        lora_a_features: "in" or "out", the features that lora_A of routed experts has in such a file. Default: as the
            shapes say, and where in_features equal out_features as the version of PEFT in the file says. It is needed
            where neither decides; PEFT before 0.19.1 wrote "out", for most models.
        allow_nonfinite: carry NaN and Inf over instead of refusing the adapter.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` is not empty.
        ValueError: not an adapter of this base model: missing, extra and wrongly shaped tensors are listed, also ranks
            that differ from the settings, or that differ between experts of a layer; a damaged
            ``adapter_config.json``; settings in it that none of the layouts has: DoRA, biases, aLoRA, an
            ``init_lora_weights`` that may change the base when PEFT loads it (PiSSA, OLoRA and others; PEFT can convert
            these as it saves), and whatever else is not known to be without effect; one of the two options is needed,
            or says something else than the file; NaN or Inf, with the tensors' names.
    """
    check_options(lora_b_order, lora_a_features)
    with new_folder(out) as folder:
        settings, tensors, config = _read(Path(source), base, allow_nonfinite)
        options = {"lora_b_order": lora_b_order, "lora_a_features": lora_a_features}
        pairs, modules_to_save = _pairs(settings, tensors, config, Path(source), **options)
        write_peft(folder, settings, pairs, modules_to_save, config)
    return Path(out)


def export_adapter(source, out, base, layout="per_expert", allow_nonfinite=False):
    """Write the stock PEFT adapter in folder ``source`` in another layout, for servers that want it; returns ``out``.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's layout.
        out, base, allow_nonfinite: as in :func:`import_adapter`.
        layout: "per_expert" (vLLM, SGLang, PEFT from 0.17 on with transformers 4; PEFT with transformers 5 converts
            it), "ktransformers", or "peft" (checks and copies; what vLLM takes for models whose checkpoints have the
            experts stacked, such as Qwen3-VL-MoE).

    Raises:
        ValueError: besides the errors of :func:`import_adapter`, an unknown layout, or what it cannot represent:
            KTransformers has one rank and scaling for all experts and adapts gate, up and down together; a family whose
            checkpoints have no module per expert, or a weight in another form, has no names for the first layout; PEFT
            with transformers 5 cannot convert the experts of some families, among them those without a gate and those
            of some multimodal models, and would load the adapter without them.

    Warns:
        UserWarning: parts of the adapter have different scalings, which vLLM up to 0.30 does not know.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, needs one of {', '.join(LAYOUTS)}")
    with new_folder(out) as folder:
        settings, tensors, config = _read(Path(source), base, allow_nonfinite)
        pairs, modules_to_save = _pairs(settings, tensors, config, Path(source))
        if layout == "peft":
            write_peft(folder, settings, pairs, modules_to_save, config)
        else:
            made, _ = check_against_peft(settings, pairs, modules_to_save, config)
            write_apart(folder, settings, pairs, modules_to_save, config, layout, made)
    return Path(out)


def _read(source, base, allow_nonfinite):
    """Settings (dict of adapter_config.json), tensors (name: Stored) and the base model's config."""
    if not (source / CONFIG).is_file():
        raise FileNotFoundError(f"source: {source} has no {CONFIG}, which says the rank and the scaling")
    settings = read_settings(source / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{source / CONFIG}: peft_type is {settings.get('peft_type')!r}, needs 'LORA'")
    for name in ("r", "lora_alpha"):
        if settings.get(name) is None:
            raise ValueError(f"{source / CONFIG}: has no {name}, needs a number")
    refuse_unsupported(settings, source / CONFIG)
    files = [source / name for name in (ADAPTER_FILE, FUSED_FILE) if (source / name).is_file()]
    if not files:
        raise FileNotFoundError(f"source: {source} has neither {ADAPTER_FILE} nor {FUSED_FILE}")
    tensors = tensor_files.read(*files)
    if not allow_nonfinite:
        _refuse_nonfinite(tensors, source)
    return settings, tensors, config_of(base)


def _refuse_nonfinite(tensors, source):
    problems = [f"NaN or Inf: {name}" for name, tensor in tensors.items() if not tensor_files.is_finite(tensor.load())]
    if problems:
        text = listed(problems, "not finite; allow_nonfinite=True (ktlib adapter --allow-nonfinite) carries it over")
        raise ValueError(f"{source}: {text}")


def config_of(base):
    """The config of a base model, its checkpoint folder, or itself; it names the model's class."""
    from transformers import AutoConfig

    if isinstance(base, torch.nn.Module):
        model = bare_model(base)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        return config
    return AutoConfig.from_pretrained(base) if isinstance(base, str | os.PathLike) else base


# ------------------------------------------------------------------------------------------------------------ reading


def _pairs(settings, tensors, config, source, **options):
    """``({weight in transformers 5: Pair}, {name: Stored} of modules_to_save)``, experts fused, from any layout."""
    decide = functools.partial(layouts_of, **options)
    pairs, others, problems, model = fit(settings, tensors, config, source / CONFIG, decide)
    of_modules = settings.get("modules_to_save") or ()
    saved = {key: tensor for key, tensor in others.items() if any(f".{name}." in f".{key}" for name in of_modules)}
    problems = [f"unknown: {key}" for key in others if key not in saved] + problems
    if problems:
        raise ValueError(f"{source}: {listed(problems, 'does not fit ' + type(model).__name__)}")
    if not pairs:
        raise ValueError(f"{source}: no LoRA tensors")
    return pairs, saved


def fit(settings, tensors, config, where, decide, other_classes=True):
    """An adapter's tensors, matched with the base model of this config.

    Args:
        settings, tensors: as :func:`ktlib.integrations.peft_settings.read_settings` and
            :func:`ktlib.files.tensor_files.read` return them.
        where: what errors call the settings.
        decide: :func:`ktlib.integrations.factor_layouts.layouts_of`, or ``refuse_other_layouts``.
        other_classes: take the names of the text class for those of the multimodal class around it, and back; and do
            without the beginning that PEFT gives to names in files. PEFT itself would not find such tensors.

    Returns:
        ``{weight in transformers 5: Pair}``, experts fused, from any layout; ``{name: Stored}`` of what is no matrix of
        a LoRA pair; problems, such as "missing: lora_A of ..."; the base model on the meta device.
    """
    model = meta_model(config)
    layout, names = ExpertLayout(model), _shapes(model)
    experts = [name for name, module in model.named_modules() if is_experts(module)]
    halves, parts, others, problems = {}, {}, {}, []
    for key, tensor in tensors.items():
        if match := MATRIX.fullmatch(key):
            weight, letter = weight_of(match[1], settings), match[2].lower()
            if not other_classes and not key.startswith(PREFIX):
                problems.append(f"extra: {key} does not begin with {PREFIX}")
            if isinstance(place := layout.located(weight, other_classes), ExpertProjection):
                matrices = parts.setdefault((place.parameter, place.projection), {}).setdefault(place.expert, {})
            else:
                matrices = halves.setdefault(place, {})
            matrices.setdefault("name", weight)
        elif match := _STACK.fullmatch(key):
            layer, one, letter = match.groups()
            parameter = _stacked_parameter(layer, one, experts)
            matrices = parts.setdefault((parameter, one), {}).setdefault("all", {})
        else:
            matrices, letter = others, key
        if letter in matrices:
            problems.append(f"twice: {key} is another name of a tensor that is there already")
        matrices[letter] = tensor
    halves |= _experts_as_peft_has_them(halves, names, model, layout, functools.partial(decide, settings, where=where))
    pairs = _plain_pairs(halves, names, settings, problems)
    for parameter in dict.fromkeys(parameter for parameter, _ in parts):
        found = {part: of for (one, part), of in parts.items() if one == parameter}
        pair = _fuse(parameter, found, names.get(parameter), settings, problems, layout)
        if pair:
            pairs[parameter] = pair
    stacked = any("all" in of for of in parts.values())
    given = [of["name"] for of in halves.values()]
    targeted = _targeted(settings, model, layout, given, bool(parts), experts if stacked else [])
    named = {*halves, *pairs, *(parameter for parameter, _ in parts)}
    problems += [f"missing: both matrices of {weight}" for weight in sorted(targeted) if weight not in named]
    return pairs, others, problems, model


def _shapes(model):
    """``{weight: (E, out, in)}`` of everything that LoRA can adapt, E = 1 where there are no experts."""
    shapes = {}
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if value.dim() in (2, 3):
                *experts, out, inner = value.shape
                if getattr(module, "is_transposed", False) and experts:
                    out, inner = inner, out
                shapes[f"{name}.{parameter}"] = (*experts, out, inner) if experts else (1, out, inner)
    return shapes


def _targeted(settings, model, layout, given, apart, stacked_experts):
    """Weights that an adapter with these settings must have: a file that lacks a layer is noticed by it.

    ``given`` are names of weights in the file; ``apart`` says that it has parts of weights, so the names in the
    settings are those of files.
    """
    linears = {name: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if apart:
        linears = layout.linears(model)
    elif not any(name.startswith(f"{layout.decoder}.") for name in given):  # of a class that has no towers
        linears = {of_text: f"{name}.weight" for name in linears if (of_text := layout.of_text_class(name))}
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if str(targets).lower() == "all-linear":
        targets = [name for name in linears if name != "lm_head"]
    chosen = {name: weight for name, weight in linears.items() if not matches(name, excluded)}
    weights = {weight for name, weight in chosen.items() if matches(name, targets)}
    weights |= {name for name in layout.experts if name.rpartition(".")[0] in stacked_experts}
    # Parameters of experts are named in a file that has them apart for readers that put them together.
    parameters = layout.names - (set(layout.experts) if apart else set())
    return weights | {name for name in parameters if matches(name, settings.get("target_parameters"))}


def _stacked_parameter(layer, part, experts):
    """``"model.layers.1.mlp.experts.gate_up_proj"`` for ``layers.1.experts.gate_lora_a``."""
    module = next((name for name in experts if f".layers.{layer}." in f".{name}."), f"layers.{layer}.mlp.experts")
    return f"{module}.{'down_proj' if part == 'down' else 'gate_up_proj'}"


def _experts_as_peft_has_them(halves, names, model, layout, decide):
    """Those of ``{weight: {letter: Stored}}`` that adapt routed experts as wholes, in PEFT's layout of now."""
    of_experts = {
        weight: of for weight, of in halves.items() if {"a", "b"} <= of.keys() and names.get(weight, (1,))[0] > 1
    }
    shapes = {weight: (of["a"].shape, of["b"].shape) for weight, of in of_experts.items()}
    transposed = any(module.is_transposed for module in model.modules() if is_experts(module))
    base = Base(names, transposed, were_modules=layout.per_expert)
    orders, features = decide(shapes=shapes, base=base)
    converted = {}
    for weight, of in of_experts.items():
        a, b = as_peft_has_it(of["a"], of["b"], names[weight][0], orders[weight], features)
        converted[weight] = of | {"a": a, "b": b}
    return converted


def _plain_pairs(halves, names, settings, problems):
    pairs = {}
    for weight, of in halves.items():
        if missing := {"a", "b"} - set(of):
            problems.append(f"missing: lora_{missing.pop().upper()} of {weight}")
            continue
        if weight not in names:
            problems.append(f"extra: {weight} is not in the base model")
            continue
        pair = _pair(weight, of, names[weight], settings, problems)
        if pair:
            pairs[weight] = pair
    return pairs


def _pair(weight, of, shape, settings, problems):
    """A pair as PEFT stores it, if it fits the parameter and the settings, which know it by its name in the file."""
    a, b = of["a"], of["b"]
    rank, alpha = rank_and_alpha(settings, of["name"])
    wanted = lora_layout.shapes(rank, *shape)
    if (a.shape, b.shape) != wanted:
        problems.append(
            f"wrong shape: {weight} has lora_A {a.shape} and lora_B {b.shape}, needs {wanted[0]} and {wanted[1]} at "
            f"rank {rank}"
        )
        return None
    return Pair(a, b, rank, alpha)


# ------------------------------------------------------------------------------------------- many tensors into one pair


def _fuse(parameter, found, value, settings, problems, layout):
    """One Pair for a fused parameter from the tensors of its parts and experts."""
    if value is None:
        problems.append(f"extra: {parameter} is not in the base model")
        return None
    experts, wanted = value[0], FUSED.get(parameter.rpartition(".")[2]) or layout.projections(parameter)
    before = len(problems)
    stacks = {}
    for part in wanted:
        of = found.get(part, {})
        stacked = "all" in of
        for one in ["all"] if stacked else range(experts):
            where = f"{part} in {parameter}" + ("" if stacked else f", expert {one}")
            lacking = [letter for letter in "ab" if letter not in of.get(one, {})]
            problems += [f"missing: lora_{letter.upper()} of {where}" for letter in lacking]
        problems += [f"extra: {part} of {parameter}, expert {e}" for e in of if e != "all" and e >= experts]
        if len(problems) == before:
            out, inner = value[1] // len(wanted), value[2]
            stacks[part] = _stack(parameter, part, of, (experts, out, inner), settings, problems)
    if len(problems) > before:
        return None
    if len({(pair.rank, pair.alpha) for pair in stacks.values()}) > 1:
        problems.append(f"wrong rank: gate and up of {parameter} differ in rank or alpha, PEFT has one for both")
        return None
    return _joined(list(stacks.values()), experts, settings.get("use_rslora"))


def _stack(parameter, part, of, shape, settings, problems):
    """``Pair`` of A (E, r, in) and B (E, out, r) of one projection, from one stack or from one tensor per expert."""
    experts, out, inner = shape
    stacked = "all" in of
    if stacked:
        names = [f"{parameter.rpartition('.')[0]}.{part}_proj"]
    else:
        names = [of[e]["name"] for e in range(experts)]
    kinds = {tuple(rank_and_alpha(settings, name)) for name in names}
    rank, alpha = min(kinds)
    if len(kinds) > 1:
        problems.append(f"wrong rank: experts of {part} in {parameter} have different ranks or alphas: {sorted(kinds)}")
        return None
    for letter, (rows, columns) in (("a", (rank, inner)), ("b", (out, rank))):
        wanted = (experts, rows, columns) if stacked else (rows, columns)
        for one, tensors in of.items():
            if tensors[letter].shape != wanted:
                where = f"lora_{letter.upper()} of {part} in {parameter}" + ("" if stacked else f", expert {one}")
                problems.append(f"wrong shape: {where} is {tensors[letter].shape}, needs {wanted} at rank {rank}")
    if any(text.startswith("wrong shape") for text in problems):
        return None
    dtypes = {tensors[letter].dtype for tensors in of.values() for letter in "ab"}
    if len(dtypes) > 1:
        problems.append(f"wrong dtype: tensors of {part} in {parameter} are {sorted(map(str, dtypes))}, need one")
        return None

    def all_of(letter, rows, columns):
        def load():
            if stacked:
                return of["all"][letter].load()
            return torch.stack([of[e][letter].load() for e in range(experts)])

        return Stored((experts, rows, columns), min(dtypes, key=str), load)

    return Pair(all_of("a", rank, inner), all_of("b", out, rank), rank, alpha)


def _joined(stacks, experts, rslora):
    """The pair in PEFT's layout of one projection, or of two side by side (see the formula at the top)."""
    rank, alpha = stacks[0].rank, stacks[0].alpha
    shared = len(stacks) == 1 or torch.equal(stacks[0].a.load(), stacks[1].a.load())
    out, inner = stacks[0].b.shape[1], stacks[0].a.shape[2]
    if not shared:
        rank, alpha = 2 * rank, alpha * (2**0.5 if rslora else 2)

    def load_a():
        return lora_layout.stack_a(torch.cat([pair.a.load() for pair in (stacks[:1] if shared else stacks)], dim=1))

    def load_b():
        columns = [pair.b.load() for pair in stacks]
        if shared:
            b = torch.cat(columns, dim=1)
        else:
            b = torch.zeros(experts, 2 * out, rank, dtype=columns[0].dtype)
            b[:, :out, : rank // 2], b[:, out:, rank // 2 :] = columns
        return lora_layout.stack_b(b)

    shape_a, shape_b = lora_layout.shapes(rank, experts, len(stacks) * out, inner)
    a, b = Stored(shape_a, stacks[0].a.dtype, load_a), Stored(shape_b, stacks[0].b.dtype, load_b)
    return Pair(a, b, rank, alpha)
