"""Rewrites a checkpoint with one tensor per expert so that any ``from_pretrained`` can use its files without a copy.

transformers alone reads such checkpoints of the hub (``experts.3.gate_proj.weight``) by stacking experts, so that every
load holds a copy of the whole model in memory. A checkpoint with fused experts is mapped into memory instead: loading
it takes no memory of its own, and processes on one machine share the mapped files. With ktlib's experts the hub's files
are mapped as they are (integrations/mapped_experts.py); fused ones can also be trained and streamed without a copy.

On the way, the experts can be quantised (quantise_checkpoint.py).
"""

import json
import warnings
from pathlib import Path

import torch

from ktlib.conversion import quantise_checkpoint
from ktlib.conversion.quantised_sources import decoded_tensors, without_settings
from ktlib.files import ownership, tensor_files
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.model_classes import meta_model, untied_state
from ktlib.integrations.stored_formats import settings_of
from ktlib.names import first_of

NOTE = "fused_from.json"
REPORT = quantise_checkpoint.REPORT
LEFT_OUT = (NOTE, REPORT, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", f"{ownership.LIST_PREFIX}*")
SAMPLE = 256  # values in each quarter of a tensor that are compared between sources: megabytes of a large checkpoint


def fuse_checkpoint(source, out, progress=True, quantise=None):
    """Write the checkpoint folder ``source`` with fused experts to the folder ``out``; returns ``out``.

    Values are copied bit for bit, in their dtype. At most one fused weight of one layer is in memory at a time. All
    other files in the folder (config, tokenizer, ...) are copied. A checkpoint that is fused already is copied, too,
    into files whose tensors are aligned to pages. NaN and Inf are copied with a warning that names the tensors.

    Each file appears whole or not at all. No file in ``out`` is replaced or removed: after an interruption, call the
    function again, and it writes the missing files. It does so only if the source is the same: the names of its files,
    its config, and the name, dtype, shape and some values of each tensor (:func:`ktlib.files.tensor_files.digest`).
    Training changes these values. An edit of a few values by hand may go unnoticed and needs another ``out``.

    Args:
        quantise: "int8", "int4", "nf4", "mxfp4" or "fp8": the routed experts become codes and scales of
            :mod:`ktlib.conversion.quantise_checkpoint`, each weight the nearest code
            (:func:`ktlib.conversion.nearest_codes.quantise`). "keep": the codes of a source that is quantised already
            are stacked, bit for bit. The codes of one layer and the weight of one expert are in memory at a time.
            Sources may hold experts stacked, and may be quantised: their other weights are decoded to bf16. The
            relative L2 error of each weight is written to ``quantise_report.json`` in ``out``.

    Raises:
        FileNotFoundError: ``source`` is no checkpoint folder, or one of its files is missing.
        ValueError: tensors are missing or have another shape than the config says (they are listed); a file is
            damaged; ``out`` is ``source``, or holds files of another source or another ``quantise``, or a file that
            would be copied there with other contents. Without ``quantise``: weights are quantised, or files of the
            family hold experts stacked already. With ``quantise``: an expert's weight is not finite, ktlib cannot
            compute the experts, or the source's own format is not read.
        OSError: the disk has too little space; nothing is written then.
    """
    from transformers import AutoConfig

    source, out = Path(source), Path(out)
    if quantise is not None and quantise not in quantise_checkpoint.CHOICES:
        choices = ", ".join(map(repr, quantise_checkpoint.CHOICES))
        raise ValueError(f"quantise: got {quantise!r}, needs None or one of {choices}")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"source: {source} has no config.json")
    if out.resolve() == source.resolve():
        raise ValueError(f"out: {out} is the source itself, needs another folder, such as {ownership.free_name(out)}")
    config = AutoConfig.from_pretrained(source)
    if (settings := settings_of(config)) and quantise is None:
        raise ValueError(
            f"source: {source} is quantised, needs weights in bf16, fp16 or fp32; with quantise='keep' (--quantise "
            "keep) its experts are fused as they are"
        )
    if quantise == "keep" and not settings:
        raise ValueError(f"quantise: got 'keep', but {source} is not quantised; needs a format to quantise to")
    files = tensor_files.weight_files(source)
    found = tensor_files.read(*files)
    model = meta_model(config)
    layout = ExpertLayout(model)
    if quantise is None and not layout.per_expert:
        raise ValueError(
            f"source: {source} is of a family ({config.model_type}) whose files hold the experts of a layer stacked "
            "already, needs one with a tensor per expert; load this one as it is"
        )
    named = decoded_tensors(found, settings, model, layout) if settings else found
    tensors, parts = fused_tensors(named, layout)
    if quantise is not None:
        tensors = quantise_checkpoint.in_shapes_of_class(tensors, model, layout)
    _check(tensors, model, source)

    _refuse_other_settings(out, quantise)
    about = {
        "files": [file.name for file in files],  # in the order of the shards
        "tensors": tensor_files.digest(found, most=SAMPLE),
        "config": tensor_files.read_json(source / "config.json"),
    }
    left_out = ownership.named(source, LEFT_OUT)
    own_form = {}
    if quantise is not None:
        codes = quantise_checkpoint.expert_codes(tensors, parts, model, layout, quantise, source)
        written = quantise_checkpoint.settings(codes[0].format, codes[0].group)
        quantise_checkpoint.refuse_other_report(out, codes)
        config_text = json.dumps(without_settings(about["config"]) | {"quantization_config": written}, indent=2)
        about |= {"quantise": quantise, "settings": written}
        own_form = {"texts": {"config.json": config_text}, "index": quantise_checkpoint.INDEX}
        left_out.append(source / "config.json")
    copied = [path for path in sorted(source.iterdir()) if path.is_file() and path not in left_out]
    nonfinite = []
    tensors = {name: _noting_nonfinite(name, tensor, nonfinite) for name, tensor in tensors.items()}
    if quantise is not None:
        for one in codes:
            del tensors[one.name]
            tensors |= one.stored()
    try:
        shards = tensor_files.shards_of(tensors)
        tensor_files.write_sharded(out, shards, about, NOTE, copied, progress, argument="out", **own_form)
    finally:  # also after an interruption, because the next call does not read again what this call has written
        if nonfinite:
            warnings.warn(f"source: {source} has NaN or Inf, copied as it is, in {first_of(nonfinite)}", stacklevel=2)
    if quantise is not None:
        quantise_checkpoint.write_report(out, codes, progress)
    return out


