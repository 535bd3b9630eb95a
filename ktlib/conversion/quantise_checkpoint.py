"""ktlib's own format of a checkpoint: routed experts as codes and scales, all other weights as they were.

The weight of all experts of a layer, ``P.gate_up_proj`` or ``P.down_proj``, becomes ``P.gate_up_proj.codes`` (experts,
rows, columns; 4-bit codes two in a byte) and ``P.gate_up_proj.scales``, in the layout of :class:`ktlib.Weight`. Rows
are outputs in every family. Gate and up rows have the order of the family's class.

A program without ktlib must not take such a folder for a model whose experts are missing, because transformers would
then initialize them with random numbers. So the index has a name of its own, and loading without ktlib ends in an
OSError.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ktlib.conversion.nearest_codes import Quantised, quantise
from ktlib.files import ownership, tensor_files
from ktlib.integrations.transformers_experts import unsupported
from ktlib.operator.weight import Weight
from ktlib.reference.formats import CODEBOOKS

INDEX = "ktlib.safetensors"
REPORT = "quantise_report.json"
# the format of ktlib.Weight, and how many rows and columns share a scale, by the name that users give
FORMATS = {"int8": ("int8", (1, 128)), "int4": ("int4", (1, 32)), "nf4": ("nf4", (1, 64)), "fp8": ("e4m3", (128, 128))}
_CODE_DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, **dict.fromkeys(CODEBOOKS, torch.uint8)}
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def settings(format, group):
    """The entry ``quantization_config`` in the checkpoint's config.json."""
    return {"quant_method": "ktlib", "format": format, "group": list(group), "version": 1}


