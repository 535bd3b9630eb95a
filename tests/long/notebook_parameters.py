"""Run the notebooks with random valid parameters: each run must reach the end, or refuse a combination by name.

    python tests/long/notebook_parameters.py                  twelve sets for each notebook, an hour on two cores
    python tests/long/notebook_parameters.py --sets 1 --only 02 07

Every finished run is written to ``--out``, and runs that are there already are not repeated, so that an interrupted
sweep goes on where it stopped. Prints one JSON object; exit code 1 if a run failed.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from ktlib.files import ownership
from ktlib.lab.inits import INITS
from ktlib.lab.quantised_bases import BASES
from ktlib.runs import notebooks
from ktlib.runs.versions import facts
from ktlib.training.tasks import dates

OUT = Path("build/notebook_parameters.json")


def log_uniform(choose, low, high):
    return float(f"{10 ** choose.uniform(low, high):.2g}")


def environment(choose, folder):
    models = {}
    for i in range(choose.randint(1, 4)):
        experts = choose.randint(1, 300)
        sizes = [choose.randint(1, 60), experts, choose.randint(1, experts), choose.randint(1, 8000)]
        models[f"model {i}"] = [*sizes, choose.randint(1, 20000)]
    return {"models": models, "megabytes": choose.randint(64, 400)}


def kernel_validation(choose, folder):
    experts = choose.randint(1, 12)
    sizes = {"tokens": choose.randint(1, 40), "experts": experts, "top_k": choose.randint(1, min(experts, 8))}
    sizes |= {"hidden": choose.randint(1, 200), "intermediate": choose.randint(1, 150), "rank": choose.randint(1, 20)}
    return sizes | {"seed": choose.randrange(2**32)}


def kernel_performance(choose, folder):
    tokens = sorted(choose.sample(range(1, 600), choose.randint(1, 3)))
    return {
        "shape": choose.choice(["small", "tiny"]), "tokens": " ".join(map(str, tokens)), "rank": choose.randint(1, 32),
        "repeat": choose.randint(1, 2), "budget": log_uniform(choose, -1, 0),
    }  # fmt: skip


def dataset(choose, folder):
    """A built-in task, or a file of a few rows."""
    file = Path(folder) / "rows.jsonl"
    rows = dates(n_train=choose.randint(2, 12), n_test=1, seed=choose.randrange(100))[0]
    file.write_text("\n".join(map(json.dumps, rows)))
    return choose.choice(["dates", "codebook", str(file)])


def lora_init_sensitivity(choose, folder):
    return {
        "rank": choose.randint(1, 32), "scale_of_b": log_uniform(choose, -6, 0),
        "train_inits": choose.sample(list(INITS), choose.randint(1, 4)),
        "learning_rates": sorted({log_uniform(choose, -6, 0) for _ in range(choose.randint(1, 3))}),
        "seeds": choose.sample(range(2**32), choose.randint(1, 2)), "steps": choose.choice([1, 2, 5, 45]),
        "batch_size": choose.randint(1, 4), "dataset": dataset(choose, folder),
    }  # fmt: skip


def full_sft(choose, folder):
    return {
        "dataset": dataset(choose, folder), "rank": choose.randint(1, 32), "alpha": log_uniform(choose, -1, 2),
        "targets": choose.choice(["all", "attention", "experts", "attention+experts", "shared+dense"]),
        "lora_dtype": choose.choice(["fp32", "bf16"]), "lora_dropout": choose.choice([0.0, 0.2]),
        "steps": choose.randint(1, 12), "batch_size": choose.randint(1, 6), "grad_accumulation": choose.randint(1, 2),
        "learning_rate": log_uniform(choose, -5, -2), "seed": choose.randrange(2**32),
        "gradient_checkpointing": choose.random() < 0.5,
    }  # fmt: skip


def adapter_audit(choose, folder):
    steps = choose.randint(1, 6)
    return {
        "dataset": dataset(choose, folder), "rank": choose.randint(1, 32), "steps": steps,
        "batch_size": choose.randint(1, 6), "poison_step": choose.randint(1, steps),
        "poison_layer": choose.randint(1, 3), "poison_expert": choose.randint(0, 15), "seed": choose.randrange(2**32),
    }  # fmt: skip


def failure_museum(choose, folder):
    return {
        "depth": choose.randint(2, 15), "layers": choose.randint(2, 10), "routed_linears": choose.randint(1, 10),
        "rank": choose.choice([1, 2, 3, 5, 8, 16, 64, 200]), "seed": choose.randrange(2**32),
    }  # fmt: skip


def hybrid_training(choose, folder):
    length = choose.randint(1, 4096)
    return {
        "tokens": length * choose.randint(1, 64), "sequence_length": length, "rank": choose.randint(1, 256),
        "cpu_rate": log_uniform(choose, 9, 16), "bandwidth": log_uniform(choose, 8, 13),
    }  # fmt: skip


def hybrid_step(choose, folder):
    length = choose.randint(2, 64)
    return {
        "layers": choose.randint(2, 5), "hidden": 8 * choose.randint(1, 37), "experts": choose.randint(6, 24),
        "intermediate": 8 * choose.randint(1, 25), "tokens": length * choose.randint(1, 6), "length": length,
        "response": choose.randint(1, length - 1), "rank": choose.randint(1, 24), "steps": choose.randint(1, 4),
        "learning_rate": log_uniform(choose, -5, 0), "device": choose.choice(["auto", "cpu"]),
        "seed": choose.randrange(2**32),
    }  # fmt: skip


def compare_runs(choose, folder):
    metric = choose.choice(["after", "before", "final_loss", "rank", "learning_rate", "steps"])
    return {"metric": metric, "higher_is_better": choose.random() < 0.5, "curve": choose.choice(["", "losses"])}


def which_adapters_matter(choose, folder):
    return {
        "tasks": choose.sample(["dates", "codebook"], choose.randint(1, 2)), "seeds": choose.randint(1, 2),
        "seed": choose.randrange(2**32 - 1), "steps": choose.randint(1, 4), "dropout_steps": choose.randint(3, 6),
    }  # fmt: skip


def quantised_bases(choose, folder):
    tokens = sorted(choose.sample(range(1, 200), choose.randint(1, 3)))
    return {
        "bases": choose.sample(list(BASES), choose.randint(1, 3)), "seeds": choose.randint(1, 2),
        "seed": choose.randrange(2**32 - 1), "steps": choose.randint(1, 4), "prompts": choose.randint(1, 9),
        "tokens": " ".join(map(str, tokens)), "budget": log_uniform(choose, -2, -1),
    }  # fmt: skip


DRAWS = (environment, kernel_validation, kernel_performance, lora_init_sensitivity, full_sft, adapter_audit,
         failure_museum, hybrid_training, compare_runs, which_adapters_matter, hybrid_step,
         quantised_bases)  # fmt: skip
NOTEBOOKS = {notebook: draw for draw in DRAWS for notebook in notebooks.NOTEBOOKS.glob(f"*_{draw.__name__}.ipynb")}
REFUSED = re.compile(r"cell \d+: ValueError: poison_expert: got \d+, needs an expert of layer")  # nobody knows before


def outcome(error):
    """What became of a run that ended with ``error``."""
    return "ran" if error is None else "refused" if REFUSED.match(error) else "FAILED"


def sweep(numbers, sets, seconds, seed, out):
    """Every run, those that ``out`` holds included: dicts with notebook, set, outcome, parameters, error, seconds."""
    done = json.loads(out.read_text()) if out.exists() else []
    before = {(run["notebook"], run["set"], run["seed"]) for run in done}
    until = time.monotonic() + seconds
    todo = [(number, notebook) for number in range(sets) for notebook in sorted(NOTEBOOKS)]
    for number, notebook in todo:
        if notebook.name[:2] not in numbers or (notebook.stem, number, seed) in before or time.monotonic() > until:
            continue
        with tempfile.TemporaryDirectory() as folder:
            drawn = NOTEBOOKS[notebook](random.Random(f"{seed} {notebook.stem} {number}"), folder)
            parameters = notebooks.with_output_dir(notebook, drawn, folder)
            began = time.monotonic()
            try:
                error = notebooks.run(notebook, Path(folder) / "run", parameters, progress=False, quiet=True).error
            except (ValueError, MemoryError) as refusal:  # before a kernel was started
                error = str(refusal)
        run = {"notebook": notebook.stem, "set": number, "seed": seed, "outcome": outcome(error), "parameters": drawn}
        done.append(run | {"error": error, "seconds": round(time.monotonic() - began)})
        out.parent.mkdir(parents=True, exist_ok=True)
        ownership.write_text(out, json.dumps(done, indent=1), "--out", replace=True)
        print(f"{run['outcome']:<8}{notebook.stem} {drawn}", file=sys.stderr, flush=True)
    return done


def summary(done):
    """Counts of outcomes by notebook, and each run that failed with its parameters."""
    names = sorted({run["notebook"] for run in done})
    kinds = ("ran", "refused", "FAILED")
    counts = {name: {kind: sum((r["notebook"], r["outcome"]) == (name, kind) for r in done) for kind in kinds}
              for name in names}  # fmt: skip
    failures = [{key: run[key] for key in ("notebook", "parameters", "error")} for run in done
                if run["outcome"] == "FAILED"]  # fmt: skip
    return {"runs": len(done), "counts": counts, "failures": failures, "seconds": sum(run["seconds"] for run in done)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=12, help="sets of parameters for each notebook")
    parser.add_argument("--only", nargs="+", default=[path.name[:2] for path in NOTEBOOKS], metavar="NUMBER")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help=f"where finished runs are kept, default: {OUT}")
    arguments = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = sweep(arguments.only, arguments.sets, arguments.seconds, arguments.seed, arguments.out)
    result = summary(done)
    command = " ".join(["python tests/long/notebook_parameters.py", *sys.argv[1:]])
    head = {"command": command, "date": time.strftime("%Y-%m-%d"), **facts()}
    print(json.dumps(head | result | {"good": not result["failures"]}, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
