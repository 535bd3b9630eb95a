"""Merges an adapter into its base: a checkpoint whose weights are ``W + scaling * B A``.

Weights are merged one tensor of the base's files at a time, so the model is never in memory. The names and shapes of
the result are those of the base's files, for which servers are made: one tensor per expert, or stacks. A quantised base
is decoded.

``W + scaling * B A`` is computed in float64 and rounded to the dtype of the result. An update that is small beside the
last bit of W is rounded away: bf16 has 8 bits, so it loses some percent of an ordinary adapter's effect, and nearly all
of that of an adapter which was hardly trained. The report says how much, for each tensor.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ktlib.conversion.adapters import pairs_and_saved, read_adapter, refuse_nonfinite
from ktlib.conversion.fuse import LEFT_OUT, SAMPLE
from ktlib.conversion.quantised_sources import decoded_tensors, without_settings
from ktlib.conversion.write import Pair, listed
from ktlib.files import ownership, tensor_files
from ktlib.files.tensor_files import Stored
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection, is_transposed_by_shape, operations_of
from ktlib.integrations.model_classes import meta_model
from ktlib.integrations.peft_settings import CONFIG
from ktlib.integrations.stored_formats import settings_of
from ktlib.names import PREFIX, bare_name, first_of
from ktlib.reference import lora_layout

NOTE, REPORT = "merged_from.json", "merge_report.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("base", "hub")
# files beside a quantised checkpoint that say once more how it is quantised
_OF_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*")
_CHUNK = 2**20  # elements of a weight that are in memory in float64 at a time


def merge_adapter(adapter, out, base, dtype=None, layout="base", progress=True):
    """Write the model in folder ``base`` with the adapter in folder ``adapter`` merged into it; returns ``out``.

    The result is an ordinary checkpoint, for ``from_pretrained`` and for servers. Its tensors have the names and shapes
    that they have in ``base``; those of a quantised base are decoded, and ``quantization_config`` is removed from the
    config. Tensors that the adapter does not change are copied bit for bit, and so are all other files of ``base``. The
    tokenizer and the chat template are the adapter's if they are saved beside it. If the adapter changes one of two
    tied weights, as those of embeddings and output head, the result holds both, untied.

    ``merge_report.json`` in ``out`` has for each changed tensor the share of its update that rounding lost: the norm of
    (rounded - exact), divided by the norm of the update.

    One tensor is in memory at a time. ``out`` can be loaded only when it is complete; after an interruption call the
    function again, as :func:`ktlib.fuse_checkpoint`.

    Args:
        adapter: a LoRA adapter in any layout that :func:`ktlib.import_adapter` reads without options.
        out: a folder without a model, or an interrupted merge of the same adapter and base.
        base: a checkpoint folder; quantised ones as far as ktlib loads them.
        dtype: of the changed tensors, "bf16" or "fp32". Default: as they are in ``base``, bf16 if it is quantised.
        layout: "base", or "hub" for one tensor per expert, with the names of the family's checkpoints on the hub, also
            if ``base`` holds the experts stacked, as `ktlib fuse` writes them.

    Raises:
        FileNotFoundError: ``adapter`` or ``base`` is not there, or lacks a file.
        ValueError: the adapter does not fit the base (tensors are listed), or is none that a merge can represent: DoRA,
            trained biases, trained tokens, other methods than LoRA and so on, by name; files of the family hold an
            adapted weight in another form; NaN or Inf in the adapter or in a written tensor; ``out`` holds other files.
        OSError: the disk has too little space; nothing is written then.
    """
    from transformers import AutoConfig

    adapter, out, base = Path(adapter), Path(out), Path(base)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, needs None, 'bf16' or 'fp32'")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, needs 'base' or 'hub'")
    if not (base / "config.json").is_file():
        named = tensor_files.read_json(adapter / CONFIG).get("base_model_name_or_path")
        hint = f"; {adapter / CONFIG} names {named!r}" if named else ""
        raise FileNotFoundError(f"base: {base} has no config.json{hint}")
    for name, folder in (("base", base), ("adapter", adapter)):
        if out.resolve() == folder.resolve():
            raise ValueError(
                f"out: {out} is the {name} itself, needs another folder, such as {ownership.free_name(out)}"
            )
    config = AutoConfig.from_pretrained(base)
    why = "which a merge by ktlib cannot represent; load the adapter unmerged, or merge it with PEFT's merge_and_unload"
    settings, factors, _ = read_adapter(adapter, config, allow_nonfinite=True, argument="adapter", why=why)
    refuse_nonfinite(factors, adapter, "; needs an adapter without: `ktlib audit` shows where it began")
    # PEFT saves the base's own embeddings or head beside LoRA of them
    copies = {name: factors.pop(name) for name in list(factors) if name.endswith(".base_layer.weight")}
    pairs, saved = pairs_and_saved(settings, factors, config, adapter)
    files = tensor_files.weight_files(base)
    found = tensor_files.read(*files)
    model = meta_model(config)
    names = ExpertLayout(model)
    if layout == "hub" and not names.per_expert:
        raise ValueError(
            f"layout: got 'hub', but checkpoints of {config.model_type!r} on the hub hold the experts stacked; needs "
            "'base'"
        )
    quantisation = settings_of(config)
    tensors = decoded_tensors(found, quantisation, model, names) if quantisation else dict(found)
    changes = {names.located(name.removeprefix(PREFIX)): value for name, value in saved.items()}
    if both := sorted(changes.keys() & pairs.keys()):
        raise ValueError(f"{adapter}: has new values (modules_to_save) and LoRA of {first_of(both)}, needs one of both")
    power = 0.5 if settings.get("use_rslora") else 1
    changes |= {weight: _Update(pair, pair.alpha / pair.rank**power) for weight, pair in pairs.items()}
    untied = _untie(tensors, changes, model, names)
    _check_copies(copies, tensors, names, adapter)
    written, merged = _plan(tensors, changes, model, names, dtype, layout, base)

    about = {
        "base": tensor_files.digest(found, most=SAMPLE),
        "config": tensor_files.read_json(base / "config.json"),
        "adapter": tensor_files.digest(factors),
        "settings": settings,
        "dtype": dtype,
        "layout": layout,
    }
    texts, left_out = {}, ownership.named(base, (*LEFT_OUT, NOTE, REPORT, CONFIG))
    if quantisation or dtype or untied:
        texts["config.json"] = _config(about["config"], dtype or ("bf16" if quantisation else None), untied)
        left_out.append(base / "config.json")
    if quantisation:
        left_out += ownership.named(base, _OF_QUANTISED)
    copied = {path.name: path for path in sorted(base.iterdir()) if path.is_file() and path not in left_out}
    copied |= {path.name: path for path in ownership.named(adapter, _TOKENIZER) if path.is_file()}
    if not (out / NOTE).is_file():
        ownership.refuse_foreign([out / REPORT], "out", out, replace=False)
    shards = tensor_files.shards_of(written)
    others = list(copied.values())
    try:
        tensor_files.write_sharded(out, shards, about, NOTE, others, progress, argument="out", texts=texts)
        _write_report(out, merged, progress)
    finally:
        _matrices_of.cache_clear()
    return out


class _Update(NamedTuple):
    """The update ``scaling * B A`` of a weight of the model."""

    pair: Pair
    scaling: float


@functools.lru_cache(maxsize=1)  # files hold hundreds of tensors of one weight
def _matrices_of(pair):
    """A (experts, rank, in) and B (experts, out, rank); one expert for weights without."""
    a = pair.a.load()
    experts = a.shape[0] // pair.rank
    return lora_layout.split_a(a, experts), lora_layout.split_b(pair.b.load(), experts)


def _matrices(tensor, is_transposed):
    """A view (experts, outputs, inputs) of a weight."""
    if tensor.dim() not in (2, 3):
        return tensor.view(1, 1, -1)
    tensor = tensor if tensor.dim() == 3 else tensor[None]
    return tensor.mT if is_transposed else tensor


@dataclass(eq=False)
class _Part:
    """A tensor of the result, and where it lies in a weight of the model.

    Attributes:
        name: in the files that are written.
        base: the tensor before the merge.
        weight: the name in the model.
        expert, first_row: which expert's matrix, and where it begins in it; None for a weight that is written whole.
        is_transposed: whether the tensor has (experts, inputs, outputs).
        dtype: of the merged tensor.
        norms: squared norms of what rounding lost and of the update; None before they are known.
    """

    name: str
    base: Stored
    weight: str
    expert: int | None = None
    first_row: int = 0
    is_transposed: bool = False
    dtype: torch.dtype | None = None
    norms: tuple | None = None

    def stored(self, change, is_class_transposed):
        """The merged tensor, as Stored. ``change`` is its weight's :class:`_Update`, or the Stored of new values."""

        def load():
            merged = torch.empty(self.base.shape, dtype=self.dtype)
            self.measure(merged, change, is_class_transposed, fill=True)
            if not all(map(math.isfinite, self.norms)):
                raise ValueError(
                    f"{self.name}: has NaN or Inf when it is merged in {self.dtype}; needs finite weights in the base "
                    "and, for values beyond the range of the dtype, dtype='fp32' (--dtype fp32)"
                )
            return merged

        return Stored(self.base.shape, self.dtype, load)

    def measure(self, merged, change, is_class_transposed, fill=False):
        """Set ``norms`` to those of a merged tensor; with ``fill`` compute its values first."""
        experts = rows = slice(None)
        if self.expert is not None:
            experts = slice(self.expert, self.expert + 1)
            rows = slice(self.first_row, self.first_row + self.base.shape[0])
        if isinstance(change, _Update):
            a, b = (stack[experts] for stack in _matrices_of(change.pair))
            b = b[:, rows]
        else:
            values = _matrices(tensor_files.recent(change), is_class_transposed)[experts, rows]
        before, after = (_matrices(tensor, self.is_transposed) for tensor in (self.base.load(), merged))
        step = max(1, _CHUNK // before.shape[2])
        lost = size = 0.0
        for expert in range(before.shape[0]):
            for start in range(0, before.shape[1], step):
                place = expert, slice(start, start + step)
                weight = before[place].to(torch.float64, copy=True)
                if isinstance(change, _Update):
                    update = torch.mm(b[place].double(), a[expert].double()).mul_(change.scaling)
                    exact = weight.add_(update)
                else:
                    exact = values[place].to(torch.float64, copy=True)
                    update = weight.neg_().add_(exact)
                if fill:
                    after[place] = exact
                size += _squares(update)
                lost += _squares(exact.sub_(after[place]))
        self.norms = lost, size


def _squares(tensor):
    return torch.linalg.vector_norm(tensor).item() ** 2


def _untie(tensors, changes, model, names):
    """Add to ``tensors`` those that files leave out as tied, if one of all tied weights changes; returns whether.

    All are added, because the config has a single switch for them.
    """
    tied = model.all_tied_weights_keys
    if not changes.keys() & {*tied, *tied.values()}:
        return False
    held = {names.located(name): name for name in tensors}
    for pair in tied.items():
        for missing, other in (pair, pair[::-1]):
            if missing not in held and other in held:
                name = missing if held[other] == other else names.weight_in_files(missing)
                tensors[name] = tensors[held[other]]
    return True


def _check_copies(copies, tensors, names, adapter):
    """ValueError if weights of the base that are saved in the adapter differ from those in ``tensors``."""
    held = {names.located(name): tensor for name, tensor in tensors.items()} if copies else {}
    for name, copy in copies.items():
        weight = names.located(bare_name(name))
        chunks = [tensor.load().flatten().split(_CHUNK) for tensor in (copy, held.get(weight, copy))]
        is_same = weight in held and copy.shape == held[weight].shape
        if not is_same or not all(torch.equal(one.float(), other.float()) for one, other in zip(*chunks, strict=True)):
            raise ValueError(
                f"{adapter}: {name} is not the {weight} of the base, as after a change of the vocabulary; needs the "
                "base that the adapter was trained on"
            )


def _plan(tensors, changes, model, names, dtype, layout, base):
    """``({name: Stored} of the result, [(part, change, is_class_transposed)] of all that is merged)``.

    Raises:
        ValueError: the tensors of a changed weight are not in the base, or in a form into which a change cannot be put.
    """
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    transposed = {  # (experts, inputs, outputs)
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and getattr(module, "is_transposed", False)
    }
    problems, by_weight = [], {}
    for name, tensor in tensors.items():
        for part in _parts(name, tensor, names, state, transposed, layout):
            by_weight.setdefault(part.weight, []).append(part)
    for weight in changes:
        if weight not in state:
            problems.append(f"extra: {weight} is not in {type(model).__name__}")
            continue
        parts, rule = by_weight.get(weight, []), names.computing(weight)
        if rule is not None and not is_transposed_by_shape(rule):
            problems.append(f"another form: {weight}, which checkpoints hold otherwise ({operations_of(rule)})")
            continue
        if isinstance(changes[weight], Stored) and changes[weight].shape != state[weight]:
            problems.append(f"wrong shape: {weight} is {changes[weight].shape} in the adapter, needs {state[weight]}")
        for part in parts:
            _fit(part, state[weight], rule, problems)
        size = sum(math.prod(part.base.shape) for part in parts)
        if size != math.prod(state[weight]):
            problems.append(f"missing: {weight} has {size} of {math.prod(state[weight])} values in the base's files")
    if problems:
        raise ValueError(listed(problems, f"base: {base} cannot take this adapter"))

    written, merged = {}, []
    for weight, parts in by_weight.items():  # tensors of one weight follow each other, so that its factors load once
        for part in parts:
            if weight in changes:
                part.dtype = DTYPES[dtype] if dtype else part.base.dtype
                merged.append((part, changes[weight], weight in transposed))
                written[part.name] = part.stored(*merged[-1][1:])
            else:
                written[part.name] = _without_nan(part.name, part.base)
    return written, merged


def _parts(name, tensor, names, state, transposed, layout):
    """The :class:`_Part` for each tensor that is written for the base's tensor ``name``."""
    place = names.located(name)
    if isinstance(place, ExpertProjection):
        return [_Part(name, tensor, place.parameter, place.expert, _first_row(place, tensor.shape[0], names))]
    is_transposed = place in transposed
    if layout == "base" or name != place or place not in state:
        return [_Part(name, tensor, place, is_transposed=is_transposed)]
    projections = names.projections(place)
    if not projections:
        return [_Part(names.weight_in_files(place), tensor, place, is_transposed=is_transposed)]
    experts, outputs, inputs = tensor.shape if len(tensor.shape) == 3 else (1, *tensor.shape)
    rows, parts = outputs // len(projections), []
    for expert in range(experts):
        for projection in projections:
            one = ExpertProjection(place, projection, expert)
            first = _first_row(one, rows, names)
            load = functools.partial(_slice, tensor, expert, slice(first, first + rows))
            matrix = Stored((rows, inputs), tensor.dtype, load)
            parts.append(_Part(names.projection_in_files(one), matrix, place, expert, first))
    return parts


def _slice(stack, expert, rows):
    return _matrices(tensor_files.recent(stack), False)[expert, rows]


def _first_row(place, rows, names):
    """Where a projection of so many rows begins in its expert's matrix."""
    return rows * names.projections(place.parameter).index(place.projection)


def _fit(part, shape, rule, problems):
    """Set whether a tensor is transposed beside its class; add to ``problems`` if it has none of the shapes."""
    if part.expert is not None:
        if part.base.shape[-1] != shape[-1] or part.first_row + part.base.shape[0] > shape[-2]:
            problems.append(f"wrong shape: {part.name} is {part.base.shape}, needs rows of {shape[-2:]}")
        return
    if part.base.shape == shape:
        return
    if rule is not None and len(shape) == 3 and part.base.shape == (shape[0], shape[2], shape[1]):
        part.is_transposed = not part.is_transposed
        return
    problems.append(f"wrong shape: {part.name} is {part.base.shape}, needs {shape}")


def _without_nan(name, tensor):
    """The same tensor; loading it raises a ValueError if it holds NaN. Inf may be meant: limits of a clamp."""

    def load():
        value = tensor.load()
        if any(bool(chunk.isnan().any()) for chunk in tensor_files.computable(value).flatten().split(_CHUNK)):
            raise ValueError(f"base: {name} has NaN, needs a base without")
        return value

    return Stored(tensor.shape, tensor.dtype, load)


def _config(config, dtype, untied):
    """The text of the result's config.json; ``dtype`` is a key of DTYPES, or None for that of the base."""

    def changed(values):
        values = {name: changed(value) if isinstance(value, dict) else value for name, value in values.items()}
        if dtype:
            name = str(DTYPES[dtype]).removeprefix("torch.")
            values |= {key: name for key in ("dtype", "torch_dtype") if values.get(key)}
        return values | ({"tie_word_embeddings": False} if untied and "tie_word_embeddings" in values else {})

    result = changed(without_settings(config))
    if untied:
        result["tie_word_embeddings"] = False
    if dtype and not result.get("dtype") and not result.get("torch_dtype"):
        result["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    return json.dumps(result, indent=2)


def _write_report(out, merged, progress):
    """Write ``merge_report.json``, unless it is there. Tensors that an earlier call wrote are measured again."""
    from tqdm.auto import tqdm

    if (out / REPORT).is_file():
        return
    unknown = [entry for entry in merged if entry[0].norms is None]
    stored = tensor_files.read(*tensor_files.weight_files(out)) if unknown else {}
    for part, *change in tqdm(unknown, desc="measuring rounding", disable=not (progress and unknown)):
        part.measure(stored[part.name].load(), *change)
    lost = {part.name: _share(*part.norms) for part, *_ in merged}
    worst = max(lost, key=lost.get)
    total = _share(*(math.fsum(norms) for norms in zip(*(part.norms for part, *_ in merged), strict=True)))
    report = {"lost": total, "worst": lost[worst], "worst_tensor": worst, "lost_by_tensor": lost}
    ownership.write_text(out / REPORT, json.dumps(report, indent=1), "out")


def _share(lost, size):
    return (lost / size) ** 0.5 if size else 0.0
