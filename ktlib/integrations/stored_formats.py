"""Which tensors of a quantised checkpoint form which weight matrix, in the layouts in which checkpoints are published.

=====================  ==============================================================================================
quant_method           tensors of a matrix, whose rows are outputs (defined by the model cards of DeepSeek-V3 and
                       gpt-oss, and by compressed-tensors, GPTQModel and AutoAWQ)
=====================  ==============================================================================================
fp8, mxfp8             ``weight`` F8_E4M3 and its scales, one for each block, row, run of columns, or for all:
                       ``weight_scale_inv``, ``weight_scale``, ``scale`` or ``qscale_weight``. The weight is code *
                       scale under all these names. DeepSeek-V4's FP4 experts: ``weight`` I8 with two codes a byte
compressed-tensors     ``weight`` (F8_E4M3 or I8) and ``weight_scale``; or ``weight_packed``: I32 with eight codes of 4
                       bits or four of 8, offset binary, or U8 with two of MXFP4; ``weight_zero_point``
mxfp4                  ``*_blocks`` U8 and ``*_scales``, all experts stacked
gptq, awq              ``qweight``, ``qzeros``, ``scales``, ``g_idx``, with outputs as columns: copied into rows
ktlib                  ``*.codes``, ``*.scales``, ``*.zeros``, all experts stacked, as `ktlib fuse --quantise` writes
=====================  ==============================================================================================

:func:`logical_tensors` looks at names, dtypes and shapes alone, so it serves programs that do not load the tensors.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from ktlib.files.tensor_files import DTYPE_NAMES, read_json
from ktlib.operator.weight import Weight
from ktlib.reference.formats import CODEBOOKS, pack4

OWN_METHOD = "ktlib"
_BLOCK = (128, 128)  # of FP8 checkpoints whose config does not say it
_SCALES = ("{0}_scale_inv", "{0}_scale", "{1}.scale", "{1}.qscale_weight")  # of the weight {0} in the module {1}
# about activations, which are not quantised here
_IGNORED = ("input_scale", "activation_scale", "input_zero_point", "qscale_act", "input_global_scale", "weight_shape")
_BYTES = {"F64": 8, "F32": 4, "I32": 4, "I64": 8, "F16": 2, "BF16": 2}  # one byte: all others that occur here
# The place of an int32's bits 4i..4i+3 among eight outputs, as AutoAWQ packs them
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


class Header(NamedTuple):
    """What a file says of a tensor: the dtype as safetensors names it, such as "F8_E4M3", and the shape."""

    dtype: str
    shape: tuple

    @classmethod
    def of(cls, tensor):
        """Of a tensor, of a :class:`ktlib.files.tensor_files.Stored`, or of a slice of safetensors."""
        if hasattr(tensor, "dtype"):
            return cls(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        return cls(tensor.get_dtype(), tuple(tensor.get_shape()))

    @property
    def nbytes(self):
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


class StoredMatrix(NamedTuple):
    """A weight that a checkpoint holds as codes.

    Attributes:
        name: of the weight, as the checkpoint would name it without quantisation.
        shape: of the decoded weight, (rows, columns) or (experts, rows, columns). Rows are outputs.
        format, group: of :class:`ktlib.Weight`.
        tensors: names in the checkpoint of codes, scales and, if there are any, zeros.
        members: all names in the checkpoint that belong to this weight.
        nbytes: of codes, scales and zeros in a Weight. Some files hold zeros in less space.
        prepare: makes the arguments ``codes, scales, zeros`` of Weight from these tensors.
        rows_are_outputs: False where a stack has the layout of the bf16 checkpoint, whose columns may be the outputs.
    """

    name: str
    shape: tuple
    format: str
    group: tuple
    tensors: tuple
    members: tuple
    nbytes: int
    prepare: Callable
    rows_are_outputs: bool = True

    def weight(self, load):
        """The :class:`ktlib.Weight`, with one expert if the checkpoint has a matrix for each; ``load(name)`` loads.

        Raises:
            ValueError: the tensors do not have the form that their names and the config promise.
        """
        try:
            codes, scales, zeros = self.prepare(*map(load, self.tensors))
            shape = self.shape if len(self.shape) == 3 else (1, *self.shape)
            return Weight(self.format, [codes], [scales], zeros and [zeros[0]], group=self.group, shape=shape)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.name}: {error}") from error


def logical_tensors(headers, settings):
    """``{name: StoredMatrix}`` of the weights that a checkpoint holds as codes. Its other tensors are not quantised.

    Args:
        headers: ``{name: Header}`` of all tensors of the checkpoint.
        settings: ``quantization_config`` of its config.json, a dict.

    Raises:
        ValueError: of settings or a tensor, named: what cannot be read, or does not fit together.
    """
    check_served(settings)
    layout = _LAYOUTS[settings["quant_method"]]
    found = (layout(name, headers, settings) for name in headers)
    return {matrix.name: matrix for matrix in found if matrix is not None}


def settings_of(config):
    """The ``quantization_config`` of a model's config, or of the text model's, as a dict; None if it has none."""
    for part in (config, config.get_text_config(decoder=True)):
        if found := getattr(part, "quantization_config", None):
            return found if isinstance(found, dict) else found.to_dict()
    return None


def settings_in_file(file):
    """The same of a ``config.json``, without transformers; None if there is no such file."""
    config = read_json(file)
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def check_served(settings):
    """Raise a ValueError that says what to do if experts of a checkpoint with these settings cannot stay as codes."""
    method = settings.get("quant_method")
    if method not in _LAYOUTS:
        raise ValueError(
            f"quantization_config: quant_method is {method!r}, of which ktlib keeps no experts; needs one of "
            f"{', '.join(map(repr, _LAYOUTS))}. {_WAY_OUT}"
        )
    if method == "compressed-tensors":
        _check_compressed_tensors(settings)
    if method in ("gptq", "awq") and settings.get("bits", settings.get("w_bit", 4)) != 4:
        raise ValueError(f"quantization_config: {method} with {settings.get('bits')} bits, needs 4. {_WAY_OUT}")
    if method == "awq" and settings.get("version", "gemm").lower() != "gemm":
        raise ValueError(f"quantization_config: awq version {settings['version']!r}, needs 'gemm'. {_WAY_OUT}")
    if method == OWN_METHOD and settings.get("version") != 1:
        raise ValueError(
            f"quantization_config: version {settings.get('version')!r} of ktlib's format, this ktlib reads version 1"
        )


def expected_bytes(shape, settings, name, joined=1):
    """Bytes of codes, scales and zeros of a stack of expert weights, as far as a config alone tells them.

    Args:
        shape: (experts, rows, columns), where rows are outputs.
        settings: ``quantization_config`` of the config.
        name: of a module that the checkpoint has for one of these matrices, to find it among those not quantised.
        joined: how many matrices of an expert the rows consist of, which files of most layouts hold apart.

    Raises:
        ValueError: of settings: what cannot be read.
    """
    check_served(settings)
    experts, rows, columns = shape
    if _is_excluded(name, settings):
        return 2 * math.prod(shape)
    format, group, scale_bytes, has_zeros = _format_in_config(settings, name)
    if settings["quant_method"] in ("mxfp4", OWN_METHOD):
        joined = 1
    width = -(-columns // 2) if format in CODEBOOKS else columns
    groups = joined * -(-rows // joined // group[0]) * -(-columns // group[1])
    return experts * (rows * width + groups * (scale_bytes + has_zeros))


def _is_excluded(name, settings):
    """Whether the config excludes a module from quantisation, by its name or by that of a module around it."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    keys = ("ignore", "modules_to_not_convert", "ignored_layers")
    patterns = [entry.removeprefix("re:") for key in keys for entry in settings.get(key) or ()]
    return not should_convert_module(name, patterns)


