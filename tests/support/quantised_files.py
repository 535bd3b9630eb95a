"""Small checkpoints in the quantised layouts of the hub, packed here by hand from the words of their specifications."""

import json

import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_model

from ktlib.conversion.nearest_codes import quantise
from ktlib.reference.formats import decode, unpack4

SIZES = {"hidden_size": 160, "moe_intermediate_size": 176, "intermediate_size": 96}  # no multiples of 128, or of 32
_CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}


def _ct(format, **weights):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "actorder": None, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": format}}
    return {**_CT, "format": format, "config_groups": groups}


STACKED = ("experts.gate_up_proj", "experts.down_proj")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
# kind: (quantization_config, function of name and weight to tensors, arguments of quantise)
KINDS = {}


def kind(name, settings, format, **options):
    def register(write):
        KINDS[name] = (settings, write, format, options)
        return write

    return register


@kind("fp8", FP8, "e4m3", scale_dtype=torch.float32)
@kind("fp8, bf16 scales", FP8, "e4m3")
def fp8(name, codes, scales, zeros):
    return {name: codes, f"{name}_scale_inv": scales}


@kind("fp8, e8m0", {**FP8, "scale_fmt": "ue8m0"}, "e4m3", scale_dtype=torch.float8_e8m0fnu)
def fp8_scale(name, codes, scales, zeros):
    module = name.removesuffix(".weight")
    return {name: codes, f"{module}.scale": scales}


@kind(
    "mxfp8",
    {**FP8, "quant_method": "mxfp8", "weight_block_size": [1, 32]},
    "e4m3",
    group=(1, 32),
    scale_dtype=torch.float8_e8m0fnu,
)
def mxfp8(name, codes, scales, zeros):
    return {name: codes, f"{name}_scale_inv": scales.view(torch.uint8)}


@kind("float rows", _ct("float-quantized", type="float"), "e4m3", group=(1, 2**20))
@kind("int8 rows", _ct("int-quantized"), "int8", group=(1, 2**20))
def rows(name, codes, scales, zeros):
    return {name: codes, f"{name}_scale": scales, f"{name.removesuffix('.weight')}.input_scale": torch.ones(1)}


@kind("int4", _ct("pack-quantized", num_bits=4, strategy="group", group_size=32), "int4")
@kind(
    "int4, zeros",
    _ct("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int4",
    symmetric=False,
)
def packed_4_bits(name, codes, scales, zeros):
    values = unpack4(codes, 2 * codes.shape[1])
    tensors = {f"{name}_packed": pack(values, 4), f"{name}_scale": scales}
    tensors[f"{name}_shape"] = torch.tensor(values.shape)
    if zeros is not None:
        tensors[f"{name}_zero_point"] = pack((zeros + 8).t(), 4).t().contiguous()
    return tensors


@kind("int8, packed", _ct("pack-quantized", strategy="group", group_size=32), "int8", group=(1, 32))
@kind(
    "int8, packed, zeros",
    _ct("pack-quantized", strategy="group", group_size=32, symmetric=False),
    "int8",
    group=(1, 32),
    symmetric=False,
)
def packed_8_bits(name, codes, scales, zeros):
    tensors = {f"{name}_packed": pack(codes.int() + 128, 8), f"{name}_scale": scales}
    if zeros is not None:
        tensors[f"{name}_zero_point"] = pack((zeros.int() + 128).t(), 8).t().contiguous()
    return tensors


@kind("v4", {**FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}, "e4m3", scale_dtype=torch.float8_e8m0fnu)
def v4(name, codes, scales, zeros):
    return {name: codes, f"{name.removesuffix('.weight')}.scale": scales}


def v4_experts(name, codes, scales, zeros):
    return {name: codes.view(torch.int8), f"{name.removesuffix('.weight')}.scale": scales}


@kind("mxfp4, packed", _ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), "e2m1")
def packed_mxfp4(name, codes, scales, zeros):
    return {f"{name}_packed": codes, f"{name}_scale": scales.view(torch.uint8)}


@kind("gptq", {**GPTQ, "checkpoint_format": "gptq"}, "int4", symmetric=False, scale_dtype=torch.float16)
@kind("gptq, symmetric", {**GPTQ, "sym": True}, "int4", scale_dtype=torch.float16)
def gptq(name, codes, scales, zeros):
    return _gptq(name, codes, scales, zeros, offset=1)


@kind("gptq_v2", {**GPTQ, "checkpoint_format": "gptq_v2"}, "int4", symmetric=False, scale_dtype=torch.float16)
def gptq_v2(name, codes, scales, zeros):
    return _gptq(name, codes, scales, zeros, offset=0)


