"""Adapters in and out: stock PEFT, one module per expert (transformers 4), and KTransformers' fused files.

====================  ====================================================================  =======================
layout                tensors of routed experts, E experts, rank r                          rest
====================  ====================================================================  =======================
peft                  experts.base_layer.lora_A (E*r, H), lora_B (2I, r*E): gate_up_proj;   the same names in
                      experts.lora_A (E*r, I), lora_B (H, r*E): down_proj                   all three layouts:
per_expert            experts.3.gate_proj.lora_A (r, H), lora_B (I, r), also up and down    attention, shared
ktransformers         layers.1.experts.gate_lora_a (E, r, H), gate_lora_b (E, I, r), ...    experts, dense MLPs
====================  ====================================================================  =======================

PEFT has one A for gate and up. Two separate adapters of rank r, ``s B_g A_g`` and ``s B_u A_u``, are one of rank 2r::

    A = [A_g; A_u] (2r, H)      B = [[B_g, 0], [0, B_u]] (2I, 2r)      alpha doubled (rslora: times sqrt 2): same s

If A_g equals A_u in every expert of a layer, they become ``A = A_g, B = [B_g; B_u]`` of rank r. In the other direction,
an adapter of rank R becomes two of rank R with ``A_g = A_u = A``. An adapter of the block form above becomes two of
rank R/2, if down_proj's adapter has half its rank, too, or does not exist. Elements are moved and never computed, so a
conversion and its inverse give the same bits.

Files of the first layout by PEFT before 0.19.1 or by Unsloth have other shapes or orders: see
:mod:`ktlib.integrations.factor_layouts`.
"""

import copy
import functools
import os
import re
from pathlib import Path

import torch

