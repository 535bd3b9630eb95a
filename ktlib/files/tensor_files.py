"""Safetensors files as tables of tensors that are read when asked for, and written one tensor at a time.

What is larger than memory passes through here: checkpoints of tens of gigabytes, and the adapters made for them.
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
MODEL, ADAPTER = ("model",), ("adapter_model", "fused_expert_lora")  # how the names of their files begin
PICKLED = "pickled weights can run code when read; load it where you trust it and save it as safetensors"


class Stored(NamedTuple):
    """A tensor that is not in memory: its shape, its dtype, and the function that makes or reads it."""

    shape: tuple
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@functools.lru_cache(maxsize=2)
def recent(tensor):
    """``tensor.load()``, kept until two others were asked for or a file is complete: for slices of one stack."""
    return tensor.load()


def read(*files):
    """``{name: Stored}`` of safetensors files. A file is mapped when the first of its tensors is loaded, and as long as
    one of them is referred to.

    Raises:
        ValueError: a file is damaged, no safetensors file or too large to be mapped, or holds a tensor that another one
            holds too or that is of a dtype not in ``DTYPES``.
        FileNotFoundError: a file is not there.
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
    """The values in a dtype that torch has reductions for, which 8-bit floats, bools and unsigned integers are not."""
    return values.float() if values.dtype.itemsize == 1 or values.dtype in _UNSIGNED else values


def is_finite(tensor):
    """Whether a tensor holds neither NaN nor Inf. It takes a few megabytes of memory, however large the tensor."""
    return all(bool(computable(chunk).isfinite().all()) for chunk in tensor.flatten().split(2**20))


def weight_files(folder, kinds=(MODEL,)):
    """The safetensors files of a saved model or adapter: those that ``from_pretrained`` takes, or all in the folder.

    If there are files of several of the ``kinds``, those of the first count.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: the index is damaged, or names a file of another folder; all weights are pickled.
    """
    folder = Path(folder)
    for names in kinds:
        if files := [file for name in names for file in _one_or_indexed(folder, name)]:
            return files
    if files := sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        return files
    if pickles := sorted(folder.glob("*.bin")):
        raise ValueError(f"{pickles[0]}: {PICKLED}")
    raise FileNotFoundError(f"{folder} has no *.safetensors file")


def _one_or_indexed(folder, name):
    """``name.safetensors``, for which ``from_pretrained`` looks first, or the files that its index names, or none."""
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map of tensor names and files")
    names = sorted(set(map(str, weight_map.values())))
    if strange := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: names {strange[0]!r:.80}, which is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / name for name in names]


def digest(tensors, most=None):
    """SHA-256 of the names, types, shapes and bits of ``{name: Stored}``.

    With ``most``, only so many values at the start of each quarter of a tensor count: of a mapped file little is read.
    That tells one training state from another, but not two that differ in a few single values.
    """
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for quarter in tensor.load().flatten().tensor_split(4):
            total.update(quarter[:most].view(torch.uint8).numpy())
    return total.hexdigest()


def write(path, tensors):
    """Write ``{name: Stored}`` as the new safetensors file ``path``, largest tensor first, its data aligned to pages.

    At most one tensor is in memory. The file appears whole under its name or not at all.

    Raises:
        ValueError: a loaded tensor has not the shape and dtype announced, or there is another file ``path``.
    """
    path = Path(path)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
    for name, tensor in ordered:
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
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


def write_sharded(folder, shards, about, note, others=(), progress=True, argument="folder"):
    """Write a checkpoint of several files, going on where an earlier call was interrupted; returns the folder.

    Args:
        folder: gets ``model-00001-of-N.safetensors`` ..., and at the end ``model.safetensors.index.json``.
        shards: one ``{name: Stored}`` for each file. Files that are there already are kept.
        about: a dict that says what these weights are, stored as JSON in the file ``note``.
        others: paths of files, of which ``folder`` gets copies.
        argument: what the caller calls ``folder``, for error messages.

    Raises:
        ValueError: ``folder`` holds shards of something else than ``about``, or divided in another way, or any other
            model or adapter, or one of the other files with other contents, or ``note`` is damaged.
        OSError: too little space on the disk, said before anything is written.
    """
    from tqdm.auto import tqdm

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json(folder / note)
    files = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    index = folder / "model.safetensors.index.json"
    index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    present = ownership.named(folder, WEIGHT_FILES)
    strange = [path.name for path in present if path not in (*files, index)]
    if before != about and (before or present):
        raise ValueError(
            f"{argument}: {folder} holds a checkpoint that was made from something else ({note} differs), needs "
            f"another folder, such as {ownership.free_name(folder)}"
        )
    if strange:
        raise ValueError(f"{argument}: {folder} holds this checkpoint in other files: {', '.join(strange[:8])}")
    differ = [folder / path.name for path in others if not ownership.same_bytes(path, folder / path.name)]
    if index.is_file() and index.read_text(encoding="utf-8", errors="replace") != index_text:
        differ.append(index)
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
        ownership.publish(made, folder, argument)
    write_text(index, index_text, argument)
    return folder


def read_json(file):
    """The object in a file, ``{}`` if there is no such file; ValueError that names it if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: needs an object, holds a {type(content).__name__}")
    return content


def shards_of(tensors):
    """Shards for :func:`write_sharded`: a layer's routed experts, its other tensors, and those of no layer.

    A mapped file stays in a process's memory as long as one of its tensors is in use. So experts that stay on the host
    have files to themselves, and what went to a GPU leaves nothing behind.
    """
    shards = {}
    for name, tensor in tensors.items():
        components = name.split(".")
        layer = next((tuple(components[: i + 1]) for i, word in enumerate(components) if word.isdigit()), None)
        shards.setdefault((layer, component(name) == "routed_experts"), {})[name] = tensor
    return list(shards.values())
