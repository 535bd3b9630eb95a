"""Checkpoints with one tensor per expert, written once as ``from_pretrained`` can use them without a copy.

transformers reads the hub's layout of such models (``experts.3.gate_proj.weight``) by stacking, which needs the whole
model once in memory beside the files, at every load. Files with fused experts are mapped into memory instead: a load
takes no memory of its own, and processes on one machine share it.
"""

import warnings
from pathlib import Path

import torch

from ktlib.files import ownership, tensor_files
from ktlib.integrations.expert_names import ExpertLayout, ExpertProjection
from ktlib.integrations.model_class import meta_model, untied_state
from ktlib.names import first_of

NOTE = "fused_from.json"
LEFT_OUT = (NOTE, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", f"{ownership.LIST}*")
SAMPLE = 256  # values in each quarter of a tensor that tell a source from another: a few megabytes of a large one


def fuse_checkpoint(source, out, progress=True):
    """Write the checkpoint folder ``source`` with fused experts to the folder ``out``; returns ``out``.

    Values are copied bit for bit, in their dtype. At most the experts' weight of one layer is in memory. Each file
    appears whole or not at all, and files that are there already are kept: call it again after an interruption.
    Everything else in the folder (config, tokenizer, ...) is copied, and no file that ``out`` holds is replaced or
    removed. A checkpoint that is fused already is copied too, into files whose tensors are aligned to pages.

    Files are kept only if they came from the same source: the names of its files, its config, and of each of its
    tensors name, dtype, shape and some values (``stored.digest``). Training changes these; an edit of a few values by
    hand may not: give that another ``out``.

    NaN and Inf are copied too, with a warning that names the tensors.

    Raises:
        FileNotFoundError: no checkpoint there, or a file of it is missing.
        ValueError: quantised weights; a family whose layout transformers does not know; tensors missing or of another
            shape than the config says (they are listed); a damaged file; ``out`` is ``source``, or holds something else
            or one of the files to be copied with other contents.
        OSError: too little space on the disk, said before anything is written.
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
    layout.require_per_expert()
    tensors = fused_tensors(found, layout)
    _check(tensors, model, source)

    about = {
        "files": [file.name for file in files],  # their order is that of the shards
        "tensors": tensor_files.digest(found, most=SAMPLE),
        "config": tensor_files.read_json(source / "config.json"),
    }
    left_out = ownership.named(source, LEFT_OUT)
    copied = [path for path in sorted(source.iterdir()) if path.is_file() and path not in left_out]
    nonfinite = []
    tensors = {name: _noting_nonfinite(name, tensor, nonfinite) for name, tensor in tensors.items()}
    try:
        return tensor_files.write_sharded(out, tensor_files.shards_of(tensors), about, NOTE, copied, progress)
    finally:  # what an interrupted call has written, the next one does not read again
        if nonfinite:
            warnings.warn(f"source: {source} has NaN or Inf, copied as it is, in {first_of(nonfinite)}", stacklevel=2)


def _noting_nonfinite(name, tensor, names):
    """The same tensor; when it is loaded and holds NaN or Inf, its name goes to the list ``names``."""

    def load():
        value = tensor.load()
        if not tensor_files.is_finite(value):
            names.append(name)
        return value

    return tensor._replace(load=load)


def fused_tensors(tensors, layout):
    """``{name in transformers 5: Stored}``; a fused weight is stacked from its experts when it is loaded.

    Raises:
        ValueError: an expert or a projection is missing, or they differ in shape or dtype.
    """
    result, experts = {}, {}
    for name, tensor in tensors.items():
        if isinstance(place := layout.located(name), ExpertProjection):
            experts.setdefault(place.parameter, {})[place.projection, place.expert] = tensor
        else:
            result[place] = tensor
    for parameter, found in experts.items():
        parts = layout.projections(parameter)
        count = 1 + max(expert for _, expert in found)
        if missing := [f"{part} of expert {e}" for part in parts for e in range(count) if (part, e) not in found]:
            raise ValueError(f"{parameter}: missing {len(missing)}: {', '.join(missing[:8])}")
        kinds = {(found[one].shape, found[one].dtype) for one in found}
        if len(kinds) > 1:
            raise ValueError(f"{parameter}: its experts differ in shape or dtype: {sorted(map(str, kinds))}")
        ((rows, columns), dtype) = kinds.pop()

        shape = (count, len(parts) * rows, columns)[0 if parameter in layout.experts else 1 :]

        def load(found=found, parts=parts, count=count, rows=rows, columns=columns, dtype=dtype, shape=shape):
            fused = torch.empty(count, len(parts), rows, columns, dtype=dtype)
            for (part, expert), tensor in found.items():
                fused[expert, parts.index(part)] = tensor.load()
            return fused.view(shape)

        result[parameter] = tensor_files.Stored(shape, dtype, load)
    return result


def _check(tensors, model, source):
    """ValueError with the list if the tensors are not those of the model."""
    wanted = {name: tuple(value.shape) for name, value in untied_state(model).items()}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [
        f"{name} is {tensors[name].shape}, needs {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError(f"source: {source} does not fit its config: {first_of(problems, 8, '; ')}")
