"""Synthetic checkpoints: equal to the model in memory, completed after an interruption, loaded without a copy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.models import tiny_config
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Qwen3Config

from ktlib.estimate import (
    PCIE,
    QUEUEING,
    STREAMED,
    Estimate,
    break_even_rows,
    estimate,
    meta_model,
    saved_bytes,
    staging_bytes,
    stream_rate,
)
from ktlib.files import ownership, tensor_files
from ktlib.lab import synthetic

CONFIG = tiny_config("deepseek_v2", initializer_range=0.02)
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PARAMS, RECORDED = NOTEBOOKS / "params", NOTEBOOKS / "recorded" / "hybrid_true_size.json"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="ktlib")


def test_disk_and_memory_hold_the_same_weights(tmp_path):
    synthetic.write_checkpoint(CONFIG, tmp_path, seed=3, progress=False)
    loaded, made = load(tmp_path), synthetic.random_model(CONFIG, seed=3, progress=False)
    for name, parameter in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    experts = loaded.model.layers[1].mlp.experts.gate_up_proj
    assert experts.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(experts[0], experts[1])
    other = synthetic.random_model(CONFIG, seed=4, progress=False)
    assert not torch.equal(other.model.layers[1].mlp.experts.gate_up_proj, experts)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(loaded(ids).logits, made(ids).logits) and loaded(ids).logits.isfinite().all()


def test_an_interrupted_write_goes_on(tmp_path):
    synthetic.write_checkpoint(CONFIG, tmp_path, progress=False)
    files = sorted(tmp_path.glob("*.safetensors"))
    moe_layers = CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace
    assert len(files) == CONFIG.num_hidden_layers + moe_layers + 1
    wanted, written = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()
    synthetic.write_checkpoint(CONFIG, tmp_path, progress=False)
    assert files[1].read_bytes() == wanted and files[0].stat().st_mtime_ns == written
    assert not list(tmp_path.glob(f"{ownership.TEMPORARY}*"))
    with pytest.raises(ValueError, match="made from something else"):
        synthetic.write_checkpoint(CONFIG, tmp_path, seed=1, progress=False)
    files[2].rename(tmp_path / "model-00003-of-00009.safetensors")
    with pytest.raises(ValueError, match="holds this checkpoint in other files: model-00003-of-00009"):
        synthetic.write_checkpoint(CONFIG, tmp_path, progress=False)


def test_files_are_aligned_and_complete(tmp_path):
    synthetic.write_checkpoint(CONFIG, tmp_path, progress=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = set()
    for path in tmp_path.glob("*.safetensors"):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % tensor_files.PAGE == 0
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert names == set(index["weight_map"]) == set(meta_model(CONFIG).state_dict())


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 10, 1024

    monkeypatch.setattr(tensor_files.os, "statvfs", lambda path: Full)
    with pytest.raises(OSError, match="GB free, the checkpoint needs"):
        synthetic.write_checkpoint(CONFIG, tmp_path, progress=False)
    assert not list(tmp_path.glob("model*"))


def test_true_size_counts():
    config = synthetic.deepseek_v2_lite()
    result = estimate(config, rank=8, tokens=4096, logits_per_row=128, cpu_rate=4e12, bandwidth=1e11)
    assert result.host["expert weights"] == 26 * 64 * 3 * 2048 * 1408 * 2
    assert sum(p.numel() for p in meta_model(config).parameters()) == pytest.approx(15.7e9, rel=0.01)
    lora = 26 * 64 * 8 * (2048 + 2816 + 1408 + 2048)
    assert result.host["expert adapters, gradients, moments"] == 16 * lora
    assert result.gpu_bytes < 6e9
    assert result.host_bytes < 1.15 * result.host["expert weights"] + 16 * lora + 5e9
    assert "tokens/s" in str(result)
    assert result.seconds["routed experts"] == pytest.approx(4096 * 26 * 6 * 4 * 3 * 2048 * 1408 / 4e12, rel=0.05)


def test_all_on_the_host_and_adapters_on_the_gpu():
    options = {"cpu_rate": 1e12, "bandwidth": 1e11}
    alone = estimate(CONFIG, gpu=False, **options)
    assert not alone.gpu and "other weights" in alone.host and "copies" not in alone.seconds
    on_gpu = estimate(CONFIG, lora_device="cuda", **options)
    assert "expert adapters, gradients, moments" in on_gpu.gpu


def test_streamed_experts():
    """Streamed experts are sent twice a step and save nothing for backward; experts with few rows stay on the CPU."""
    config = synthetic.deepseek_v2_lite()
    options = {"rank": 8, "tokens": 4096, "logits_per_row": 129, "cpu_rate": 5e12, "bandwidth": 1e11, "bus": 25e9}
    on_cpu, streamed, few = (estimate(config, **options, stream_rows=rows) for rows in (None, 384, 385))
    assert (few.host, few.gpu, few.seconds) == (on_cpu.host, on_cpu.gpu, on_cpu.seconds)
    weights = 26 * 64 * 3 * 2048 * 1408 * 2
    assert streamed.seconds["routed experts"] == pytest.approx(2 * weights / (0.8 * 25e9) + 2 * 26 * QUEUEING)
    less = on_cpu.host["experts' saved activations"] - streamed.host["experts' saved activations"]
    assert less == 26 * 2 * 4096 * 6 * (2 * 1408 + 4 * 8)
    assert streamed.gpu_bytes == on_cpu.gpu_bytes, "these logits are larger"
    long, short = (estimate(config, **options | {"logits_per_row": n}, stream_rows=1) for n in (129, 1))
    groups = 2 * 15 * (weights // (26 * 64))  # two, of as many experts as are not larger than 2^28 bytes
    assert groups < short.gpu[STREAMED] < 1.1e9 < long.gpu[STREAMED] and STREAMED not in on_cpu.gpu
    assert on_cpu.break_even == break_even_rows(5e12, 25e9, 1e11) == 250 and on_cpu.rows == 384
    assert "an expert with 250 rows or more is faster on the GPU (stream_rows); here one has 384" in str(on_cpu)
    for nothing in (
        estimate(config, **options, gpu=False, stream_rows=1),
        estimate(config, **options, finetuning="full"),
    ):
        assert nothing.break_even is None and STREAMED not in nothing.gpu
    with pytest.raises(ValueError, match="stream_rows: got 8 with finetuning='full'"):
        estimate(config, finetuning="full", stream_rows=8)


def test_at_the_break_even_both_ways_take_as_long():
    options = {"rank": 1, "tokens": 640, "logits_per_row": 1, "bandwidth": 1e12, "bus": 25e9, "gpu_rate": 1e15}
    rate = stream_rate(25e9, 1e12)
    assert rate == stream_rate(1e12, 25e9) == 0.8 * 25e9, "the slower of the two"
    rows = 640 * 6 // 64
    on_cpu, streamed = (
        estimate(synthetic.deepseek_v2_lite(), cpu_rate=rows * rate, stream_rows=n, **options) for n in (None, 1)
    )
    sending = streamed.seconds["routed experts"] - 2 * 26 * QUEUEING
    assert on_cpu.seconds["routed experts"] == pytest.approx(sending, rel=0.01)
    assert break_even_rows(0.999 * rows * rate, 25e9, 1e12) == rows


def test_the_recorded_run_took_what_the_formulas_say():
    """At true size, on a real GPU: host and GPU within 5 percent, seconds within 15."""
    recorded = json.loads(RECORDED.read_text())
    machine, parts = recorded["machine"], recorded["parts"]
    rates = {"cpu_rate": machine["bf16_rate"], "bandwidth": machine["bandwidth"]}
    rates["bus"] = machine["h2d_bytes_per_second"]
    for part, logits, rows in (("run_main", 129, None), ("streamed", 129, 1), ("all_logits", 512, None)):
        options = {"rank": 8, "tokens": 4096, "logits_per_row": logits, "stream_rows": rows}
        said, took = estimate(synthetic.deepseek_v2_lite(), **options, **rates), parts[part]
        if "tokens_per_second" in took:
            assert took["tokens_per_second"] == pytest.approx(said.tokens_per_second, rel=0.15)
        assert took["host_peak"] == pytest.approx(said.host_bytes, rel=0.05)
        assert took["gpu_used_with_context"] == pytest.approx(said.gpu_bytes, rel=0.05)


def test_pinned_buffers_are_powers_of_two():
    assert staging_bytes(4096, 6, 2048) == 2 * 2**24 + 2**17
    assert staging_bytes(5, 2, 3) == 32 + 32 + 64


@pytest.mark.parametrize("file", sorted(PARAMS.glob("*.yaml")), ids=lambda file: file.stem)
def test_parameter_files_say_what_the_formulas_say(file):
    said = file.read_text()
    model = meta_model(synthetic.published_config(file.stem))
    fast, slow = (estimate(model, cpu_rate=f, bandwidth=b, bus=PCIE) for f, b in ((5e12, 1e11), (0.6e12, 2e10)))
    streamed = estimate(model, cpu_rate=5e12, bandwidth=1e11, bus=PCIE, stream_rows=1)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f} billion parameters" in said
    assert f"{fast.host_bytes / 1e9:.0f} GB of host memory, {fast.gpu_bytes / 1e9:.0f} GB of GPU memory" in said
    assert f"{fast.tokens_per_second:.0f} tokens/s at 5 TFLOP/s" in said
    assert f"{slow.tokens_per_second:.0f} at 0.6 TFLOP/s" in said
    assert f"{streamed.tokens_per_second:.0f} with all experts streamed over PCIe 4" in said
    assert f"faster from {fast.break_even} and {slow.break_even} rows on" in said
    assert f"an expert has {fast.rows:.0f}" in said


def test_an_unknown_published_config_is_refused():
    with pytest.raises(ValueError, match="name: got 'gpt', needs one of deepseek_v2_lite, "):
        synthetic.published_config("gpt")


def test_models_do_not_share_the_config_they_were_made_from():
    first, second = (
        synthetic.random_model(CONFIG, experts_implementation=e, progress=False) for e in ("ktlib", "eager")
    )
    assert first.config._experts_implementation == "ktlib" and second.config._experts_implementation == "eager"


def test_families_of_other_names_and_layouts():
    """Transposed weights, another name for top_k, a model without routed experts."""
    options = {"rank": 2, "tokens": 10, "sequence_length": 10, "gpu": False, "timing": False}
    model = meta_model(tiny_config("gpt_oss", hidden_size=96))
    assert estimate(model, **options).host["experts' saved activations"] == 2 * saved_bytes(10, 2, 96, 48, 2)
    gemma = Gemma4TextConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, enable_moe_block=True, num_experts=8, top_k_experts=3,
        moe_intermediate_size=32, layer_types=["full_attention"],
    )  # fmt: skip
    assert estimate(gemma, **options).host["experts' saved activations"] == saved_bytes(10, 3, 64, 32, 2)
    dense = estimate(Qwen3Config(vocab_size=99, hidden_size=64, num_hidden_layers=2), **options | {"timing": True})
    assert dense.host["expert weights"] == 0 < dense.host["other weights"] and dense.seconds["the rest"] > 0


def test_what_does_not_fit_is_refused_with_numbers():
    big = Estimate(host={"expert weights": 30e9}, gpu={"other weights": 5e9}, seconds={"all": 1.0}, tokens=1)
    assert big.check(40e9, 8e9) is big
    with pytest.raises(MemoryError, match=r"needs 31.5 GB of host memory, 16.0 GB are free"):
        big.check(16e9, 8e9)
    with pytest.raises(MemoryError, match=r"needs 5.2 GB of GPU memory, 4.0 GB are free"):
        big.check(40e9, 4e9)


def test_experts_in_fp8_have_the_spread_of_bf16_ones(tmp_path):
    model = load(synthetic.write_checkpoint(CONFIG, tmp_path, progress=False, fp8_experts=True))
    weight = model.model.layers[1].mlp.experts.gate_up_proj
    assert weight.source.format == "e4m3" and weight.decoded().isfinite().all()
    plain = synthetic.random_model(CONFIG, progress=False).model.layers[1].mlp.experts.gate_up_proj
    assert weight.decoded().float().std().item() == pytest.approx(plain.float().std().item(), rel=0.02)
    pool = synthetic._fp8_pool(torch.tensor([9.0, -9.0, 0.0, 0.02]), 0.02)  # beyond what e4m3 can hold
    assert pool.float().tolist() == [448.0, -448.0, 0.0, 96.0]