@dataclass(eq=False)
class ExpertCodes:
    """The weight of all experts of a layer, quantised expert by expert when it is loaded.

    Attributes:
        name: of the weight in the model.
        shape: (experts, rows, columns).
        load_expert: loads the weight (rows, columns) of the expert with a number.
        error: the relative L2 error of the codes, None before they are loaded.
    """

    name: str
    shape: tuple
    load_expert: Callable[[int], torch.Tensor]
    format: str
    group: tuple
    error: float | None = None

    def stored(self):
        """``{name: Stored}`` of codes and scales."""
        experts, rows, columns = self.shape
        width = -(-columns // 2) if self.format in CODEBOOKS else columns
        groups = experts, -(-rows // self.group[0]), -(-columns // self.group[1])
        shapes = {"codes": (experts, rows, width), "scales": groups}
        dtypes = {"codes": _CODE_DTYPES[self.format], "scales": torch.bfloat16}
        return {
            f"{self.name}.{part}": tensor_files.Stored(
                shapes[part], dtypes[part], lambda part=part: getattr(tensor_files.recent(self), part)
            )
            for part in shapes
        }

    def load(self):
        """Codes and scales, as :class:`~ktlib.conversion.nearest_codes.Quantised`. Sets ``error``."""
        stored = self.stored().values()
        codes, scales = (torch.empty(part.shape, dtype=part.dtype, device="cpu") for part in stored)
        self._measure(codes, scales, self._quantise)
        return Quantised(codes, scales, None, self.group)

    def measure(self, codes, scales):
        """Set ``error`` to that of codes that were written before."""
        self._measure(codes, scales, lambda weight, *_: None)

    def _quantise(self, weight, expert, codes, scales):
        try:
            quantised = quantise(weight, self.format, group=self.group)
        except ValueError as error:
            raise ValueError(f"source: {self.name}, expert {expert}: {error}") from None
        codes.copy_(quantised.codes)
        scales.copy_(quantised.scales)

    def _measure(self, codes, scales, fill):
        """Set ``error`` after ``fill(weight, expert, codes, scales)`` of each expert."""
        difference = total = 0.0
        for expert in range(self.shape[0]):
            weight = self.load_expert(expert)
            fill(weight, expert, codes[expert], scales[expert])
            part = Weight(self.format, codes[expert], scales[expert], group=self.group, shape=(1, *self.shape[1:]))
            difference += _squares(part.decoded()[0].float() - weight.float())
            total += _squares(weight)
        self.error = 0.0 if difference == 0 else (difference / total) ** 0.5


def _squares(tensor):
    """The sum of the squares, a float."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2


def in_shapes_of_class(tensors, model, layout):
    """``tensors`` with those transposed that files of the family may hold so, as transformers does when it loads them.

    Such a family is Qwen3-VL-MoE, whose published files hold the experts stacked and transposed.
    """
    result = dict(tensors)
    for rule in layout.computed:
        operations = [
            (type(operation).__name__, getattr(operation, "check_dims", False)) for operation in rule.operations
        ]
        if operations != [("Transpose", True)]:
            continue
        (operation,) = rule.operations
        for name in layout.experts:
            tensor = tensors.get(name)
            is_target = any(re.search(rf"(^|\.){pattern}$", name) for pattern in rule.target_patterns)
            if tensor is None or not is_target or tensor.shape == tuple(model.get_parameter(name).shape):
                continue
            dims = operation.dim0, operation.dim1
            shape = tuple(torch.empty(tensor.shape, device="meta").transpose(*dims).shape)
            result[name] = tensor._replace(
                shape=shape, load=lambda tensor=tensor, dims=dims: tensor.load().transpose(*dims)
            )
    return result


def expert_codes(tensors, loaders, model, layout, format, group, source):
    """``[ExpertCodes]`` of all routed experts in the ``tensors`` of a model.

    Args:
        tensors: ``{name in the model: Stored}``.
        loaders: ``{name: load_expert}`` of weights that files hold expert by expert.

    Raises:
        ValueError: the model has no routed experts, or some that ktlib cannot compute; or they are no floats.
    """
    if not layout.experts:
        raise ValueError(f"source: {source} has no routed experts, which alone are quantised")
    result = []
    for name in layout.experts:
        module = model.get_submodule(name.rpartition(".")[0])
        if (reason := unsupported(module)) is not None:
            raise ValueError(
                f"source: {source} has experts ({type(module).__name__}) that ktlib cannot compute: {reason}; needs a "
                "family without such experts, or to be loaded as it is"
            )
        tensor = tensors[name]
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise ValueError(f"source: {name} is {tensor.dtype}, needs bf16, fp16 or fp32")
        experts, *shape = tensor.shape
        load_expert = loaders.get(name) or (lambda expert, tensor=tensor: tensor.load()[expert])
        if module.is_transposed:
            shape.reverse()
            load_expert = _transposed(load_expert)
        result.append(ExpertCodes(name, (experts, *shape), load_expert, format, tuple(group)))
    return result


def _transposed(load_expert):
    return lambda expert: load_expert(expert).T.contiguous()


def refuse_other_report(out, codes):
    """ValueError if the folder ``out`` has a file with the report's name that is no report of these experts."""
    report = tensor_files.read_json(out / REPORT)
    if report.get("format") != codes[0].format or set(report.get("relative_l2", ())) != {one.name for one in codes}:
        ownership.refuse_foreign([out / REPORT], "out", out, replace=False)


def write_report(out, codes, progress):
    """Write the relative L2 error of each weight to ``quantise_report.json``, unless it is there.

    Errors of files that an earlier call wrote are measured again.
    """
    from tqdm.auto import tqdm

    if (out / REPORT).is_file():
        return
    files = tensor_files.read_json(out / f"{INDEX}.index.json")["weight_map"]
    unknown = [one for one in codes if one.error is None]
    for one in tqdm(unknown, desc="measuring errors", disable=not (progress and unknown)):
        stored = tensor_files.read(out / files[f"{one.name}.codes"])
        one.measure(stored[f"{one.name}.codes"].load(), stored[f"{one.name}.scales"].load())
    worst = max(codes, key=lambda one: one.error)
    report = {
        "format": worst.format,
        "mean": sum(one.error for one in codes) / len(codes),
        "worst": worst.error,
        "worst_weight": worst.name,
        "relative_l2": {one.name: one.error for one in codes},
    }
    ownership.write_text(out / REPORT, json.dumps(report, indent=1), "out")
