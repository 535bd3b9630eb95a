"""A merged checkpoint computes what a model with its adapter does, in the files' layout, or is refused by name."""

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from support.adapter_files import ADAPTER_FILE, CONFIG, save_per_expert
from support.families import discover
from support.family_models import model_classes
from support.memory import measure
from support.merged import load, logits, merge, save_adapter, save_base, save_of_class, stored
from support.models import random_adapter, relative_error, tokens
from support.quantised_files import save_decoded, save_mxfp4, save_own, save_quantised
from transformers import AutoConfig

import ktlib
from ktlib.conversion.merge import NOTE, REPORT
from ktlib.files import tensor_files
from ktlib.lab import synthetic

CASES = [
    (family, cls.__name__)
    for family in sorted({family for family, _ in discover()})
    for cls in model_classes(family)
    if cls.__name__ != "OpenAIPrivacyFilterForTokenClassification"  # no language model
]
# Operations by which transformers computes adapted weights of these classes from those in files.
OTHER_FORM = {
    "InklingForConditionalGeneration": "Interleave",
    "Inkling2ForCausalLM": "Interleave",
    "Inkling2ForConditionalGeneration": "Interleave",
    "Inkling2LoopForCausalLM": "Inkling2LoopDequantizeExperts",
    "Inkling2LoopForConditionalGeneration": "Inkling2LoopDequantizeExperts",
    "LaraMiniForCausalLM": "Split",
}


def report_of(folder):
    return json.loads((folder / REPORT).read_text())