def _refuse_other_settings(out, quantise):
    """ValueError if the folder ``out`` holds a checkpoint that was made with another ``quantise``."""
    before = tensor_files.read_json(out / NOTE)
    if before and before.get("quantise") != quantise:
        raise ValueError(
            f"quantise: got {quantise!r}, but {out} holds a checkpoint made with {before.get('quantise')!r}; needs "
            f"another folder, such as {ownership.free_name(out)}"
        )


def _noting_nonfinite(name, tensor, names):
    """The same tensor; loading it appends its name to ``names`` if it holds NaN or Inf."""

    def load():
        value = tensor.load()
        if not tensor_files.is_finite(value):
            names.append(name)
        return value

    return tensor._replace(load=load)


def fused_tensors(tensors, layout):
    """``({name in transformers 5: Stored}, {fused weight: parts})`` of tensors as files name them.

    A fused weight is stacked from its experts when it is loaded. Its parts are the tensors in the files: for each
    expert a list with one for each projection. Experts of layers that the model does not have, such as those that
    predict several tokens in DeepSeek-V3, keep the names and shapes of the file.

    Raises:
        ValueError: an expert or a projection is missing, or they differ in shape or dtype.
    """
    result, experts, parts = {}, {}, {}
    for name, tensor in tensors.items():
        place = layout.located(name)
        if not isinstance(place, ExpertProjection):
            result[place] = tensor
        elif place.parameter in layout.names:
            experts.setdefault(place.parameter, {})[place.projection, place.expert] = tensor
        else:
            result[name] = tensor
    for parameter, found in experts.items():
        projections = layout.projections(parameter)
        count = 1 + max(expert for _, expert in found)
        needed = [(projection, expert) for projection in projections for expert in range(count)]
        if missing := [f"{projection} of expert {e}" for projection, e in needed if (projection, e) not in found]:
            raise ValueError(f"{parameter}: missing {len(missing)}: {', '.join(missing[:8])}")
        kinds = {(tensor.shape, tensor.dtype) for tensor in found.values()}
        if len(kinds) > 1:
            raise ValueError(f"{parameter}: its experts differ in shape or dtype: {sorted(map(str, kinds))}")
        ((rows, columns), dtype) = kinds.pop()
        ordered = [[found[projection, expert] for projection in projections] for expert in range(count)]
        shape = (count, len(projections) * rows, columns)[0 if parameter in layout.experts else 1 :]

        def load(ordered=ordered, matrix=(rows, columns), dtype=dtype, shape=shape):
            fused = torch.empty((len(ordered), len(ordered[0]), *matrix), dtype=dtype)
            for expert, of_expert in zip(fused, ordered, strict=True):
                for projection, tensor in zip(expert, of_expert, strict=True):
                    projection.copy_(tensor.load())
            return fused.view(shape)

        result[parameter] = tensor_files.Stored(shape, dtype, load)
        if parameter in layout.experts:
            parts[parameter] = ordered
    return result, parts


def _check(tensors, model, source):
    """ValueError that lists the tensors of the model that are missing or have another shape."""
    wanted = {name: tuple(value.shape) for name, value in untied_state(model).items()}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [
        f"{name} is {tensors[name].shape}, needs {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError(f"source: {source} does not fit its config: {first_of(problems, 8, '; ')}")