def _format_in_config(settings, name):
    """``(format, group, bytes of a scale, whether there are zeros)`` of an expert's weight."""
    method, whole = settings["quant_method"], 2**27
    if method == OWN_METHOD:
        format = settings["format"]
        return format, settings["group"], 1 if format == "e2m1" else 2, False
    if method == "mxfp4" or (method == "fp8" and settings.get("expert_dtype") == "fp4"):
        return "e2m1", (1, 32), 1, False
    if method == "mxfp8":
        return "e4m3", (1, 32), 1, False
    if method == "fp8":
        return "e4m3", _groups(settings)[0], 1 if settings.get("scale_fmt") == "ue8m0" else 4, False
    if method in ("gptq", "awq"):
        size = settings.get("group_size", settings.get("q_group_size", 128))
        return "int4", (1, size if size > 0 else whole), 2, _has_zeros(settings)
    groups = [group for group in settings.get("config_groups", {}).values() if group.get("weights")]
    groups = [group for group in groups if any(map(functools.partial(_targets, name), group["targets"]))] or groups
    if not groups:
        raise ValueError("quantization_config: config_groups say of no weights how they are stored")
    weights = groups[0]["weights"]
    bits, is_float, strategy = weights.get("num_bits"), weights.get("type") == "float", weights.get("strategy")
    format = {4: "e2m1" if is_float else "int4", 8: "e4m3" if is_float else "int8"}.get(bits)
    if format is None:
        raise ValueError(f"quantization_config: num_bits is {bits!r}, needs 4 or 8. {_WAY_OUT}")
    group = {"tensor": (whole, whole), "channel": (1, whole), "block": _groups(settings)[0]}.get(strategy)
    group = group or (1, weights.get("group_size") or 32)
    return format, group, 1 if format == "e2m1" else 2, not is_float and not weights.get("symmetric", True)


