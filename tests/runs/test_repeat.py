"""A repeated run gives the same adapter; `ktlib sft --repeat` compares the adapters and says what differs."""

import hashlib

import nbformat
import pytest
import torch
from safetensors.torch import save_file

from ktlib import cli, cpu_info
from ktlib.runs import repeat
from ktlib.training import sft
from ktlib.training.tasks import dates

PARAMETERS = 'seed: int = 0\noutput_dir: str = "nowhere"\nisa: str | None = None\n'
BODY = """\
from pathlib import Path
import torch
from safetensors.torch import save_file
from ktlib.runs.repeat import provenance
from ktlib.runs.notebooks import record
from ktlib.training.sft import use_isa

use_isa(isa)
Path(output_dir).mkdir(parents=True, exist_ok=True)
disturbed = Path("disturbed").exists()
save_file({"lora": torch.full((3,), float(seed) + disturbed)}, f"{output_dir}/adapter_model.safetensors")
parameters = {"seed": seed, "isa": isa, "output_dir": output_dir}
result = {"identity": {"seed": seed, "data": "other" if disturbed else "same"}}
assert not Path("broken").exists()
record(repeat=provenance(parameters, result, output_dir))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Call ``ktlib sft`` on a notebook that saves an adapter of one tensor, in an empty working directory."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "small.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *arguments: cli.main(["sft", "--notebook", "small.ipynb", *map(str, arguments)])


def test_a_run_is_repeated_and_compared(command, tmp_path, capsys):
    assert command("--name", "first", "--param", "seed=0") == 0
    run = "runs/first/small.ipynb"
    assert repeat.recorded(run)["isa"] == cpu_info()["isa"] and repeat.recorded(run)["threads"] == 1
    assert command("--repeat", run) == 0
    assert "same      adapter, bit for bit" in capsys.readouterr().out
    assert repeat.recorded("runs/small-repeat/small.ipynb")["adapter"] == repeat.recorded(run)["adapter"]

    (tmp_path / "disturbed").touch()
    assert command("--repeat", run) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS   adapter: " in printed and "DIFFERS   data: same, now other" in printed and "same  " not in printed

    (tmp_path / "broken").touch()
    assert command("--repeat", run) == 1
    assert "FAILED in cell" in capsys.readouterr().err


def test_what_cannot_be_repeated_is_refused_with_2(command, tmp_path, capsys):
    (tmp_path / "empty.ipynb").write_text("")
    (tmp_path / "list.ipynb").write_text("[1]")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "norecord.ipynb")
    for name, words in (
        ("none.ipynb", "no such file"),
        ("empty.ipynb", "not a notebook"),
        ("list.ipynb", "not a notebook"),
        ("norecord.ipynb", "has no record of a run"),
    ):
        assert command("--repeat", name) == 2
        assert words in capsys.readouterr().err, name
    assert command("mine.yaml", "--repeat", "norecord.ipynb") == 2
    assert not (tmp_path / "runs").exists()


def test_an_instruction_set_that_cannot_run_here_is_refused_before_anything_runs(monkeypatch, tmp_path):
    before = {"isa": "amx_bf16", "parameters": {}, "threads": 1}
    monkeypatch.setattr(repeat, "recorded", lambda _: before)
    monkeypatch.setattr(repeat, "cpu_info", lambda: {"isas": {"amx_bf16": "needs AMX-TILE"}})
    with pytest.raises(ValueError, match="ran on amx_bf16, which cannot run here: needs AMX-TILE"):
        repeat.run_again("run.ipynb", "small.ipynb", tmp_path)


def test_digest_sees_every_bit_and_name(tmp_path):
    def of(**tensors):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return repeat.digest(tmp_path)

    base = torch.arange(4.0)
    changed = base.clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    different = [
        of(a=base),
        of(b=base),
        of(a=changed),
        of(a=base.view(2, 2)),
        of(a=base.bfloat16()),
    ]
    assert len(set(different)) == len(different) and of(a=base) == different[0]
    # what notebooks have recorded must be comparable ever after
    assert different[0] == hashlib.sha256(b"a torch.float32 (4,)\n" + base.numpy().tobytes()).hexdigest()
    with pytest.raises(FileNotFoundError, match="none has no .*safetensors file"):
        repeat.digest(tmp_path / "none")


@pytest.mark.parametrize("isa, threads", [(None, (1, 2, 3, 4)), *((isa, (1, 3)) for isa in ("avx2", "amx_emulated"))])
def test_same_seed_same_bits_after_50_steps_on_any_number_of_threads(isa, threads, tmp_path, monkeypatch):
    if missing := isa and cpu_info()["isas"][isa]:
        pytest.skip(missing)
    monkeypatch.setenv("KTLIB_ISA", isa or "")
    before, digests = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            model, tokenizer = sft.load_model("base")
            model = sft.add_lora(model, rank=4, alpha=8)
            options = {"steps": 50, "batch_size": 2, "sequence_length": 64, "progress": False, "save_every": 1000}
            sft.train(model, tokenizer, dates(n_train=100, n_test=8)[0], tmp_path / str(count), **options)
            assert torch.get_num_threads() == count
            digests.append(repeat.digest(sft.save(model, tmp_path / str(count))))
    finally:
        torch.set_num_threads(before)
    assert len(set(digests)) == 1
