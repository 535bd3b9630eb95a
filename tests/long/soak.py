"""A long fine-tuning run that is interrupted twice, its memory watched; or many steps of the bare operator.

    python tests/long/soak.py                      1,000 steps of the embedded model, a checkpoint every 50: 10 minutes
    python tests/long/soak.py --operator 10000     10,000 steps of the operator alone: a minute
    python tests/long/soak.py --steps 20 --every 5, or --operator 2000 --seconds 10: as in tests/operator/test_soak.py

Prints one JSON object; exit code 1 if a loss is not finite, a gradient wrong, or memory grows.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time

import psutil
import torch
from transformers import TrainerCallback

import ktlib
from ktlib.lab.validation import random_layer
from ktlib.runs.versions import facts
from ktlib.training import sft
from ktlib.training.tasks import dates

MIB = 2**20


def memory():
    return psutil.Process().memory_info().rss / MIB


class Watch(TrainerCallback):
    """Notes resident memory at every step, and dies like a killed process at one of them."""

    def __init__(self, die_at, pipe):
        self.die_at, self.pipe = die_at, pipe

    def on_step_end(self, args, state, control, **_):
        self.pipe.send((state.global_step, memory()))
        if state.global_step == self.die_at:
            os._exit(9)


def session(folder, steps, every, die_at, pipe):
    """Train from the last checkpoint to the end, or to ``die_at``."""
    torch.set_num_threads(1)  # steps this small are fastest so, above all where cores are shared
    model, tokenizer = sft.load_model("base")
    model = sft.add_lora(model, rank=8, alpha=16)
    rows = dates(n_train=4000, n_test=8)[0]
    options = {"steps": steps, "save_every": every, "batch_size": 8, "sequence_length": 64, "progress": False}
    result = sft.train(model, tokenizer, rows, folder, **options, callbacks=[Watch(die_at, pipe)])
    pipe.send((result["resumed_from"], [float(entry["loss"]) for entry in result["log"]]))


def fine_tuning(steps, every):
    """One session to a third of the steps, one to two thirds, one to the end, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    sessions = []
    with tempfile.TemporaryDirectory() as folder:
        for die_at in (steps // 3 + 1, 2 * steps // 3 + 1, None):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=session, args=(folder, steps, every, die_at, theirs))
            process.start()
            theirs.close()
            notes = []
            while True:
                try:
                    notes.append(ours.recv())
                except EOFError:
                    break
            process.join()
            if process.exitcode != (0 if die_at is None else 9):
                raise SystemExit(f"a session ended with {process.exitcode}")
            sessions.append(notes)
    resumed, losses = sessions[-1].pop()
    rows = [
        {"first_step": notes[0][0], "last_step": notes[-1][0], **growth([size for _, size in notes])}
        for notes in sessions
    ]
    finite = len(losses) == steps and all(map(math.isfinite, losses))
    good = finite and all(row["flat"] for row in rows)
    ends = {"first_loss": sum(losses[:10]) / 10, "last_loss": sum(losses[-10:]) / 10}
    return good, {"steps": len(losses), "finite": finite, **ends, "last_resumed_from": resumed, "sessions": rows}


def growth(sizes, allowed=0.03):
    """Memory after a warm-up of a fifth, and the mean of the last tenth compared with the tenth after the warm-up."""
    tenth = max(1, len(sizes) // 10)
    begin = len(sizes) // 5
    early, late = (sum(part) / len(part) for part in (sizes[begin : begin + tenth], sizes[-tenth:]))
    return {
        "rss_early_mib": early,
        "rss_late_mib": late,
        "rss_peak_mib": max(sizes),
        "flat": late <= early * (1 + allowed),
    }


def operator(steps, seconds):
    """Forward and backward of small layers of changing size, until ``steps`` or ``seconds`` are over."""
    torch.set_num_threads(1)
    layers = [
        random_layer("trained", tokens=tokens, experts=4, top_k=2, hidden=64, intermediate=96, rank=3)
        for tokens in (1, 7, 30)
    ]
    sizes, until, finite = [], time.monotonic() + seconds, True
    for step in range(steps):
        layer = layers[step % len(layers)]
        leaf = layer["hidden_states"].clone().requires_grad_()
        lora = {}
        for name in ("gate_up_lora", "down_lora"):
            a, b, scaling = layer[name]
            lora[name] = (a.clone().requires_grad_(), b.clone().requires_grad_(), scaling)
        ktlib.moe_experts(**(layer | lora | {"hidden_states": leaf})).sum().backward()
        finite = finite and bool(leaf.grad.isfinite().all())
        if step % 20 == 0:
            sizes.append(memory())
        if time.monotonic() > until:
            break
    row = growth(sizes, allowed=0.01)
    return finite and row["flat"], {"steps": step + 1, "finite": finite, **row}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--operator", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    if arguments.operator:
        good, result = operator(arguments.operator, arguments.seconds)
    else:
        good, result = fine_tuning(arguments.steps, arguments.every)
    command = " ".join(["python tests/long/soak.py", *sys.argv[1:]])
    head = {"command": command, "date": time.strftime("%Y-%m-%d"), **facts()}
    print(json.dumps(head | result | {"good": good, "seconds": round(time.monotonic() - began)}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