def _has_zeros(settings):
    """Whether weights of GPTQ or AWQ have zeros other than the middle of the codes."""
    return not settings.get("sym") if settings["quant_method"] == "gptq" else settings.get("zero_point", True)


def _targets(name, target):
    return bool(re.match(target[3:], name)) if target.startswith("re:") else name == target


_WAY_OUT = "Load the bf16 checkpoint, and for less memory write it with `ktlib fuse SOURCE OUT --quantise int4`"


def _check_compressed_tensors(settings):
    if settings.get("transform_config"):
        raise ValueError(f"quantization_config: transform_config rotates activations, which is not done. {_WAY_OUT}")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    formats = {settings.get("format"), *(g.get("format") for g in settings.get("config_groups", {}).values())} - {None}
    known = {
        "dense", "mixed-precision", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
        "mxfp4-pack-quantized", "mxfp8-quantized",
    }  # fmt: skip
    if unknown := sorted(formats - known) or ([sparsity] if sparsity != "dense" else []):
        raise ValueError(f"quantization_config: format {unknown[0]!r} of compressed-tensors is not read. {_WAY_OUT}")


def _found(name, codes, scales, zeros, headers, *, shape, format, group, prepare=None, stem=""):
    """A StoredMatrix of tensors of these names; ``zeros`` may be absent from the checkpoint."""
    tensors = tuple(n for n in (codes, scales, zeros) if n in headers)
    ignored = [f"{stem}.{suffix}" for suffix in _IGNORED]
    members = (*tensors, *(n for n in ignored if n in headers))
    nbytes = _nbytes(headers[codes], headers[scales], len(tensors) > 2)
    return StoredMatrix(name, tuple(shape), format, tuple(group), tensors, members, nbytes, prepare or _as_they_are)


def _nbytes(codes, scales, has_zeros):
    """Bytes in a Weight, whose zeros are int8, as many as scales."""
    return codes.nbytes + scales.nbytes + (math.prod(scales.shape) if has_zeros else 0)


def _as_they_are(codes, scales, zeros=None):
    return codes, scales, None if zeros is None else [zeros]


def _pairs(codes, scales, zeros=None):
    """Bytes of two codes each, from any integers that hold them."""
    return codes.view(torch.uint8), scales, None if zeros is None else [zeros]


def _weight_and_scale(name, headers, settings):
    """``weight`` in F8_E4M3 or I8, or a stack of such with a name of its own."""
    kind = headers[name].dtype
    module = name.removesuffix(".weight")
    scales = [s for s in (form.format(name, module) for form in _SCALES) if s in headers]
    if kind == "F8_E5M2" or (kind == "F8_E4M3" and not scales):
        raise ValueError(f"{name}: is {kind} {'' if scales else 'without a scale '}in the checkpoint. {_WAY_OUT}")
    if kind not in ("F8_E4M3", "I8") or not scales:
        return None
    shape, prepare = headers[name].shape, _as_they_are
    format = "e4m3" if kind == "F8_E4M3" else "int8"
    if kind == "I8" and settings["quant_method"] != "compressed-tensors":  # DeepSeek-V4's FP4 experts
        format, shape, prepare = "e2m1", (*shape[:-1], 2 * shape[-1]), _pairs
    group = _group(name, shape, headers[scales[0]].shape, [(1, 32)] if format == "e2m1" else _groups(settings))
    zeros = f"{name}_zero_point" if format == "int8" else ""
    names = (name, name, scales[0], zeros, headers)
    found = _found(*names, shape=shape, format=format, group=group, prepare=prepare, stem=module)
    return found._replace(rows_are_outputs=len(shape) == 2)


