"""Safetensors files larger than memory: tensors are loaded when they are needed, and written one at a time.

:func:`read` and :func:`write` work on tables ``{name: Stored}``, whose tensors are not in memory.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ktlib.files import ownership
from ktlib.files.ownership import WEIGHT_FILES, new_file, write_text
from ktlib.names import component

PAGE = 4096
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
# names without suffixes of the files of a model, of the index of a model that only ktlib loads, and of an adapter
MODEL_STEMS, OWN_STEMS, ADAPTER_STEMS = ("model",), ("ktlib",), ("adapter_model", "fused_expert_lora")
PICKLED = "pickled weights can run code when read; load it where you trust it and save it as safetensors"


class Stored(NamedTuple):
    """A tensor that is not in memory: shape, dtype, and ``load()``, which reads or computes it."""

    shape: tuple
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@functools.lru_cache(maxsize=2)
def recent(tensor):
    """``tensor.load()``, cached, so that writing the slices of a stack loads the stack once.

    The cache holds two tensors, and :func:`write` empties it at the end of a file.
    """
    return tensor.load()


def read(*files):
    """``{name: Stored}`` of all tensors in safetensors files.

    A file is mapped into memory when its first tensor is loaded, and stays mapped while one of its tensors is in use.

    Raises:
        ValueError: a file is damaged, no safetensors file or too large to be mapped; it holds a tensor with a dtype not
            in ``DTYPES``, or one with the name of a tensor in another file.
        FileNotFoundError: a file does not exist.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in files:
        opened = functools.cache(lambda file=file: safe_open(file, framework="pt"))
        try:
            with safe_open(file, framework="pt") as header:
                views = {name: header.get_slice(name) for name in sorted(header.keys())}
                kinds = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from error
        except MemoryError as error:
            raise ValueError(f"{file}: too large for this process ({error})") from None
        for name, (shape, kind) in kinds.items():
            if name in tensors:
                raise ValueError(f"{file}: tensor {name} is in another file as well")
            if kind not in DTYPES:
                raise ValueError(f"{file}: tensor {name} is {kind}, needs one of {', '.join(DTYPES)}")
            tensors[name] = Stored(shape, DTYPES[kind], lambda name=name, opened=opened: opened().get_tensor(name))
    return tensors


def computable(values):
    """``values``, as fp32 if torch has no reductions for their dtype (8-bit numbers, bools and unsigned integers)."""
    return values.float() if values.dtype.itemsize == 1 or values.dtype in _UNSIGNED else values


def is_finite(tensor):
    """Whether a tensor holds neither NaN nor Inf. The check works in chunks, so it needs only a few megabytes."""
    return all(bool(computable(chunk).isfinite().all()) for chunk in tensor.flatten().split(2**20))


def weight_files(folder, kinds=(MODEL_STEMS, OWN_STEMS)):
    """The safetensors files that ``from_pretrained`` loads from a saved model or adapter, else all in the folder.

    ``kinds`` are groups of names without suffixes; the first group that has files is taken.

    Raises:
        FileNotFoundError: the folder has no safetensors file, or lacks one that the index names.
        ValueError: the index is damaged, or names a file of another folder; or all weights are pickled.
    """
    folder = Path(folder)
    for stems in kinds:
        if files := [file for stem in stems for file in _single_or_indexed_files(folder, stem)]:
            return files
    if files := sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        return files
    if pickles := sorted(folder.glob("*.bin")):
        raise ValueError(f"{pickles[0]}: {PICKLED}")
    raise FileNotFoundError(f"{folder} has no *.safetensors file{holder_of(folder, '*.safetensors')}")


def holder_of(folder, pattern):
    """The end of an error text: which folder in ``folder`` has such a file, as ``adapter`` in that of a run; or ""."""
    found = sorted(Path(folder).glob(f"*/{pattern}"))
    return f"; {found[0].parent} has" if found else ""


