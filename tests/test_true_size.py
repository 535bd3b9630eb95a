"""The measurement at true size: it runs (small, on the CPU), what is recorded of it is complete, README quotes that."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    "machine": {"gpu"},
    "run_main": {"gpu_peak_reserved", "gpu_used_with_context"},
    "all_logits": {"seconds", "gpu_peak_reserved", "host_peak"},
    "adapters_on_gpu": {"log", "loss_cpu", "loss_cuda", "gpu_peak_reserved", "host_peak"},
    "stock_experts": {"gpu_peak_reserved"},
    "streamed": {
        "stream_rows",
        "losses",
        "seconds",
        "tokens_per_second",
        "finite",
        "gpu_used_with_context",
        "host_peak",
        "layer_seconds",
        "weights_bytes_per_second",
    },
    "streamed_timeline": {"step_seconds", "shares", "spans"},
}
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
    assert "options" in result and "table" in parts["audit_adapter"], "the result itself was changed"


def test_readme_numbers_of_the_hybrid_run_are_the_recorded_ones():
    recorded = json.loads(RECORDED.read_text())
    main, weights, kept = (recorded["parts"]["run_main"], recorded["parts"]["weights"], recorded["estimate"]["host"])
    rate, gpu, host = main["tokens_per_second"], main["gpu_used_with_context"] / 1e9, main["host_peak"] / 1e9
    bar = 1.15 * weights["expert_bytes"] + kept["experts' saved activations"]
    bar = (bar + kept["expert adapters, gradients, moments"]) / 1e9
    stock = recorded["parts"]["stock_experts"]["tokens_per_second"]
    reserved, experts = main["gpu_peak_reserved"] / 1e9, weights["expert_bytes"] / 1e9

    def verdict(met):
        return "met" if met else "missed"

    streamed = recorded["parts"]["streamed"]
    fast, gpu_then = streamed["tokens_per_second"], streamed["gpu_used_with_context"] / 1e9
    host_then = streamed["host_peak"] / 1e9
    rounding = recorded["parts"]["reduced"]["largest_difference"]
    ours, stocks = rounding["hybrid, experts streamed to the GPU"], rounding["stock, all on the GPU"]
    sentences = (
        f"{rate:.0f} tokens/s, {reserved:.1f} GB of GPU memory reserved by torch ({gpu:.1f} GB with CUDA's context), "
        f"{host:.1f} GB of host memory, of which {experts:.1f} GB are the experts.",
        f"Stock PEFT's experts on the same CPU in the same run: {stock:.0f} tokens/s.",
        f"With experts streamed to the GPU in the same run: {fast:.0f} tokens/s, {gpu_then:.2f} GB of GPU memory with "
        f"CUDA's context, {host_then:.1f} GB of host memory.",
        f"Goals: at least 1060 tokens/s ({verdict(rate >= 1060)}; streamed: {verdict(fast >= 1060)}), at most 6 GB of "
        f"GPU memory with CUDA's context ({verdict(max(gpu, gpu_then) <= 6)}), at most {bar:.1f} GB of host memory "
        f"({verdict(max(host, host_then) <= bar)}).",
        f"At reduced depth the loss stays within {ours:.3f} of stock in fp32 for twelve steps, that of stock in bf16 "
        f"within {stocks:.3f}.",
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    for sentence in sentences:
        assert sentence in readme, f"README should say: {sentence}"