from ktlib.conversion.write import FUSED_FILE, Pair, check_against_peft, listed, write_peft, write_per_projection
from ktlib.files import tensor_files
from ktlib.files.ownership import new_folder
from ktlib.files.tensor_files import Stored
from ktlib.integrations.expert_names import FUSED, ExpertLayout, ExpertProjection
from ktlib.integrations.factor_layouts import Base, as_peft_has_it, check_options, layouts_of, warn_of_unsloth
from ktlib.integrations.model_classes import meta_model
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
            these as it saves), and any other setting that is not known to have no effect; ``lora_b_order`` or
            ``lora_a_features`` is needed, or contradicts the file; the shapes of routed experts' factors contradict
            the version of PEFT in the file; NaN or Inf, with the tensors' names.

    Warns:
        UserWarning: the adapter names Unsloth's copy of a model as its base, and nothing says whether Unsloth wrote it.
    """
    check_options(lora_b_order, lora_a_features)
    with new_folder(out) as folder:
        settings, tensors, config = read_adapter(Path(source), base, allow_nonfinite)
        options = {"lora_b_order": lora_b_order, "lora_a_features": lora_a_features}
        pairs, modules_to_save = pairs_and_saved(settings, tensors, config, Path(source), **options)
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
        ValueError: the errors of :func:`import_adapter`, an unknown layout, or an adapter that the layout cannot
            represent. KTransformers has one rank and alpha for all experts and adapts gate, up and down together. The
            layout "per_expert" has no names for families whose checkpoints have no module per expert, or have a weight
            in another form. PEFT with transformers 5 cannot convert the experts of some families, among them those
            without a gate and those of some multimodal models, and would load the adapter without them.

    Warns:
        UserWarning: PEFT reads the adapter of layout "per_expert" and vLLM or SGLang does not, or scales it otherwise;
            :mod:`ktlib.conversion.adapter_targets` says what they need.

    Rank-stabilised scaling, ``use_rslora``, becomes an equal ``lora_alpha / r``, since not every server knows it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, needs one of {', '.join(LAYOUTS)}")
    with new_folder(out) as folder:
        settings, tensors, config = read_adapter(Path(source), base, allow_nonfinite)
        pairs, modules_to_save = pairs_and_saved(settings, tensors, config, Path(source))
        if layout == "peft":
            write_peft(folder, settings, pairs, modules_to_save, config)
        else:
            made, _ = check_against_peft(settings, pairs, modules_to_save, config)
            write_per_projection(folder, settings, pairs, modules_to_save, config, layout, made)
    return Path(out)


def read_adapter(source, base, allow_nonfinite=False, argument="source", **why):
    """Settings (dict of adapter_config.json), tensors (name: Stored) and the base model's config.

    The caller calls ``source`` what ``argument`` says; ``why`` as in
    :func:`~ktlib.integrations.peft_settings.refuse_unsupported`.
    """
    if not (source / CONFIG).is_file():
        elsewhere = tensor_files.holder_of(source, CONFIG)
        raise FileNotFoundError(f"{argument}: {source} has no {CONFIG}, which says the rank and the scaling{elsewhere}")
    settings = read_settings(source / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{source / CONFIG}: peft_type is {settings.get('peft_type')!r}, needs 'LORA'")
    for name in ("r", "lora_alpha"):
        if settings.get(name) is None:
            raise ValueError(f"{source / CONFIG}: has no {name}, needs a number")
    refuse_unsupported(settings, source / CONFIG, **why)
    files = [source / name for name in (ADAPTER_FILE, FUSED_FILE) if (source / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{argument}: {source} has neither {ADAPTER_FILE} nor {FUSED_FILE}")
    tensors = tensor_files.read(*files)
    if not allow_nonfinite:
        refuse_nonfinite(tensors, source, "; allow_nonfinite=True (ktlib adapter --allow-nonfinite) carries it over")
    return settings, tensors, config_of(base)


def refuse_nonfinite(tensors, source, advice=""):
    """ValueError that names the tensors of an adapter with NaN or Inf, and ends with an ``advice``."""
    problems = [f"NaN or Inf: {name}" for name, tensor in tensors.items() if not tensor_files.is_finite(tensor.load())]
    if problems:
        raise ValueError(f"{source}: {listed(problems, f'not finite{advice}')}")


def config_of(base):
    """The config of a base model, of a checkpoint folder or itself, with the model's class in ``architectures``."""
    from transformers import AutoConfig

    if isinstance(base, torch.nn.Module):
        model = bare_model(base)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        return config
    return AutoConfig.from_pretrained(base) if isinstance(base, str | os.PathLike) else base


# ------------------------------------------------------------------------------------------------------------ reading


def pairs_and_saved(settings, tensors, config, source, **options):
    """``({weight in transformers 5: Pair}, {name: Stored} of modules_to_save)`` from any layout, experts fused."""

    def decide(settings, shapes, where, base):
        if options.get("lora_b_order") is None:
            warn_of_unsloth(settings, shapes, where)
        return layouts_of(settings, shapes, where, base, **options)

    pairs, others, problems, model = fit(settings, tensors, config, source / CONFIG, decide)
    modules_to_save = settings.get("modules_to_save") or ()
    # PEFT saves modules whose names end like this, also within a word: "norm" stands for "input_layernorm" too
    saved = {key: tensor for key, tensor in others.items() if any(f"{name}." in key for name in modules_to_save)}
    problems = [f"unknown: {key}" for key in others if key not in saved] + problems
    if problems:
        made_for = settings.get("base_model_name_or_path")
        title = f"does not fit {type(model).__name__}" + (f", names {made_for!r} as its base" if made_for else "")
        raise ValueError(f"{source}: {listed(problems, title)}")
    if not pairs:
        raise ValueError(f"{source}: no LoRA tensors")
    return pairs, saved


