"""The measurement at true size: it runs (small, on the CPU), what is recorded of it is complete, README quotes that."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import README, TEXT

from ktlib.estimate import estimate
from ktlib.lab import synthetic

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "true_size.py"
RECORDED = ROOT / "notebooks" / "recorded" / "hybrid_true_size.json"

# What notebook 08 reads, and what of it a run without a GPU has. Parts other than the first two may be missing.
NEEDED = {
    "machine": {"processor", "threads", "kernels", "torch", "transformers", "bf16_rate", "bandwidth"},
    "estimate": {"host", "gpu", "seconds", "tokens_per_second"},
    "weights": {"parameters", "expert_bytes"},
    "run_main": {"losses", "seconds", "tokens_per_second", "tokens_per_step", "finite", "placement", "host_peak",
                 "RssFile", "RssAnon", "RssShmem"},
    "step_timeline": {"step_seconds", "shares", "spans"},
    "audit_adapter": {"clean", "tensors", "bytes"},
    "stock_experts": {"log", "host_peak"},
    "reduced": {"layers", "curves"},
}  # fmt: skip
NEEDED_WITH_GPU = {
    "machine": {"gpu", "h2d_bytes_per_second", "d2h_bytes_per_second"},
    "run_main": {"gpu_peak_reserved", "gpu_used_with_context"},
    "all_logits": {"seconds", "gpu_peak_reserved", "host_peak"},
    "adapters_on_gpu": {"log", "loss_cpu", "loss_cuda", "gpu_peak_reserved", "host_peak"},
    "step_timeline": {"shared_experts_seconds"},
    "stock_experts": {"gpu_peak_reserved", "gpu_peak_allocated", "checkpointing"},
    "streamed": {"stream_rows", "losses", "seconds", "tokens_per_second", "finite", "gpu_used_with_context",
                 "gpu_peak_reserved", "host_peak", "layer_seconds", "weights_bytes_per_second"},
    "streamed_timeline": {"step_seconds", "shares", "spans"},
}  # fmt: skip
REQUIRED = {"weights", "run_main"}


def missing(result, needed):
    """``[part.key]`` that the notebook needs and ``result`` lacks; a part that says why it is missing lacks nothing."""
    found = []
    for name, keys in needed.items():
        part = result["parts"].get(name) or result.get(name, {})
        if name not in REQUIRED and ("skipped" in part or "error" in part):
            continue
        found += [f"{name}.{key}" for key in sorted(keys - part.keys())]
    return found


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("true_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recorded_run_has_what_the_notebook_reads():
    recorded = json.loads(RECORDED.read_text())
    assert missing(recorded, NEEDED) == missing(recorded, NEEDED_WITH_GPU) == []
    assert {"date", "command"} <= recorded["recorded"].keys()
    assert re.match(r"python tests/gpu/true_size\.py --out result\.json", recorded["recorded"]["command"])
    text = RECORDED.read_text()
    assert not re.search(r'"traceback"|/(tmp|root|home|work)/', text) and len(text) < 200_000


def test_it_runs_small_on_the_cpu_and_its_compact_form_has_the_same_keys(tmp_path, script):
    out, small = tmp_path / "result.json", tmp_path / "compact.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--steps", "4", "--in-memory"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "TQDM_DISABLE": "1"}
    done = subprocess.run([*command, "--out", str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert missing(result, NEEDED) == []
    assert result["parts"]["run_main"]["loss_fell_by"] > 0
    assert result["parts"]["reduced"]["largest_difference"]["stock, all on the CPU"] < 0.02
    small.write_text(json.dumps(script.compact(result)))
    assert missing(json.loads(small.read_text()), NEEDED) == []
    assert "--tiny" in json.loads(small.read_text())["recorded"]["command"]
    assert str(tmp_path) not in small.read_text()


def test_compact_joins_spans_and_drops_paths(script):
    spans = [[i * 1e-5, i * 1e-5 + 4e-6] for i in range(5000)] + [[1.0, 1.5]]
    parts = {
        "step_timeline": {"spans": {"GPU": spans, "optimizer": []}, "shares": {"GPU": 0.5}},
        "audit_adapter": {"table": "/tmp/x\ncomponent", "clean": True},
        "reduced": {"error": "OSError: full", "traceback": "..."},
    }
    options = {"out": "/elsewhere/out.json", "device": "cuda", "steps": "8", "in_memory": "True", "tokens": "4096"}
    result = {"recorded": {"date": "2026-01-01"}, "options": options, "parts": parts}
    small = script.compact(result)
    assert small["recorded"]["command"] == "python tests/gpu/true_size.py --out result.json --steps 8 --in-memory"
    assert small["parts"]["step_timeline"]["spans"] == {"GPU": [[0.0, 0.05], [1.0, 1.5]], "optimizer": []}
    assert small["parts"]["reduced"] == {"error": "OSError: full"} and "table" not in small["parts"]["audit_adapter"]
    assert small["others"] == []
    assert "options" in result and "table" in parts["audit_adapter"], "the result itself was changed"


def test_compact_keeps_speeds_and_peaks_of_other_runs(script):
    run = {"tokens_per_second": 5.0, "host_peak": 7, "gpu_used_with_context": 3}
    more = {"machine": {"bf16_rate": 1e12, "bandwidth": 2e10, "gpu": "G"}}
    more |= {"parts": {"run_main": run | {"losses": [1.0]}, "streamed": run | {"host_peak": 6}, "weights": {}}}
    small = script.compact({"recorded": {}, "options": {}, "parts": {}}, [more])
    rates = {"bf16_rate": 1e12, "bandwidth": 2e10}
    assert small["others"] == [rates | {"run_main": run, "streamed": run | {"host_peak": 6}}]


def test_the_numbers_of_the_hybrid_run_that_pages_say_are_the_recorded_ones():
    recorded = json.loads(RECORDED.read_text())
    parts, (slower,) = recorded["parts"], recorded["others"]
    main, streamed, stock, apart = (parts[name] for name in ("run_main", "streamed", "stock_experts", "reduced"))

    def host_bar(stream_rows):
        """GB: 1.15 times the experts, their optimizer state, and what they save for backward (less if streamed)."""
        shape = synthetic.deepseek_v2_lite()
        host = estimate(shape, logits_per_row=129, timing=False, stream_rows=stream_rows).host
        saved = host["experts' saved activations"] + host["expert adapters, gradients, moments"]
        return (1.15 * parts["weights"]["expert_bytes"] + saved) / 1e9

    def row(label, run, bar=None):
        gpu, host = run["gpu_used_with_context"] / 1e9, run["host_peak"] / 1e9
        told = f"| {label} | {run['tokens_per_second']:.0f} | {gpu:.2f} GB | {host:.2f} GB |"
        return told if bar is None else f"{told} {bar:.2f} GB, {verdict(host <= bar)} |"

    def verdict(*met):
        return "met" if all(met) else "missed"

    rates = (run["tokens_per_second"] >= 1060 for run in (main, streamed))
    on_cpu, on_gpu = map(verdict, rates)
    firsts = [run["tokens_per_step"] / run["seconds"][0] for run in (main, streamed)]
    distance, steps = apart["largest_difference"], len(apart["curves"]["hybrid, experts streamed to the GPU"]["losses"])
    lines = (
        f"The experts are {parts['weights']['expert_bytes'] / 1e9:.1f} GB of the host's memory",
        row("on the CPU", main, host_bar(None)),
        row(
            f"streamed to the GPU, `stream_rows={streamed['stream_rows']}`", streamed, host_bar(streamed["stream_rows"])
        ),
        row("stock PEFT and transformers, same CPU and run: one step, its first", stock),
        f"their own first steps made {firsts[0]:.0f} and {firsts[1]:.0f} tokens/s.",
        f"at least 1060 tokens/s, twice the higher published speed ({on_cpu} on the CPU, {on_gpu} streamed), at most "
        f"6 GB of GPU memory ({verdict(*(run['gpu_used_with_context'] <= 6e9 for run in (main, streamed)))})",
        f"On another machine of this kind, whose bf16 reached {slower['bf16_rate'] / 1e12:.1f} instead of "
        f"{recorded['machine']['bf16_rate'] / 1e12:.1f} TFLOP/s, the first two rows were "
        f"{slower['run_main']['tokens_per_second']:.0f} and {slower['streamed']['tokens_per_second']:.0f} tokens/s.",
        f"At reduced depth the loss stays within {distance['hybrid, experts streamed to the GPU']:.3f} of stock in "
        f"fp32 for {steps} steps, that of stock in bf16 within {distance['stock, all on the GPU']:.3f}.",
    )
    page = " ".join(TEXT.split())
    for line in lines:
        assert line in page, f"the page should say: {line}"
    label = f"streamed to the GPU, `stream_rows={streamed['stream_rows']}`"
    for line in (row("on the CPU", main), row(label, streamed)):
        assert line in README, f"README should say: {line}"
