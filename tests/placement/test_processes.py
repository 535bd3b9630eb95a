"""Data parallel training: two CPU processes under ``accelerate launch`` train as one, on one copy of the experts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ktlib.assets import BASE

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
import ktlib
from ktlib.integrations.stored_weight import StoredWeight

base, out, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, experts_implementation="ktlib")
torch.manual_seed(0)
model = ktlib.share_experts(get_peft_model(model, ktlib.lora_config(model, r=4)))
generator = torch.Generator().manual_seed(1)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 96, (32, 16), generator=generator)]
arguments = TrainingArguments(out, per_device_train_batch_size=batch, max_steps=6, learning_rate=1e-2, logging_steps=1,
    lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=0, save_strategy="no",
    remove_unused_columns=False, ddp_find_unused_parameters=False,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.remove_callback(PrinterCallback)
trainer.train()
experts = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
tensors = {name: p.source.codes if isinstance(p, StoredWeight) else [p] for name, p in experts.named_parameters()}
weights = {f"{name} {i}": [t.data_ptr(), t.nbytes] for name, found in tensors.items() for i, t in enumerate(found)}
result = {"losses": [float(e["loss"]) for e in trainer.state.log_history if "loss" in e], "weights": weights,
    "smaps": open("/proc/self/smaps").read(), "world": trainer.args.world_size,
    "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None}
torch.distributed.is_initialized() and torch.distributed.barrier()
open(f"{out}.{os.environ.get('RANK', '0')}.json", "w").write(json.dumps(result))
"""


def run(folder, base, processes, batch):
    """Results of every process of one run."""
    (folder / "train.py").write_text(SCRIPT)
    out = folder / f"run{processes}"
    launch = [sys.executable]
    if processes > 1:  # accelerate's --cpu wants MPI; --multi_gpu is its torchrun, and the script says what it runs on
        launch += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
        ]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, str(folder / "train.py"), str(base), str(out), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{out.name}.*.json"))]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    import ktlib

    fused = ktlib.fuse_checkpoint(BASE, folder / "fused", progress=False)
    (folder / "hub").mkdir()
    return run(folder, fused, 1, 8), run(folder, fused, 2, 4), fused, run(folder / "hub", BASE, 2, 4)


@pytest.mark.compatible("`accelerate launch`, two CPU processes, one copy of the experts")
def test_two_processes_train_as_one(results):
    (alone,), both, _, mapped = results
    assert alone["world"] == 1 and [one["world"] for one in both] == [2, 2] and both[0]["backend"] == "gloo"
    assert len(alone["losses"]) == 6 and alone["losses"][-1] < 0.9 * alone["losses"][0]
    # the same rows in the same steps; what differs is the order of sums over halves of the batch
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=0.01)
    assert mapped[0]["losses"] == both[0]["losses"], "one tensor per expert trains to other numbers than fused experts"


@pytest.mark.compatible("`accelerate launch`, two CPU processes, one copy of the experts")
def test_the_experts_are_in_memory_once(results):
    """The pages of both processes are the file's: none was copied by reading, training, or distributing."""
    _, both, fused, _ = results
    for process in both:
        for name, (address, size) in process["weights"].items():
            path, private = mapping(process["smaps"], address)
            assert Path(path).parent == fused, f"{name} is not mapped from the checkpoint but from {path!r}"
            assert private == 0, f"{private} kB around {name} ({size} bytes) were copied by this process"


@pytest.mark.compatible("`accelerate launch`, two CPU processes, one copy of the experts")
def test_one_tensor_per_expert_is_in_memory_once_too(results):
    *_, mapped = results
    for process in mapped:
        found = {mapping(process["smaps"], address) for address, _ in process["weights"].values()}
        assert {Path(path).parent for path, _ in found} == {Path(BASE)}
        assert {private for _, private in found} == {0}, "pages of the experts were copied by this process"


def mapping(smaps, address):
    """``(path, kB of private dirty pages)`` of the mapping that holds an address."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        low, high = (int(text, 16) for text in block.split(" ", 1)[0].split("-"))
        if low <= address < high:
            line = block.split("\n")[0].split(maxsplit=5)
            return (line[5] if len(line) > 5 else ""), int(re.search(r"Private_Dirty:\s+(\d+)", block)[1])
    return "", -1