def fit(settings, tensors, config, where, decide, other_classes=True):
    """The LoRA pairs of an adapter, found by matching its tensors with the base model of ``config``.

    Args:
        settings, tensors: as :func:`ktlib.integrations.peft_settings.read_settings` and
            :func:`ktlib.files.tensor_files.read` return them.
        where: the path of the settings, for errors.
        decide: :func:`ktlib.integrations.factor_layouts.layouts_of`, or ``refuse_other_layouts``.
        other_classes: also match names of the text class with a multimodal model, and names of the multimodal class
            with a text model, and names without PEFT's prefix. PEFT itself would not find such tensors.

    Returns:
        ``{weight in transformers 5: Pair}`` from any layout, experts fused; ``{name: Stored}`` of tensors that are not
        LoRA matrices; a list of problems, such as "missing: lora_A of ..."; the base model on the meta device.
    """
    model = meta_model(config)
    layout, shapes = ExpertLayout(model), _shapes(model)
    experts = [name for name, module in model.named_modules() if is_experts(module)]
    # whole: {weight: {letter: Stored, "name": its name in the file}}, letters "a" and "b"
    # split: {(weight, projection): {expert or "all": {letter: Stored, "name": its name in the file}}}
    whole, split, others, problems = {}, {}, {}, []
    for key, tensor in tensors.items():
        if match := MATRIX.fullmatch(key):
            weight, letter = weight_of(match[1], settings), match[2].lower()
            if not other_classes and not key.startswith(PREFIX):
                problems.append(f"extra: {key} does not begin with {PREFIX}")
            if isinstance(place := layout.located(weight, other_classes), ExpertProjection):
                matrices = split.setdefault((place.parameter, place.projection), {}).setdefault(place.expert, {})
            else:
                matrices = whole.setdefault(place, {})
            matrices.setdefault("name", weight)
        elif match := _STACK.fullmatch(key):
            layer, projection, letter = match.groups()
            parameter = _stacked_parameter(layer, projection, experts)
            matrices = split.setdefault((parameter, projection), {}).setdefault("all", {})
        else:
            matrices, letter = others, key
        if letter in matrices:
            problems.append(f"twice: {key} is another name of a tensor that is there already")
        matrices[letter] = tensor
    whole |= _experts_as_peft_has_them(whole, shapes, model, layout, functools.partial(decide, settings, where=where))
    pairs = _plain_pairs(whole, shapes, settings, problems)
    for parameter in dict.fromkeys(parameter for parameter, _ in split):
        found = {projection: by_expert for (name, projection), by_expert in split.items() if name == parameter}
        pair = _fuse(parameter, found, shapes.get(parameter), settings, problems, layout)
        if pair:
            pairs[parameter] = pair
    stacked = any("all" in by_expert for by_expert in split.values())
    given = [matrices["name"] for matrices in whole.values()]
    targeted = _targeted(settings, model, layout, given, bool(split), experts if stacked else [])
    named = {*whole, *pairs, *(parameter for parameter, _ in split)}
    problems += [f"missing: both matrices of {weight}" for weight in sorted(targeted) if weight not in named]
    return pairs, others, problems, model


def _shapes(model):
    """``{weight: (E, out, in)}`` of all weights that LoRA can adapt; E = 1 for weights without experts."""
    shapes = {}
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if value.dim() in (2, 3):
                *experts, out, inner = value.shape
                if getattr(module, "is_transposed", False) and experts:
                    out, inner = inner, out
                shapes[f"{name}.{parameter}"] = (*experts, out, inner) if experts else (1, out, inner)
    return shapes


