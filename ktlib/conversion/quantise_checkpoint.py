"""ktlib's own format of a checkpoint: routed experts as codes and scales, all other weights as they were.

The weight of all experts of a layer, ``P.gate_up_proj`` or ``P.down_proj``, becomes ``P.gate_up_proj.codes`` (experts,
rows, columns; 4-bit codes two in a byte) and ``P.gate_up_proj.scales``, in the layout of :class:`ktlib.Weight`; where
a source has them, ``P.gate_up_proj.zeros`` as well. Rows are outputs in every family. Gate and up rows have the order
of the family's class. Codes of int4 have the bytes of compressed-tensors' pack-quantized.

A program without ktlib must not take such a folder for a model whose experts are missing, because transformers would
then initialize them with random numbers. So the index has a name of its own, and loading without ktlib ends in an
OSError.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ktlib.conversion.nearest_codes import Quantised, default_scale_dtype, quantise
from ktlib.conversion.quantised_sources import StoredCodes, common_format, joined, scales_and_zeros
from ktlib.files import ownership, tensor_files
from ktlib.integrations.expert_names import is_transposed_by_shape
from ktlib.integrations.quantised_checkpoints import INDEX
from ktlib.integrations.stored_formats import OWN_METHOD
from ktlib.integrations.transformers_experts import unsupported
from ktlib.operator.weight import Weight
from ktlib.reference.formats import CODEBOOKS

REPORT = "quantise_report.json"
# the format of ktlib.Weight, and how many rows and columns share a scale, by the name that users give
FORMATS = {
    "int8": ("int8", (1, 128)),
    "int4": ("int4", (1, 32)),
    "nf4": ("nf4", (1, 64)),
    "mxfp4": ("e2m1", (1, 32)),
    "fp8": ("e4m3", (128, 128)),
}
CHOICES = (*FORMATS, "keep")
_CODE_DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, **dict.fromkeys(CODEBOOKS, torch.uint8)}
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def settings(format, group):
    """The entry ``quantization_config`` in the config.json of a checkpoint whose experts have this format."""
    return {"quant_method": OWN_METHOD, "format": format, "group": list(group), "version": 1}


@dataclass(eq=False)
class ExpertCodes:
    """The weight of all experts of a layer as codes, made expert by expert when they are loaded.

    Attributes:
        name: of the weight in the model.
        shape: (experts, rows, columns).
        load_expert: loads the weight (rows, columns) of the expert with a number.
        encode: makes :class:`~ktlib.conversion.nearest_codes.Quantised` of an expert's number and weight.
        error: the relative L2 error of the codes, None before they are loaded.
    """

    name: str
    shape: tuple
    load_expert: Callable[[int], torch.Tensor]
    encode: Callable[[int, torch.Tensor], Quantised]
    format: str
    group: tuple
    scale_dtype: torch.dtype = torch.bfloat16
    has_zeros: bool = False
    error: float | None = None

    def stored(self):
        """``{name: Stored}`` of codes, scales and, if there are any, zeros."""
        experts, rows, columns = self.shape
        width = -(-columns // 2) if self.format in CODEBOOKS else columns
        groups = experts, -(-rows // self.group[0]), -(-columns // self.group[1])
        parts = {"codes": ((experts, rows, width), _CODE_DTYPES[self.format]), "scales": (groups, self.scale_dtype)}
        if self.has_zeros:
            parts["zeros"] = groups, torch.int8
        return {
            f"{self.name}.{part}": tensor_files.Stored(
                *kind, lambda part=part: getattr(tensor_files.recent(self), part)
            )
            for part, kind in parts.items()
        }

    def load(self):
        """Codes, scales and zeros, as :class:`~ktlib.conversion.nearest_codes.Quantised`. Sets ``error``."""
        made = [torch.empty(part.shape, dtype=part.dtype, device="cpu") for part in self.stored().values()]

        def fill(expert, weight):
            for part, value in zip(made, self.encode(expert, weight), strict=False):
                _bits(part[expert]).copy_(_bits(value))

        self._measure(made, fill)
        return Quantised(*made, *([] if self.has_zeros else [None]), self.group)

    def measure(self, load):
        """Set ``error`` to that of codes that were written before; ``load(name)`` loads a tensor."""
        self._measure([load(name) for name in self.stored()], lambda *_: None)

    def _measure(self, parts, fill):
        """Set ``error`` to that of ``parts``, which ``fill(expert, weight)`` may change first."""
        difference = total = 0.0
        for expert in range(self.shape[0]):
            weight = self.load_expert(expert)
            fill(expert, weight)
            of_expert = Weight(
                self.format, *(part[expert] for part in parts), group=self.group, shape=(1, *self.shape[1:])
            )
            difference += _squares(_difference(of_expert.decoded()[0], weight))
            total += _squares(weight)
        self.error = 0.0 if difference == 0 else (difference / total) ** 0.5


def _bits(tensor):
    """8-bit numbers as uint8, so that scales in e8m0, which files may call uint8, are copied and not converted."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _difference(decoded, weight):
    """fp32; 0 where both are NaN or the same infinity, as codes of a source may be."""
    is_same = (decoded == weight) | (decoded.isnan() & weight.isnan())
    return torch.where(is_same, 0.0, decoded.float() - weight.float())