def _gptq(name, codes, scales, zeros, offset):
    module, values = name.removesuffix(".weight"), unpack4(codes, 2 * codes.shape[1])
    zeros = torch.zeros(scales.shape) if zeros is None else zeros
    return {
        f"{module}.qweight": pack(values, 4).t().contiguous(),  # eight inputs of an output in an int32
        f"{module}.qzeros": pack((zeros + 8 - offset).t(), 4),
        f"{module}.scales": scales.t().contiguous(),
        f"{module}.g_idx": torch.arange(values.shape[1], dtype=torch.int32) // 32,
    }


@kind(
    "awq",
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "int4",
    symmetric=False,
    scale_dtype=torch.float16,
)
def awq(name, codes, scales, zeros):
    module, values = name.removesuffix(".weight"), unpack4(codes, 2 * codes.shape[1])
    return {
        f"{module}.qweight": pack(values.t(), 4, order=(0, 2, 4, 6, 1, 3, 5, 7)),
        f"{module}.qzeros": pack((zeros + 8).t(), 4, order=(0, 2, 4, 6, 1, 3, 5, 7)),
        f"{module}.scales": scales.t().contiguous(),
    }


def pack(values, bits, order=None):
    """(rows, columns) unsigned numbers to int32 (rows, columns * bits / 32), the first number in the lowest bits."""
    each = 32 // bits
    values = values.long().reshape(values.shape[0], -1, each)
    values = values[..., list(order)] if order else values
    packed = sum(values[..., i] << (bits * i) for i in range(each))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().contiguous()


def save_quantised(folder, kind, family="qwen3_moe", **changes):
    """Write a tiny model of the family in one of KINDS; returns the decoded weights, see :func:`quantise_files`."""
    tiny_model(family, dtype=torch.bfloat16, **{**SIZES, **changes}).save_pretrained(folder)
    return quantise_files(folder, kind)


def quantise_files(folder, kind):
    """Quantise a saved bf16 model; returns ``{name: weight}`` as it decodes, with the names that the bf16 model has.

    Every matrix of the model is quantised but embeddings, head, router and norms; of stacked experts, in the layouts
    whose names allow it. The kind "v4" is DeepSeek-V4's: FP4 experts and all else in FP8.
    """
    weights = load_file(folder / "model.safetensors")
    tensors, decoded = {}, {}
    for name, weight in weights.items():
        stacked = weight.dim() == 3 and name.endswith(STACKED) and "fp8" in kind
        matrix = weight.dim() == 2 and name.endswith(".weight")
        if not (stacked or matrix) or any(part in name for part in ("embed", "head", "gate.")):
            tensors[name] = decoded[name] = weight
            continue
        _, write, format, options = KINDS[kind]
        if kind == "v4" and ".experts." in name:
            write, format, options = v4_experts, "e2m1", {}
        made = quantise(weight, format, **options)
        tensors |= write(name, made.codes, made.scales, made.zeros)
        decoded[name] = decode(format, made.codes, made.scales, made.zeros, columns=weight.shape[-1], group=made.group)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=KINDS[kind][0])
    return decoded


def save_mxfp4(folder, **changes):
    """gpt-oss in MXFP4, as its checkpoints are; returns ``{name: weight}`` in the layout of the bf16 class."""
    tiny_model("gpt_oss", dtype=torch.bfloat16, **{**SIZES, "intermediate_size": 160, **changes}).save_pretrained(
        folder
    )
    weights = load_file(folder / "model.safetensors")
    tensors, decoded = {}, dict(weights)
    for name, weight in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        rows = weight.transpose(1, 2).contiguous()
        made = quantise(rows, "e2m1")
        tensors[f"{name}_blocks"] = made.codes.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = made.scales.view(torch.uint8)
        values = decode("e2m1", made.codes, made.scales, columns=rows.shape[-1], group=made.group)
        decoded[name] = values.transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    return decoded


def save_own(folder, format="int4", **changes):
    """A checkpoint as ``ktlib fuse --quantise`` writes it, in two files; returns ``{name: weight}`` as it decodes."""
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, **{**SIZES, **changes})
    model.config.save_pretrained(folder)
    shards, decoded = [{}, {}], {}
    for name, weight in model.state_dict().items():
        if weight.dim() < 3:
            shards[0][name] = decoded[name] = weight
            continue
        made = quantise(weight, format)
        shards[1] |= {f"{name}.codes": made.codes, f"{name}.scales": made.scales}
        decoded[name] = decode(format, made.codes, made.scales, columns=weight.shape[-1], group=made.group)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "ktlib.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"quant_method": "ktlib", "format": format, "group": list(made.group), "version": 1}
    set_config(folder, quantization_config=settings)
    return decoded


def save_decoded(folder, source, decoded):
    """The same model as a bf16 checkpoint of the decoded weights."""
    folder.mkdir()
    save_file(decoded, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def set_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
