"""Two GPUs are visible: a script trains on one, and processes that want one each are refused in one sentence."""

import json
import subprocess
import sys

import pytest
import torch
from support.models import tiny_model

import ktlib

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two GPUs, got {torch.cuda.device_count()}", allow_module_level=True)

TRAINER = """
import json, sys
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import ktlib

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, experts_implementation="ktlib")
ktlib.pin_experts(model)
model = get_peft_model(model, ktlib.lora_config(model, r=2))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 96, (8, 12))]
arguments = TrainingArguments(sys.argv[2], per_device_train_batch_size=2, max_steps=3, report_to=[], save_strategy="no",
    disable_tqdm=True)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
devices = {str(p.device) for name, p in model.named_parameters() if ".experts." not in name}
experts = {str(p.device) for name, p in model.named_parameters() if ".experts." in name}
print(json.dumps({"batch": trainer.state.train_batch_size, "devices": sorted(devices), "experts": sorted(experts),
    "trained": max(p.abs().max().item() for name, p in model.named_parameters() if ".lora_B" in name) > 0}))
"""
LOOP = """
import os, sys
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
import ktlib

torch.distributed.init_process_group("nccl")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, experts_implementation="ktlib")
ktlib.pin_experts(model)
model = get_peft_model(model, ktlib.lora_config(model, r=2)).to(device)
torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
"""
REFUSED = "pinned experts needs the whole model on the CPU, got parameters on cuda:"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("deepseek_v2", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def run(script, base, folder, *launch):
    (folder / "train.py").write_text(script)
    command = [sys.executable, *launch, str(folder / "train.py"), str(base), str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_a_plain_script_trains_on_one_gpu_and_says_so(base, tmp_path):
    done = run(TRAINER, base, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("training on cuda:0, one of") == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"batch": 2, "devices": ["cuda:0"], "experts": ["cpu"], "trained": True}


@pytest.mark.parametrize("script", [TRAINER, LOOP], ids=["Trainer", "own loop"])
@pytest.mark.parametrize(
    "launch",
    [
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        (
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        ),
    ],
    ids=["torchrun", "accelerate launch"],
)  # fmt: skip
def test_a_process_per_gpu_is_refused(script, launch, base, tmp_path):
    done = run(script, base, tmp_path, *launch)
    assert done.returncode != 0
    assert REFUSED in done.stderr and "start the script with python" in done.stderr, done.stderr[-3000:]


def test_ktlib_sft_trains_on_one_gpu(tmp_path):
    parameters = tmp_path / "run.yaml"
    parameters.write_text("model: base\ndataset: dates\nsteps: 4\n")
    command = [sys.executable, "-m", "ktlib.cli", "sft", str(parameters), "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert ktlib.audit(tmp_path / "runs" / "run" / "adapter").clean
