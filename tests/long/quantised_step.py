"""A training step of a model of true size whose experts are codes, on a CPU, and the memory that it takes.

    python tests/long/quantised_step.py --model qwen3_30b_a3b --folder DISK     50 GB on the disk, an hour on two cores
    python tests/long/quantised_step.py --tiny                                  the same with a small model, in a minute

It writes a checkpoint with pseudo-random experts in FP8 (none of the real model is needed), makes the quantised one
as `ktlib fuse --quantise` does, and runs two LoRA steps in a child process. Checkpoints that the folder already has are
used. Prints one JSON object. ``resident`` counts all memory of the process, also the pages of mapped files.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.lab import synthetic
from ktlib.runs.versions import facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_30b_a3b", help="as in ktlib.lab.synthetic.published_config")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--step", type=Path, help="only the step, with the checkpoint in this folder")
    options = parser.parse_args()
    if options.step:
        print("MEASURED", json.dumps(step(options.step, options.tokens)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        config = synthetic.deepseek_v2_small() if options.tiny else synthetic.published_config(options.model)
        source = synthetic.write_checkpoint(config, folder / "fp8", fp8_experts=True)
        start = time.perf_counter()
        made = fuse_checkpoint(source, folder / options.format, quantise=options.format)
        seconds = time.perf_counter() - start
        report = json.loads((made / "quantise_report.json").read_text())
        print(
            json.dumps(
                {
                    **facts(),
                    **about(options, made),
                    "fuse_s": round(seconds),
                    "report": report["mean"],
                    **run(made, options),
                },
                indent=1,
            )
        )


def about(options, made):
    shown = [argument for argument in sys.argv[1:] if argument != str(options.folder)]
    return {
        "command": " ".join(["python tests/long/quantised_step.py", *shown]).replace("--folder", "--folder DISK"),
        "checkpoint_gb": round(sum(file.stat().st_size for file in made.glob("*.safetensors")) / 1e9, 2),
    }


def run(folder, options):
    command = [sys.executable, __file__, "--step", str(folder), "--tokens", str(options.tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.rpartition("MEASURED")[2])


def step(folder, count):
    """Load, one LoRA step of ``count`` tokens with gradient checkpointing, a second one; seconds and gigabytes."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import ktlib
    from ktlib.integrations.stored_weight import quantised_format

    times, memory = {}, {}

    def measured(name, function):
        start = time.perf_counter()
        result = function()
        times[name] = round(time.perf_counter() - start, 2)
        memory[name] = {"resident": _status("VmRSS"), "anonymous": _status("RssAnon"), "peak": _status("VmHWM")}
        return result

    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", experts_implementation="ktlib")  # noqa: E731
    model = measured("load", load)
    torch.manual_seed(0)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = measured("adapters", lambda: get_peft_model(model, ktlib.lora_config(model, r=8)).train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(1000, (1, count))

    def train():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [measured(name, train) for name in ("first step", "second step")]
    return {
        "experts": quantised_format(model), "tokens": count, "losses": [round(loss, 4) for loss in losses],
        "seconds": times, "gb": memory, "peak_resident_gb": _status("VmHWM"),
    }  # fmt: skip


def _status(name):
    text = Path("/proc/self/status").read_text()
    return round(int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 / 1e9, 3)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
