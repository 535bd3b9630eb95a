"""Rewrites a checkpoint with one tensor per expert so that any ``from_pretrained`` can use its files without a copy.

transformers alone reads such checkpoints of the hub (``experts.3.gate_proj.weight``) by stacking experts, so that every
load holds a copy of the whole model in memory. A checkpoint with fused experts is mapped into memory instead: loading
it takes no memory of its own, and processes on one machine share the mapped files. With ktlib's experts the hub's files
are mapped as they are (integrations/mapped_experts.py); fused ones can also be trained and streamed without a copy.
"""

import warnings
from pathlib import Path

import torch

from ktlib.files import ownership, tensor_files
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.model_classes import meta_model, untied_state
from ktlib.names import first_of

NOTE = "fused_from.json"
LEFT_OUT = (NOTE, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", f"{ownership.LIST_PREFIX}*")
SAMPLE = 256  # values in each quarter of a tensor that are compared between sources: megabytes of a large checkpoint


def fuse_checkpoint(source, out, progress=True):
    """Write the checkpoint folder ``source`` with fused experts to the folder ``out``; returns ``out``.

    Values are copied bit for bit, in their dtype. At most one fused weight of one layer is in memory at a time. All
    other files in the folder (config, tokenizer, ...) are copied. A checkpoint that is fused already is copied, too,
    into files whose tensors are aligned to pages. NaN and Inf are copied with a warning that names the tensors.

    Each file appears whole or not at all. No file in ``out`` is replaced or removed: after an interruption, call the
    function again, and it writes the missing files. It does so only if the source is the same: the names of its files,
    its config, and the name, dtype, shape and some values of each tensor (:func:`ktlib.files.tensor_files.digest`).
    Training changes these values. An edit of a few values by hand may go unnoticed and needs another ``out``.

    Raises:
        FileNotFoundError: ``source`` is no checkpoint folder, or one of its files is missing.
        ValueError: weights are quantised; files of the family hold experts stacked already; tensors are missing or
            have another shape than the config says (they are listed); a file is damaged; ``out`` is ``source``, or
            holds files of another source, or a file that would be copied there with other contents.
        OSError: the disk has too little space; nothing is written then.
    """
    from transformers import AutoConfig

    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"source: {source} has no config.json")
    if out.resolve() == source.resolve():
        raise ValueError(f"out: {out} is the source itself, needs another folder, such as {ownership.free_name(out)}")
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"source: {source} is quantised, needs weights in bf16, fp16 or fp32")
    files = tensor_files.weight_files(source)
    found = tensor_files.read(*files)
    model = meta_model(config)
    layout = ExpertLayout(model)
    if not layout.per_expert:
        raise ValueError(
            f"source: {source} is of a family ({config.model_type}) whose files hold the experts of a layer stacked "
            "already, needs one with a tensor per expert; load this one as it is"
        )
    tensors, _ = fused_tensors(found, layout)
    _check(tensors, model, source)

    about = {
        "files": [file.name for file in files],  # in the order of the shards
        "tensors": tensor_files.digest(found, most=SAMPLE),
        "config": tensor_files.read_json(source / "config.json"),
    }
    left_out = ownership.named(source, LEFT_OUT)
    copied = [path for path in sorted(source.iterdir()) if path.is_file() and path not in left_out]
    nonfinite = []
    tensors = {name: _noting_nonfinite(name, tensor, nonfinite) for name, tensor in tensors.items()}
    try:
        shards = tensor_files.shards_of(tensors)
        return tensor_files.write_sharded(out, shards, about, NOTE, copied, progress, argument="out")
    finally:  # also after an interruption, because the next call does not read again what this call has written
        if nonfinite:
            warnings.warn(f"source: {source} has NaN or Inf, copied as it is, in {first_of(nonfinite)}", stacklevel=2)


def _noting_nonfinite(name, tensor, names):
    """The same tensor; loading it appends its name to ``names`` if it holds NaN or Inf."""

    def load():
        value = tensor.load()
        if not tensor_files.is_finite(value):
            names.append(name)
        return value

    return tensor._replace(load=load)


def fused_tensors(tensors, layout):
    """``({name in transformers 5: Stored}, {fused weight: load_expert})`` of tensors as files name them.

    A fused weight is stacked from its experts when it is loaded; ``load_expert(e)`` loads the matrix of one of them,
    without the others. Experts of layers that the model does not have, such as those that predict several tokens in
    DeepSeek-V3, keep the names and shapes of the file.

    Raises:
        ValueError: an expert or a projection is missing, or they differ in shape or dtype.
    """
    result, experts, loaders = {}, {}, {}
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
        shape = (count, len(projections) * rows, columns)[0 if parameter in layout.experts else 1 :]

        def load_expert(expert, found=found, projections=projections):
            return torch.cat([found[projection, expert].load() for projection in projections])

        def load(count=count, dtype=dtype, shape=shape, load_expert=load_expert):
            fused = torch.empty((count, *shape[-2:]), dtype=dtype)
            for expert in range(count):
                fused[expert] = load_expert(expert)
            return fused.view(shape)

        result[parameter] = tensor_files.Stored(shape, dtype, load)
        if parameter in layout.experts:
            loaders[parameter] = load_expert
    return result, loaders


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