def _single_or_indexed_files(folder, stem):
    """``[stem.safetensors]``, else the files that its index names, else ``[]``: in the order of ``from_pretrained``."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map of tensor names and files")
    names = sorted(set(map(str, weight_map.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: names {outside[0]!r:.80}, which is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / name for name in names]


def digest(tensors, most=None):
    """SHA-256 of the names, types, shapes and bits of ``{name: Stored}``.

    With ``most``, only that many values at the start of each quarter of a tensor are hashed, so that little of a mapped
    file is read. Such a digest differs between training states, but can miss a change of a few single values.
    """
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for quarter in tensor.load().flatten().tensor_split(4):
            result.update(quarter[:most].view(torch.uint8).numpy())
    return result.hexdigest()


def write(path, tensors):
    """Write ``{name: Stored}`` as the new safetensors file ``path``; at most one tensor is in memory.

    The data begins at a page boundary, with the largest tensor. The file appears complete under its name or not at all.

    Raises:
        ValueError: a tensor's ``load()`` returned another shape or dtype than announced, or ``path`` exists.
    """
    path = Path(path)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
    for name, tensor in ordered:
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    try:
        with new_file(path) as partial, open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in ordered:
                value = tensor.load()
                if value.dtype != tensor.dtype or tuple(value.shape) != tuple(tensor.shape):
                    got = f"{tuple(value.shape)} {value.dtype}"
                    raise ValueError(f"{name}: announced {tuple(tensor.shape)} {tensor.dtype}, came {got}")
                file.write(value.contiguous().view(-1).view(torch.uint8).numpy())
                del value
    finally:
        recent.cache_clear()


def write_sharded(
    folder,
    shards,
    about,
    note,
    others=(),
    progress=True,
    argument="folder",
    texts=None,
    index="model.safetensors.index.json",
):
    """Write a checkpoint of several files, or the missing ones after an interrupted call; returns the folder.

    Args:
        folder: where to write ``model-00001-of-N.safetensors`` ..., and at the end the index.
        shards: one ``{name: Stored}`` for each file. Existing files are not written again.
        about: a dict that identifies these weights, stored as JSON in the file ``note``.
        others: paths of files to copy to ``folder``.
        argument: what the caller calls ``folder``, for error messages.
        texts: ``{name: text}`` of further files to write to ``folder``.
        index: name of the index; ``from_pretrained`` looks for the default.

    Raises:
        ValueError: ``folder`` holds another model or adapter, shards of other weights than ``about`` or divided in
            another way, or a file with the name but not the contents of one of ``others`` or ``texts``; or ``note`` is
            damaged.
        OSError: the disk has too little free space; raised before anything is written.
    """
    from tqdm.auto import tqdm

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json(folder / note)
    files = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    index = folder / index
    index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    texts = texts or {}
    existing = ownership.named(folder, WEIGHT_FILES)
    unexpected = [path.name for path in existing if path not in (*files, index)]
    if before != about and (before or existing):
        raise ValueError(
            f"{argument}: {folder} holds a checkpoint that was made from something else ({note} differs), needs "
            f"another folder, such as {ownership.free_name(folder)}"
        )
    if unexpected:
        raise ValueError(f"{argument}: {folder} holds this checkpoint in other files: {', '.join(unexpected[:8])}")
    differ = [folder / path.name for path in others if not ownership.same_bytes(path, folder / path.name)]
    for file, text in ((index, index_text), *((folder / name, text) for name, text in texts.items())):
        if not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != text:
            differ.append(file)
    differ += [file for file in files if os.path.lexists(file) and not file.is_file()]
    ownership.refuse_foreign(differ, argument, folder, replace=False)
    done = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    space = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if space < size - done:
        raise OSError(
            f"{argument}: {folder} has {space / 1e9:.1f} GB free, the checkpoint needs {(size - done) / 1e9:.1f}"
        )
    if not before:
        write_text(folder / note, json.dumps(about), argument)
    for file, shard in zip(tqdm(files, desc="writing shards", disable=not progress), shards, strict=True):
        if not file.is_file():
            write(file, shard)
    with ownership.temporary_folder(folder) as made:
        for path in others:
            shutil.copyfile(path, made / path.name)
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        ownership.publish(made, folder, argument)
    write_text(index, index_text, argument)
    return folder


def read_json(file):
    """The JSON object in a file, ``{}`` if the file does not exist; ValueError if the file holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: needs an object, holds a {type(content).__name__}")
    return content


def shards_of(tensors):
    """Divide ``{name: Stored}`` for :func:`write_sharded`.

    A shard holds the routed experts of one layer, the other tensors of one layer, or the tensors of no layer. A file
    stays mapped while one of its tensors is in use. So experts that stay on the CPU have files of their own, and the
    files of tensors that moved to a GPU are unmapped.
    """
    shards = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        layer = next((tuple(words[: i + 1]) for i, word in enumerate(words) if word.isdigit()), None)
        shards.setdefault((layer, component(name) == "routed_experts"), {})[name] = tensor
    return list(shards.values())