def text(model):
    return model.generate(tokens(rows=1), max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Tiny models on one thread."""


# ------------------------------------------------------------------------------------------ the numbers of the model


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "mixtral", "gpt_oss"])
def test_a_merged_model_computes_and_writes_what_the_live_one_does(family, tmp_path):
    base = save_base(tmp_path / "base", family)
    before = load(base)
    live = save_adapter(tmp_path / "adapter", base)
    wanted, effect = logits(live), relative_error(logits(before), logits(live))
    assert effect > 0.05
    exact = PeftModel.from_pretrained(load(base), tmp_path / "adapter").double().merge_and_unload().state_dict()

    for dtype in ("fp32", "bf16"):
        out = merge(tmp_path / "adapter", tmp_path / dtype, base, dtype=dtype)
        got, held, lost = stored(out), stored(base), report_of(out)["lost"]
        assert {name: value.shape for name, value in got.items()} == {n: v.shape for n, v in held.items()}
        model = load(out)
        state = model.state_dict()
        for name, value in exact.items():
            rounded = value.to(torch.float32 if dtype == "fp32" else torch.bfloat16).double()
            torch.testing.assert_close(state[name].double(), rounded, rtol=1e-6, atol=1e-9, msg=name)
        assert relative_error(logits(model), wanted) < (1e-5 if dtype == "fp32" else 3 * lost * effect)
        assert dtype == "bf16" or text(model) == text(live)
        assert (lost < 1e-5) if dtype == "fp32" else (0.001 < lost < 0.05)
        changed = {name for name, value in got.items() if not torch.equal(value, held[name])}
        assert changed == report_of(out)["lost_by_tensor"].keys()
        assert AutoConfig.from_pretrained(out).dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    ours = load(tmp_path / "bf16", torch.bfloat16, "ktlib")
    assert relative_error(logits(ours), logits(load(tmp_path / "bf16", torch.bfloat16))) < 0.02
    assert json.loads((out / "generation_config.json").read_text()) == json.loads(
        (base / "generation_config.json").read_text()
    )


def test_the_report_has_the_share_of_each_update_that_rounding_lost(tmp_path):
    base = save_base(tmp_path / "base", "qwen2_moe")
    before, shares = stored(base), {}
    for scale in (0.1, 0.001):
        save_adapter(tmp_path / f"{scale}", base, scale=scale)
        exact = stored(merge(tmp_path / f"{scale}", tmp_path / f"{scale} fp32", base, dtype="fp32"))
        out = merge(tmp_path / f"{scale}", tmp_path / f"{scale} bf16", base)
        after, report = stored(out), report_of(out)
        norms = {
            name: ((after[name].float() - exact[name]).norm(), (exact[name] - before[name].float()).norm())
            for name in report["lost_by_tensor"]
        }
        for name, (lost, size) in norms.items():
            assert report["lost_by_tensor"][name] == pytest.approx((lost / size).item(), rel=1e-2, abs=1e-5)
        total = math.hypot(*(lost for lost, _ in norms.values())) / math.hypot(*(size for _, size in norms.values()))
        assert report["lost"] == pytest.approx(total, rel=1e-2)
        assert report["worst"] == max(report["lost_by_tensor"].values())
        assert report["worst"] == report["lost_by_tensor"][report["worst_tensor"]]
        shares[scale] = report["lost"]
    assert shares[0.1] < 0.02 and shares[0.001] > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"experts.gate_up_proj": 5, "o_proj": 2}, "alpha_pattern": {"experts.down_proj": 3}},
        {"target_parameters": ["layers.1.mlp.experts.down_proj", "mlp.gate.weight"], "target_modules": []},
        {"target_parameters": [], "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "mlp.gate", "norm"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_each_setting_is_applied_as_peft_applies_it(options, tmp_path):
    base = save_base(tmp_path / "base", "deepseek_v2")
    live = save_adapter(tmp_path / "adapter", base, **options)
    merged = load(merge(tmp_path / "adapter", tmp_path / "out", base, dtype="fp32"))
    assert relative_error(logits(merged), logits(live)) < 1e-5 < relative_error(logits(load(base)), logits(live))
    for name in options.get("modules_to_save", ()):
        weights = {n: v for n, v in live.state_dict().items() if f"{name}.modules_to_save.default.weight" in n}
        assert weights
        for key, value in weights.items():
            key = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            assert torch.equal(merged.state_dict()[key], value)


@pytest.mark.parametrize("layout", ["per_expert", "ktransformers"])
def test_adapters_of_other_layouts_merge_as_the_imported_one(layout, tmp_path):
    base = save_base(tmp_path / "base", "qwen3_moe")
    source = tmp_path / "source"
    if layout == "per_expert":
        save_per_expert(source, "qwen3_moe")
    else:
        save_adapter(tmp_path / "peft", base, target_modules=[])
        ktlib.export_adapter(tmp_path / "peft", source, base, layout)
    ktlib.import_adapter(source, tmp_path / "imported", base)
    got, wanted = (stored(merge(tmp_path / name, tmp_path / f"{name} merged", base)) for name in ("source", "imported"))
    assert all(torch.equal(value, wanted[name]) for name, value in got.items()) and got.keys() == wanted.keys()


@pytest.mark.parametrize("family, name", CASES, ids=map("/".join, CASES))
def test_every_family_is_merged_to_the_numbers_of_the_live_model_or_refused_by_name(family, name, tmp_path):
    base = save_of_class(tmp_path / "base", family, name)
    live = save_adapter(tmp_path / "adapter", base, r=2)
    if name in OTHER_FORM:
        with pytest.raises(ValueError, match=rf"another form .*checkpoints hold otherwise \(.*{OTHER_FORM[name]}"):
            merge(tmp_path / "adapter", tmp_path / "out", base, dtype="fp32")
        return
    out = merge(tmp_path / "adapter", tmp_path / "out", base, dtype="fp32")
    assert relative_error(logits(load(out)), logits(live)) < 1e-5 < relative_error(logits(load(base)), logits(live))


def test_stacks_that_files_hold_transposed_are_merged_transposed(tmp_path):
    """The published files of Qwen3-VL-MoE hold the experts as (experts, inputs, outputs)."""
    base = save_of_class(tmp_path / "base", "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration")
    tensors = stored(base)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    live = save_adapter(tmp_path / "adapter", base)
    out = merge(tmp_path / "adapter", tmp_path / "out", base, dtype="fp32")
    assert {n: v.shape for n, v in stored(out).items()} == {n: v.shape for n, v in stored(base).items()}
    assert relative_error(logits(load(out)), logits(live)) < 1e-5 < relative_error(logits(load(base)), logits(live))


# --------------------------------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "target_parameters": []},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_tied_weights_stay_tied_unless_the_adapter_changes_one(options, layout, tmp_path):
    base = save_base(tmp_path / "hub", "mixtral", tie_word_embeddings=True)
    if layout == "fused":
        base = ktlib.fuse_checkpoint(base, tmp_path / "fused", progress=False)
    live = save_adapter(tmp_path / "adapter", base, **options)
    out = merge(tmp_path / "adapter", tmp_path / "out", base, dtype="fp32")
    assert "lm_head.weight" not in stored(base) and ("lm_head.weight" in stored(out)) == bool(options)
    merged = load(out)
    assert merged.config.tie_word_embeddings == (not options)
    assert relative_error(logits(merged), logits(live)) < 1e-5 < relative_error(logits(load(base)), logits(live))


# ------------------------------------------------------------------------------------------------------ quantised bases


@pytest.mark.parametrize("kind", ["fp8", "int4", "gptq", "awq", "mxfp4", "own nf4"])
def test_a_quantised_base_is_merged_as_its_decoded_weights_are(kind, tmp_path):
    base = tmp_path / "base"
    if kind.startswith("own "):
        decoded = save_own(base, kind.removeprefix("own "))
    else:
        family = "deepseek_v3" if kind == "fp8" else "qwen3_moe"
        decoded = save_mxfp4(base) if kind == "mxfp4" else save_quantised(base, kind, family)
    (base / "quantize_config.json").write_text("{}")
    bf16 = save_decoded(tmp_path / "bf16", base, decoded)
    save_adapter(tmp_path / "adapter", bf16)
    out = merge(tmp_path / "adapter", tmp_path / "out", base)
    got, wanted = stored(out), stored(merge(tmp_path / "adapter", tmp_path / "wanted", bf16))
    assert got.keys() == wanted.keys() == decoded.keys()
    assert all(value.dtype == decoded[n].dtype and torch.equal(value, wanted[n]) for n, value in got.items())
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert not (out / "quantize_config.json").exists(), "says that the checkpoint is quantised"
    logits(load(out))
    exact = merge(tmp_path / "adapter", tmp_path / "exact", base, dtype="fp32")
    live = PeftModel.from_pretrained(load(bf16), tmp_path / "adapter")
    assert relative_error(logits(load(exact)), logits(live)) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_fused_base_is_merged_as_it_is_or_as_the_hub_has_it(family, tmp_path):
    hub = save_base(tmp_path / "hub", family)
    save_adapter(tmp_path / "adapter", hub)
    wanted = stored(merge(tmp_path / "adapter", tmp_path / "wanted", hub))
    fused = ktlib.fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    got = stored(merge(tmp_path / "adapter", tmp_path / "got", fused, layout="hub"))
    assert got.keys() == wanted.keys() == stored(hub).keys()
    assert all(torch.equal(value, wanted[name]) for name, value in got.items())
    out = merge(tmp_path / "adapter", tmp_path / "stacked", fused)
    assert stored(out).keys() == stored(fused).keys()
    states = [load(folder).state_dict() for folder in (out, tmp_path / "got")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    int4 = ktlib.fuse_checkpoint(hub, tmp_path / "int4", progress=False, quantise="int4")
    states = [
        load(merge(tmp_path / "adapter", tmp_path / f"int4 {layout}", int4, layout=layout)).state_dict()
        for layout in ("base", "hub")
    ]
    assert stored(tmp_path / "int4 hub").keys() == stored(hub).keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ------------------------------------------------------------------------------------------------- files and memory


def test_files_of_the_base_are_copied_and_those_of_the_adapter_are_preferred(tmp_path):
    base = save_base(tmp_path / "base", "qwen3_moe", max_position_embeddings=128)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "modeling_own.py", CONFIG, "training_args.bin"):
        (base / name).write_text(f'{{"base": "{name}"}}')
    (base / "folder").mkdir()
    (base / CONFIG).rename(tmp_path / CONFIG)  # transformers would load an adapter there
    save_adapter(tmp_path / "adapter", base)
    (tmp_path / CONFIG).rename(base / CONFIG)
    (tmp_path / "adapter/chat_template.jinja").write_text("of the training")
    out = merge(tmp_path / "adapter", tmp_path / "out", base)
    files = {path.name for path in out.iterdir() if not path.name.startswith("model-")}
    assert files == {
        *("tokenizer.json", "chat_template.jinja", "README.md", "modeling_own.py", "config.json"),
        *("generation_config.json", "model.safetensors.index.json", NOTE, REPORT),
    }
    assert (out / "chat_template.jinja").read_text() == "of the training"
    for name in ("tokenizer.json", "README.md", "config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_merge_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", "deepseek_v2")
    save_adapter(tmp_path / "adapter", base)
    whole = merge(tmp_path / "adapter", tmp_path / "whole", base)
    write = tensor_files.write
    for count in range(1, len(list(whole.glob("*.safetensors")))):
        cut, written = tmp_path / f"cut {count}", []

        def write_some(path, tensors, count=count, written=written):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path)
            write(path, tensors)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tensor_files, "write", write_some)
            merge(tmp_path / "adapter", cut, base)
        assert not (cut / "model.safetensors.index.json").exists() and not (cut / "config.json").exists()
        stamps = {path: path.stat().st_mtime_ns for path in written}
        merge(tmp_path / "adapter", cut, base)
        assert stamps == {path: path.stat().st_mtime_ns for path in written}, "finished files were written again"
        for path in whole.iterdir():
            assert path.read_bytes() == (cut / path.name).read_bytes(), path.name
    (cut / REPORT).unlink()
    merge(tmp_path / "adapter", cut, base)
    assert (cut / REPORT).read_bytes() == (whole / REPORT).read_bytes()


def test_another_merge_does_not_go_on_in_the_folder(tmp_path):
    base = save_base(tmp_path / "base", "qwen3_moe")
    save_adapter(tmp_path / "adapter", base)
    save_adapter(tmp_path / "other", base, scale=0.2)
    out = merge(tmp_path / "adapter", tmp_path / "out", base)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for options in ({"dtype": "fp32"}, {"layout": "hub"}):
        with pytest.raises(ValueError, match="out: .*made from something else"):
            merge(tmp_path / "adapter", out, base, **options)
    with pytest.raises(ValueError, match="out: .*made from something else"):
        merge(tmp_path / "other", out, base)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


SETUP = """
import warnings, peft, torch, transformers, ktlib
warnings.simplefilter("ignore")
from pathlib import Path
from transformers import AutoConfig, conversion_mapping
from transformers.models.deepseek_v2 import modeling_deepseek_v2
import ktlib.conversion.merge
torch.set_num_threads(1)
folder = Path({folder!r})
"""


def test_memory_of_a_merge(tmp_path):
    """At most a stack of experts and its factors are in memory, of a model with eight layers of 64 experts."""
    config = synthetic.deepseek_v2_lite(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=9,
        kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = synthetic.write_checkpoint(config, tmp_path / "base", progress=False)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    model = load(base, torch.bfloat16, "ktlib")
    random_adapter(get_peft_model(model, ktlib.lora_config(model, r=4))).save_pretrained(tmp_path / "adapter")
    adapter = (tmp_path / "adapter" / ADAPTER_FILE).stat().st_size
    assert size > 150e6 and adapter < size / 5
    merge(tmp_path / "adapter", tmp_path / "per expert", base, layout="hub")
    call = "ktlib.merge_adapter(folder / 'adapter', folder / 'merged {0}', folder / '{0}', progress=False)"
    both = f"[{call.format('base')}, {call.format('per expert')}]"
    peak = measure(SETUP.format(folder=str(tmp_path)), both)["peak"]
    print({"size": size, "adapter": adapter, "peak": peak})
    assert peak < size / 4, "more than two of nine layers in memory"
