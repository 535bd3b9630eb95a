"""Kill a fine-tuning run at seeded moments, start the same command again each time, and compare the adapter's bits.

    python tests/long/interrupted.py            ten kills of `ktlib sft` and of making a base model: 15 minutes
    python tests/long/interrupted.py --small    four kills of a very short run (tests/training/test_interrupted.py)

Prints one JSON object; exit code 1 if any adapter differs from that of the run that was left alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from ktlib.files.ownership import TEMPORARY
from ktlib.lab import base_model
from ktlib.runs.repeat import digest
from ktlib.runs.versions import facts
from ktlib.training import sft
from ktlib.training.resume import CHECKPOINTS, complete_checkpoint
from ktlib.training.tasks import dates

KERNEL = "the kernel alone"
MADE = f"{TEMPORARY}*/made"
PARTIAL = {"a checkpoint": f"{MADE}/checkpoint-*", "the adapter": f"{MADE}/*.safetensors"}


def fine_tune(folder):
    """A whole, very short run in this process."""
    torch.set_num_threads(1)
    model, tokenizer = sft.load_model("base")
    model = sft.add_lora(model, rank=4, alpha=8)
    rows = dates(n_train=64, n_test=8)[0]
    sft.train(model, tokenizer, rows, folder, steps=12, batch_size=4, sequence_length=64, save_every=2, progress=False)
    sft.save(model, folder)


def forked(function, *arguments):
    """Run a function in a child, as a process that can be killed; torch is imported already."""

    def start():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                function(*arguments)
                code = 0
            finally:
                os._exit(code)
        return psutil.Process(pid)

    return start


def command(*arguments):
    """Run ``python -m ktlib.MODULE ...``, likewise."""
    log = open(os.devnull, "wb")
    return lambda: psutil.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log)


def kill(process, only_kernel=False):
    """SIGKILL to the process and its children, or as the system does when memory runs out: to the largest of them."""
    children = process.children(recursive=True)
    victims = sorted(children, key=lambda child: child.memory_info().rss)[-1:] if only_kernel else [*children, process]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)


def interrupted(start, folder, partial, delay, **how):
    """Start it and kill it ``delay`` seconds after something matches ``partial`` in ``folder`` (None: after the start).

    Returns whether the kill came before the end.
    """
    process, began = start(), time.monotonic()
    while partial and not any(folder.glob(partial)):
        if ended(process):
            return False
        time.sleep(0.0005)
    if partial:
        began = time.monotonic()
    while time.monotonic() - began < delay:
        time.sleep(0.001)
    if ended(process):
        return False
    kill(process, **how)
    process.wait()
    return True


def ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def whole(start):
    """Run it to its end; returns the seconds that it took."""
    process, began = start(), time.monotonic()
    if code := process.wait():
        raise SystemExit(f"a run that nobody interrupted ended with {code}")
    return time.monotonic() - began


def kills(start, folder, expected, moments):
    """Kill and start again, once per moment; then let it end. One dict per kill.

    Where the run comes to its end before the moment does, its adapter is compared and the moment is tried on a new run.
    """
    rows = []
    for name, partial, delay, how in moments:
        while not interrupted(start, folder, partial, delay, **how):
            if digest(folder) != expected:
                raise SystemExit(f"another adapter after {rows}")
            shutil.rmtree(folder)
        found = complete_checkpoint(folder / CHECKPOINTS)
        rows.append({"during": name, "after_s": round(delay, 3), "resumes_from": found[1] if found else 0})
    whole(start)
    return rows


def moments(rng, seconds, counts):
    """A list of (name, pattern to wait for or None, delay, options of kill), in random order."""
    made = []
    for name, count in counts.items():
        for _ in range(count):
            if name in PARTIAL:
                made.append((f"saving {name}", PARTIAL[name], rng.uniform(0, 0.01), {}))
            else:
                made.append((name, None, rng.uniform(*seconds), {"only_kernel": name == KERNEL}))
    rng.shuffle(made)
    return made


def base_models(start, folder, pattern, delay):
    """Kill the making of a base model while its checkpoint is written; returns the row, or exits if bits differ."""
    whole(start(folder / "whole"))
    while not interrupted(start(folder / "cut"), folder, pattern, delay):
        shutil.rmtree(folder / "cut")
    if (folder / "cut").exists():
        raise SystemExit("a base model that was not finished has its final name")
    whole(start(folder / "cut"))
    same = digest(folder / "whole") == digest(folder / "cut") and not list(folder.glob(".*"))
    return {"during": "making a base model", "after_s": round(delay, 3), "same_bits": same}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    rng, began = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.small:
            left_alone, cut = (forked(fine_tune, folder / name) for name in ("whole", "cut"))
            base_model.pretrain = lambda *_: [0.0]  # 20 seconds a step; what is interrupted here is what comes after

            def make(out):
                return forked(base_model.make, out, 1)

            counts = {"any moment": 1, "a checkpoint": 1, "the adapter": 1}
        else:

            def run(name):
                parameters = ["steps=300", f"output_dir={folder / name}"]
                pairs = [word for pair in parameters for word in ("--param", pair)]
                return command("ktlib.cli", "sft", "--out", str(folder / "runs"), "--name", name, *pairs)

            left_alone, cut = run("whole"), run("cut")

            def make(out):
                return command("ktlib.lab.base_model", str(out), "--steps", "3")

            counts = {"any moment": 3, KERNEL: 2, "a checkpoint": 2, "the adapter": 2}
        seconds = whole(left_alone)
        expected = digest(folder / "whole")
        when = moments(rng, (0.3 * seconds, 0.8 * seconds), counts)
        rows = kills(cut, folder / "cut", expected, when)
        same = digest(folder / "cut") == expected
        left = sorted(path.name for path in (folder / "cut").iterdir())
        (folder / "models").mkdir()
        rows.append(base_models(make, folder / "models", f"{TEMPORARY}*", rng.uniform(0, 0.01)))
    good = (
        same
        and rows[-1]["same_bits"]
        and not [name for name in left if name.startswith(TEMPORARY) or name == CHECKPOINTS]
    )
    result = {
        "command": "python " + " ".join(["tests/long/interrupted.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        **facts(),
        "kills": rows,
        "same_adapter_bits": same,
        "files_left": left,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