def _compressed(name, headers, settings):
    module, _, suffix = name.rpartition(".")
    if suffix != "weight_packed":
        return _weight_and_scale(name, headers, settings)
    weight = f"{module}.weight"
    if f"{weight}_g_idx" in headers:
        raise ValueError(f"{weight}: its columns are permuted (act-order), which is not read. {_WAY_OUT}")
    if f"{weight}_global_scale" in headers:
        raise ValueError(f"{weight}: is in NVFP4, which is not read. {_WAY_OUT}")
    if f"{weight}_scale" not in headers:
        raise ValueError(f"{weight}_packed: has no {weight}_scale in the checkpoint")
    (rows, width), kind = headers[name].shape, headers[name].dtype
    if kind == "I32":
        bits = _bits(settings, weight)
        format, columns = ("int4", 8 * width) if bits == 4 else ("int8", 4 * width)
        prepare = _packed_4_bits if bits == 4 else _packed_8_bits
    else:
        format, columns, prepare = "e2m1", 2 * width, _pairs
    shape = (rows, columns)
    group = _group(weight, shape, headers[f"{weight}_scale"].shape, _groups(settings))
    names = (weight, name, f"{weight}_scale", f"{weight}_zero_point", headers)
    return _found(*names, shape=shape, format=format, group=group, prepare=prepare, stem=module)


def _bits(settings, name):
    groups = settings.get("config_groups", {}).values()
    found = {group.get("weights", {}).get("num_bits") for group in groups if group.get("weights")}
    if len(found) != 1 or not found <= {4, 8}:
        raise ValueError(f"{name}: config_groups have num_bits {sorted(map(str, found))}, needs 4 or 8. {_WAY_OUT}")
    return found.pop()


def _packed_4_bits(codes, scales, zeros=None):
    """Code + 8 in the bits; of zeros, eight consecutive rows share an int32 (compressed-tensors, pack_to_int32)."""
    if zeros is not None:
        rows = codes.shape[0]
        zeros = [(_unpack(zeros, 1)[:rows] - 8).to(torch.int8)]
    return codes.view(torch.uint8), scales, zeros


def _packed_8_bits(codes, scales, zeros=None):
    """Code + 128 in the bits; a copy, since int8 codes are stored as two's complement here."""
    if zeros is not None:
        rows = codes.shape[0]
        zeros = zeros.t().contiguous().view(torch.uint8).t()[:rows]
        zeros = [(zeros ^ 128).view(torch.int8).contiguous()]
    return (codes.view(torch.uint8) ^ 128).view(torch.int8), scales, zeros


def _blocks_and_scales(name, headers, settings):
    """gpt-oss: (experts, rows, groups, 16) bytes, each with the code of the even column in its low half."""
    if not name.endswith("_blocks"):
        return None
    weight = name.removesuffix("_blocks")
    if f"{weight}_scales" not in headers:
        raise ValueError(f"{name}: has no {weight}_scales in the checkpoint")
    *shape, groups, width = headers[name].shape
    group, shape = (1, 2 * width), (*shape, 2 * width * groups)
    names = (weight, name, f"{weight}_scales", "", headers)
    return _found(*names, shape=shape, format="e2m1", group=group, prepare=_joined_blocks)


def _joined_blocks(codes, scales):
    return codes.flatten(-2), scales, None


def _own(name, headers, settings):
    if not name.endswith(".codes"):
        return None
    weight = name.removesuffix(".codes")
    format, group = settings.get("format"), settings.get("group")
    if f"{weight}.scales" not in headers:
        raise ValueError(f"{name}: has no {weight}.scales in the checkpoint")
    *shape, width = headers[name].shape
    # With 4 bits and an odd number of columns, half of a row's last byte is empty. Only the scales' group could tell,
    # and hidden sizes are even, so two codes a byte are assumed.
    shape = (*shape, 2 * width if format in ("int4", "nf4", "e2m1") else width)
    names = (weight, name, f"{weight}.scales", f"{weight}.zeros", headers)
    return _found(*names, shape=shape, format=format, group=group)