def _squares(tensor):
    """The sum of the squares, a float."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2


def in_shapes_of_class(tensors, model, layout):
    """``tensors`` with those transposed that files of the family may hold so, as transformers does when it loads them.

    Such a family is Qwen3-VL-MoE, whose published files hold the experts stacked and transposed.
    """
    result = dict(tensors)
    for rule in layout.computed:
        if not is_transposed_by_shape(rule):
            continue
        (operation,) = rule.operations
        for name in layout.experts:
            tensor = tensors.get(name)
            is_target = any(re.search(rf"(^|\.){pattern}$", name) for pattern in rule.target_patterns)
            if tensor is None or not is_target or tensor.shape == tuple(model.get_parameter(name).shape):
                continue
            if isinstance(tensor, StoredCodes):
                raise ValueError(f"source: {name} is quantised along its outputs, needs codes along its inputs")
            dims = operation.dim0, operation.dim1
            shape = tuple(torch.empty(tensor.shape, device="meta").transpose(*dims).shape)
            result[name] = tensor._replace(
                shape=shape, load=lambda tensor=tensor, dims=dims: tensor.load().transpose(*dims)
            )
    return result


def expert_codes(tensors, parts, model, layout, choice, source):
    """``[ExpertCodes]`` of all routed experts in the ``tensors`` of a model.

    Args:
        tensors: ``{name in the model: Stored}``.
        parts: ``{name: [[Stored of each projection] of each expert]}`` of weights that files hold expert by expert.
        choice: one of :data:`CHOICES`.

    Raises:
        ValueError: the model has no routed experts, or some that ktlib cannot compute; or they are no floats.
    """
    if not layout.experts:
        raise ValueError(f"source: {source} has no routed experts, which alone are quantised")
    parts = {name: parts.get(name, [[tensors[name]]]) for name in layout.experts}
    for name in parts:
        module = model.get_submodule(name.rpartition(".")[0])
        if (reason := unsupported(module)) is not None:
            raise ValueError(
                f"source: {source} has experts ({type(module).__name__}) that ktlib cannot compute: {reason}; needs a "
                "family without such experts, or to be loaded as it is"
            )
        if tensors[name].dtype not in _WEIGHT_DTYPES:
            raise ValueError(f"source: {name} is {tensors[name].dtype}, needs bf16, fp16 or fp32")
    format, group = common_format(parts) if choice == "keep" else FORMATS[choice]
    result = []
    for name, experts in parts.items():
        is_transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
        count, *shape = tensors[name].shape
        shape = shape[::-1] if is_transposed else shape
        if format in CODEBOOKS and shape[1] % 2:
            raise ValueError(f"source: {name} has {shape[1]} columns, needs an even number for codes of 4 bits")
        load_expert = functools.partial(_expert, experts, is_transposed)
        if choice == "keep":
            encode = functools.partial(_kept, experts, group)
            further = scales_and_zeros(name, experts)
        else:
            encode = functools.partial(_nearest, name, format, group)
            further = (default_scale_dtype(format),)
        result.append(ExpertCodes(name, (count, *shape), load_expert, encode, format, group, *further))
    return result


def _expert(parts, is_transposed, expert):
    """The weight (outputs, inputs) of an expert."""
    if len(parts[0][0].shape) == 2:
        return torch.cat([tensor.load() for tensor in parts[expert]])
    (stack,) = parts[0]
    if isinstance(stack, StoredCodes):
        return stack.weight().narrow(0, expert, 1).decoded()[0]
    weight = stack.load()[expert]
    return weight.T.contiguous() if is_transposed else weight


def _kept(parts, group, expert, _):
    """The codes of an expert in the source."""
    stacked = len(parts[0][0].matrix.shape) == 3
    weights = [parts[0][0].weight().narrow(0, expert, 1)] if stacked else [one.weight() for one in parts[expert]]
    return joined(weights, group)


def _nearest(name, format, group, expert, weight):
    try:
        return quantise(weight, format, group=group)
    except ValueError as error:
        raise ValueError(f"source: {name}, expert {expert}: {error}") from None


def refuse_other_report(out, codes):
    """ValueError if the folder ``out`` has a file with the report's name that is no report of these experts."""
    try:
        report = tensor_files.read_json(out / REPORT)
    except ValueError:  # no JSON
        report = {}
    errors = report.get("relative_l2")
    is_of_these = isinstance(errors, dict) and errors.keys() == {one.name for one in codes}
    if not is_of_these or report.get("format") != codes[0].format:
        ownership.refuse_foreign([out / REPORT], "out", out, replace=False)


def write_report(out, codes, progress):
    """Write the relative L2 error of each weight to ``quantise_report.json``, unless it is there.

    Errors of files that an earlier call wrote are measured again.
    """
    from tqdm.auto import tqdm

    if (out / REPORT).is_file():
        return
    files = tensor_files.read_json(out / INDEX)["weight_map"]
    unknown = [one for one in codes if one.error is None]
    for one in tqdm(unknown, desc="measuring errors", disable=not (progress and unknown)):
        stored = tensor_files.read(out / files[f"{one.name}.codes"])
        one.measure(lambda name, stored=stored: stored[name].load())
    worst = max(codes, key=lambda one: one.error)
    report = {
        "format": worst.format,
        "mean": sum(one.error for one in codes) / len(codes),
        "worst": worst.error,
        "worst_weight": worst.name,
        "relative_l2": {one.name: one.error for one in codes},
    }
    ownership.write_text(out / REPORT, json.dumps(report, indent=1), "out")