def _targeted(settings, model, layout, given, is_split, stacked_experts):
    """The weights that an adapter with these settings must have, so that a file that lacks a layer is noticed.

    ``given`` are the names of whole weights in the file. ``is_split`` says that the file has tensors per projection;
    then the settings use the names that checkpoint files have.
    """
    linears = {name: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if is_split:
        linears = layout.linears(model)
    elif not any(name.startswith(f"{layout.decoder}.") for name in given):  # the file was made for the text class
        linears = {text_name: f"{name}.weight" for name in linears if (text_name := layout.of_text_class(name))}
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if str(targets).lower() == "all-linear":
        targets = [name for name in linears if name != "lm_head"]
    chosen = {name: weight for name, weight in linears.items() if not matches(name, excluded)}
    weights = {weight for name, weight in chosen.items() if matches(name, targets)}
    weights |= {name for name in layout.experts if name.rpartition(".")[0] in stacked_experts}
    # A file with tensors per projection names experts in target_parameters only for readers that fuse these tensors.
    parameters = layout.names - (set(layout.experts) if is_split else set())
    return weights | {name for name in parameters if matches(name, settings.get("target_parameters"))}


def _stacked_parameter(layer, projection, experts):
    """``"model.layers.1.mlp.experts.gate_up_proj"`` for ``layers.1.experts.gate_lora_a``."""
    module = next((name for name in experts if f".layers.{layer}." in f".{name}."), f"layers.{layer}.mlp.experts")
    return f"{module}.{'down_proj' if projection == 'down' else 'gate_up_proj'}"


def _experts_as_peft_has_them(whole, shapes, model, layout, decide):
    """The entries of ``whole`` for routed experts, in the layout of today's PEFT."""
    of_experts = {
        weight: matrices
        for weight, matrices in whole.items()
        if {"a", "b"} <= matrices.keys() and shapes.get(weight, (1,))[0] > 1
    }
    in_file = {weight: (matrices["a"].shape, matrices["b"].shape) for weight, matrices in of_experts.items()}
    transposed = any(module.is_transposed for module in model.modules() if is_experts(module))
    base = Base(shapes, transposed, were_modules=layout.per_expert)
    orders, features = decide(shapes=in_file, base=base)
    converted = {}
    for weight, matrices in of_experts.items():
        a, b = as_peft_has_it(matrices["a"], matrices["b"], shapes[weight][0], orders[weight], features)
        converted[weight] = matrices | {"a": a, "b": b}
    return converted


def _plain_pairs(whole, shapes, settings, problems):
    """``{weight: Pair}`` of the entries that fit the model and the settings; what does not fit goes to ``problems``."""
    pairs = {}
    for weight, matrices in whole.items():
        if missing := {"a", "b"} - set(matrices):
            problems.append(f"missing: lora_{missing.pop().upper()} of {weight}")
            continue
        if weight not in shapes:
            problems.append(f"extra: {weight} is not in the base model")
            continue
        a, b = matrices["a"], matrices["b"]
        rank, alpha = rank_and_alpha(settings, matrices["name"])
        wanted = lora_layout.shapes(rank, *shapes[weight])
        if (a.shape, b.shape) == wanted:
            pairs[weight] = Pair(a, b, rank, alpha)
        else:
            problems.append(
                f"wrong shape: {weight} has lora_A {a.shape} and lora_B {b.shape}, needs {wanted[0]} and {wanted[1]} "
                f"at rank {rank}"
            )
    return pairs


# -------------------------------------------------------------------------------- tensors per projection into one pair


def _fuse(parameter, found, shape, settings, problems, layout):
    """The Pair of a fused parameter from its projections' tensors, or None after adding to ``problems``.

    ``found`` is ``{projection: {expert or "all": {letter: Stored, "name": ...}}}``, ``shape`` the parameter's (E, out,
    in), None if the model does not have it.
    """
    if shape is None:
        problems.append(f"extra: {parameter} is not in the base model")
        return None
    experts, wanted = shape[0], FUSED.get(parameter.rpartition(".")[2]) or layout.projections(parameter)
    before = len(problems)
    stacks = {}
    for projection in wanted:
        by_expert = found.get(projection, {})
        stacked = "all" in by_expert
        for expert in ["all"] if stacked else range(experts):
            where = f"{projection} in {parameter}" + ("" if stacked else f", expert {expert}")
            lacking = [letter for letter in "ab" if letter not in by_expert.get(expert, {})]
            problems += [f"missing: lora_{letter.upper()} of {where}" for letter in lacking]
        problems += [
            f"extra: {projection} of {parameter}, expert {e}" for e in by_expert if e != "all" and e >= experts
        ]
        if len(problems) == before:
            out, inner = shape[1] // len(wanted), shape[2]
            stacks[projection] = _stack(parameter, projection, by_expert, (experts, out, inner), settings, problems)
    if len(problems) > before:
        return None
    if len({(pair.rank, pair.alpha) for pair in stacks.values()}) > 1:
        problems.append(f"wrong rank: gate and up of {parameter} differ in rank or alpha, PEFT has one for both")
        return None
    return _joined(list(stacks.values()), experts, settings.get("use_rslora"))


def _stack(parameter, projection, by_expert, shape, settings, problems):
    """The Pair of A (E, r, in) and B (E, out, r) of one projection, from one stack or from one tensor per expert.

    None after adding to ``problems``.
    """
    experts, out, inner = shape
    stacked = "all" in by_expert
    if stacked:
        names = [f"{parameter.rpartition('.')[0]}.{projection}_proj"]
    else:
        names = [by_expert[e]["name"] for e in range(experts)]
    kinds = {tuple(rank_and_alpha(settings, name)) for name in names}
    rank, alpha = min(kinds)
    if stacked and settings.get("use_rslora"):
        alpha /= rank**0.5  # KTransformers scales experts by alpha / rank even if PEFT scales the rest with rslora
    if len(kinds) > 1:
        problems.append(
            f"wrong rank: experts of {projection} in {parameter} have different ranks or alphas: {sorted(kinds)}"
        )
        return None
    for letter, (rows, columns) in (("a", (rank, inner)), ("b", (out, rank))):
        wanted = (experts, rows, columns) if stacked else (rows, columns)
        for expert, matrices in by_expert.items():
            if matrices[letter].shape != wanted:
                where = f"lora_{letter.upper()} of {projection} in {parameter}"
                where += "" if stacked else f", expert {expert}"
                problems.append(f"wrong shape: {where} is {matrices[letter].shape}, needs {wanted} at rank {rank}")
    if any(text.startswith("wrong shape") for text in problems):
        return None
    dtypes = {matrices[letter].dtype for matrices in by_expert.values() for letter in "ab"}
    if len(dtypes) > 1:
        names = sorted(map(str, dtypes))
        problems.append(f"wrong dtype: tensors of {projection} in {parameter} are {names}, need one")
        return None
    (dtype,) = dtypes

    def stack_of(letter, rows, columns):
        def load():
            if stacked:
                return by_expert["all"][letter].load()
            return torch.stack([by_expert[e][letter].load() for e in range(experts)])

        return Stored((experts, rows, columns), dtype, load)

    return Pair(stack_of("a", rank, inner), stack_of("b", out, rank), rank, alpha)


def _joined(stacks, experts, rslora):
    """The pair in PEFT's layout of one projection, or of gate and up together by the module's formula."""
    rank, alpha = stacks[0].rank, stacks[0].alpha
    one_a = len(stacks) == 1 or torch.equal(stacks[0].a.load(), stacks[1].a.load())
    out, inner = stacks[0].b.shape[1], stacks[0].a.shape[2]
    if not one_a:
        rank, alpha = 2 * rank, alpha * (2**0.5 if rslora else 2)

    def load_a():
        return lora_layout.stack_a(torch.cat([pair.a.load() for pair in (stacks[:1] if one_a else stacks)], dim=1))

    def load_b():
        blocks = [pair.b.load() for pair in stacks]
        if one_a:
            b = torch.cat(blocks, dim=1)
        else:
            b = torch.zeros(experts, 2 * out, rank, dtype=blocks[0].dtype)
            b[:, :out, : rank // 2], b[:, out:, rank // 2 :] = blocks
        return lora_layout.stack_b(b)

    shape_a, shape_b = lora_layout.shapes(rank, experts, len(stacks) * out, inner)
    a, b = Stored(shape_a, stacks[0].a.dtype, load_a), Stored(shape_b, stacks[0].b.dtype, load_b)
    return Pair(a, b, rank, alpha)