def _quantised_columns(name, headers, settings):
    """GPTQ and AWQ: ``qweight`` with the inputs as rows."""
    module, _, suffix = name.rpartition(".")
    if suffix != "qweight":
        return None
    needed = [f"{module}.{n}" for n in ("scales", "qzeros")]
    if missing := [n for n in needed if n not in headers]:
        raise ValueError(f"{name}: has no {missing[0]} in the checkpoint")
    index = f"{module}.g_idx"
    (rows, columns), groups = headers[name].shape, headers[needed[0]].shape[0]
    awq = settings["quant_method"] == "awq"
    inputs, outputs = (rows, 8 * columns) if awq else (8 * rows, columns)
    group = settings.get("group_size", settings.get("q_group_size", 128))
    group = group if group > 0 else inputs
    if -(-inputs // group) != groups:
        raise ValueError(f"{name}: has scales for {groups} groups, needs one for each {group} of {inputs} inputs")
    offset = 1 if not awq and settings.get("checkpoint_format", "gptq") == "gptq" else 0

    def prepare(codes, scales, zeros, g_idx=None):
        if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(inputs) // group):
            raise ValueError(f"its columns are permuted (act-order, desc_act), which is not read. {_WAY_OUT}")
        values = _unpack_outputs(codes) if awq else _unpack(codes, 1)
        zeros = _unpack_outputs(zeros).t() if awq else _unpack(zeros.t(), 1)
        zeros = (zeros + offset - 8).to(torch.int8).contiguous()  # GPTQ's first version stores zero - 1
        return pack4(values.t()).contiguous(), scales.t().contiguous(), [zeros] if bool(zeros.any()) else None

    weight = f"{module}.weight"
    names = (name, needed[0], needed[1], *([index] if index in headers else ()))
    nbytes = _nbytes(headers[name], headers[needed[0]], _has_zeros(settings))
    return StoredMatrix(weight, (outputs, inputs), "int4", (1, group), names, names, nbytes, prepare)


def _unpack(packed, dim):
    """int32 (n, columns), each with eight numbers of 4 bits of consecutive rows, to (8 n, columns)."""
    return ((packed.unsqueeze(dim) >> _SHIFTS[:, None]) & 15).flatten(0, 1)


def _unpack_outputs(packed):
    """int32 (rows, n), each with eight numbers of 4 bits in AWQ's order, to (rows, 8 n)."""
    values = (packed.unsqueeze(-1) >> _SHIFTS) & 15
    ordered = torch.empty_like(values)
    ordered[..., list(_AWQ_ORDER)] = values
    return ordered.flatten(-2)


def _groups(settings):
    """The blocks of weights that share a scale, of which the config speaks: ``[(rows, columns), ...]``."""
    weights = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
    blocks = [settings.get("weight_block_size"), *(w.get("block_structure") for w in weights)]
    groups = [tuple(block) for block in blocks if isinstance(block, list | tuple) and len(block) == 2]
    return groups + [(1, w["group_size"]) for w in weights if (w.get("group_size") or 0) > 0] or [_BLOCK]


def _group(name, shape, scales, groups):
    """Rows and columns that share a scale: those of ``groups`` that give scales of this shape, a row, or all."""
    rows, columns = shape[-2:]
    counts = tuple(scales[-2:]) if len(scales) >= 2 else (*scales, 1, 1)[:2]
    for group in (*groups, (1, columns), (rows, columns)):
        if counts == (-(-rows // group[0]), -(-columns // group[1])):
            return group
    raise ValueError(
        f"{name}: has scales {tuple(scales)} for {rows} rows and {columns} columns, needs one for each block of "
        f"{' or '.join(f'{r} x {c}' for r, c in groups)}, for each row, or one for all"
    )


_LAYOUTS = {
    "fp8": _weight_and_scale,
    "mxfp8": _weight_and_scale,
    "compressed-tensors": _compressed,
    "mxfp4": _blocks_and_scales,
    "gptq": _quantised_columns,
    "awq": _quantised_columns,
    OWN_METHOD: _own,
}
