"""What the notebook of quantised bases measures: errors, bytes, memory, speed, and adapters on each base."""

import math

import pytest
import torch

import ktlib
from ktlib import plots
from ktlib.assets import BASE
from ktlib.lab import hybrid, quantised_bases, synthetic
from ktlib.runs.notebooks import read_recorded
from ktlib.training import sft
from ktlib.training.tasks import dates


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {base: quantised_bases.make_base(base, folder) for base in ("bf16", "int4", "mxfp4")}


def test_a_base_is_the_built_in_model_with_other_experts(folders):
    assert folders["bf16"] == BASE and folders["int4"].name == "int4"
    plain, coded = (sft.load_model(folders[base])[0] for base in ("bf16", "int4"))
    for name, weight in plain.named_parameters():
        if ".experts." not in name:
            assert torch.equal(weight, coded.get_parameter(name))
    formats = {weight.source.format for weight in quantised_bases.expert_weights(coded)}
    assert formats == {"int4"} and len(quantised_bases.expert_weights(plain)) == 6


@pytest.mark.parametrize("base", quantised_bases.BASES)
def test_a_layer_in_a_format_decodes_to_nearby_weights(base):
    stacks = torch.randn(2, 96, 64).bfloat16(), torch.randn(2, 64, 48).bfloat16()
    coded = quantised_bases.in_format(stacks, base)
    if base == "bf16":
        assert all(one is stack for one, stack in zip(coded, stacks, strict=True))
        return
    for weight, stack in zip(coded, stacks, strict=True):
        assert weight.shape == stack.shape
        error = (weight.decoded().float() - stack.float()).norm() / stack.float().norm()
        assert error < 1.1 * quantised_bases.GAUSSIAN[base]


def test_errors_are_those_of_the_decoded_weights_and_of_the_output_in_float64(monkeypatch):
    """Each format's errors by definition, with the operator replaced by plain matrix products."""
    sizes = {"experts": 2, "hidden": 128, "intermediate": 64, "tokens": 16}
    found = quantised_bases.errors(**sizes, seed=3)
    calls = []

    def in_float64(hidden_states, index, routing, gate_up, down):
        weights = [w.decoded() if isinstance(w, ktlib.Weight) else w for w in (gate_up, down)]
        calls.append(weights)
        outputs = []
        for x, expert in zip(hidden_states.double(), index[:, 0], strict=True):
            gate, up = (weights[0][expert].double() @ x).chunk(2)
            outputs.append(weights[1][expert].double() @ (torch.nn.functional.silu(gate) * up))
        return torch.stack(outputs)

    monkeypatch.setattr(quantised_bases, "moe_experts", in_float64)
    exact = quantised_bases.errors(**sizes, seed=3)
    plain, *others = calls
    for (base, (of_weights, of_output)), weights in zip(found.items(), others, strict=True):
        flat, wanted = (torch.cat([w.double().flatten() for w in both]) for both in (weights, plain))
        assert of_weights == pytest.approx(((flat - wanted).norm() / wanted.norm()).item(), rel=1e-9)
        assert of_output == pytest.approx(exact[base][1], abs=0.004)  # roundings to bf16
    assert found != quantised_bases.errors(**sizes, seed=4)


@pytest.mark.parametrize("base", ("bf16", "int4", "mxfp4"))
def test_the_formula_of_bytes_is_what_a_loaded_model_has(base, folders):
    model, _ = sft.load_model(folders[base])
    config = sft.load_model()[0].config
    assert quantised_bases.stored_bytes(model) == quantised_bases.expert_bytes(config, base)
    assert getattr(config, "quantization_config", None) is None, "the caller's config stays as it is"


def test_memory_is_that_of_a_process_and_a_copy_is_found(tmp_path):
    config = synthetic.deepseek_v2_small(
        num_hidden_layers=2, hidden_size=512, n_routed_experts=24, moe_intermediate_size=512
    )
    source = synthetic.write_checkpoint(config, tmp_path / "bf16", progress=False)
    found = quantised_bases.memory_added({"int4": quantised_bases.make_base("int4", tmp_path, source)})["int4"]
    assert found["in_bf16"] == 24 * 3 * 512 * 512 * 2 and found["experts"] * 16 == found["in_bf16"] * 4.5
    assert found["anonymous"] < 0.1 * found["in_bf16"]
    assert found["experts"] < found["mapped"]
    assert found["with_copies"] - found["anonymous"] == pytest.approx(found["in_bf16"], rel=0.05)


def test_a_process_that_fails_is_an_error_with_what_it_printed(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no config.json >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(quantised_bases.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="no config.json"):
        quantised_bases.memory_added({"none": tmp_path})


def test_a_system_that_does_not_tell_anonymous_memory_is_named(monkeypatch):
    monkeypatch.setattr(quantised_bases, "stepped", lambda folder: None)
    monkeypatch.setattr(hybrid, "memory", lambda: {"host_peak": 1})
    with pytest.raises(RuntimeError, match="anonymous memory"):
        quantised_bases.print_memory_added("folder")


def test_seconds_are_measured_for_each_base_and_number_of_tokens():
    times = quantised_bases.seconds(("bf16", "nf4"), [1, 5], (4, 2, 64, 32), rank=2, repeat=1, budget=0.1)
    assert list(times) == ["bf16", "nf4"] and all(len(row) == 2 and min(row) > 0 for row in times.values())


def test_an_adapter_is_measured_on_its_own_base_and_on_bf16(folders, tmp_path, one_thread):
    rows, held_out = dates(n_train=40, n_test=4)
    results = {
        base: quantised_bases.train(folders[base], rows, held_out, tmp_path / base, steps=2, rank=2)
        for base in ("bf16", "mxfp4")
    }
    for base, result in results.items():
        assert (tmp_path / base / "adapter_model.safetensors").is_file()
        assert result["loss"] < result["before"] and 0 <= result["exact_on_bf16"] <= 1
        assert (result["loss"] == result["loss_on_bf16"]) == (base == "bf16")
    assert results["bf16"]["before"] != results["mxfp4"]["before"]
    model, tokenizer = sft.load_model(folders["mxfp4"])
    assert quantised_bases.loss_of(model, tokenizer, held_out) == results["mxfp4"]["before"]


def test_the_loss_is_that_of_all_response_tokens(one_thread):
    model, tokenizer = sft.load_model()
    rows = dates(n_train=1, n_test=3)[1]
    total = count = 0
    for example in sft.encode(tokenizer, rows, 128):
        labels = torch.tensor([example["labels"]])
        logits = model(torch.tensor([example["input_ids"]])).logits.float()
        targets = labels[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum").item()
        count += int((targets != -100).sum())
    assert quantised_bases.loss_of(model, tokenizer, rows) == pytest.approx(total / count, rel=0.01)
    assert not model.training


def test_the_table_has_a_line_for_each_base_and_a_number_for_each_seed():
    row = {"base": "int4", "loss": 0.1, "exact": 0.9, "loss_on_bf16": 0.2, "exact_on_bf16": 0.8}
    text = quantised_bases.table([row, row | {"base": "bf16"}, row | {"exact": 1}], {"bf16": 16, "int4": 4.5})
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| bf16 | 16.00 | 0.1000 | 0.900 | 0.2000 | 0.800 |",
        "| int4 | 4.50 | 0.1000, 0.1000 | 0.900, 1.000 | 0.2000, 0.2000 | 0.800, 0.800 |",
    ]


def test_the_recorded_runs_are_of_every_base_with_three_seeds():
    rows = read_recorded("quantised_bases.json")["rows"]
    assert [(row["base"], row["seed"]) for row in rows] == [(b, s) for b in quantised_bases.BASES for s in range(3)]
    assert all(math.isfinite(row[name]) for row in rows for name in row if name != "base")


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_figure_of_a_row_shows_weights_levels_and_codes():
    ax = plots.quantised_row([0.3, -1.2], [0.5, -1.0], [-1.0, 0.0, 0.5], [2, 0])
    dots, marks = ax.lines
    assert list(dots.get_ydata()) == [0.3, -1.2] and list(marks.get_ydata()) == [0.5, -1.0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "0"]
    assert [segment[0, 1] for segment in ax.collections[0].get_segments()] == [-1.0, 0.0, 0.5]


def test_the_figure_of_adapters_has_a_dot_and_a_ring():
    row = {"base": "int4", "loss": 0.1, "exact": 0.9, "loss_on_bf16": 0.2, "exact_on_bf16": 0.8}
    loss, exact = plots.trained_on([row], ("bf16", "int4"))
    assert [line.get_ydata()[0] for line in exact.lines if len(line.get_ydata())] == [0.8, 0.9]
    assert [line.get_ydata()[0] for line in loss.lines if len(line.get_ydata())] == [0.2, 0.1]
    assert [label.get_text() for label in exact.get_xticklabels()] == ["bf16", "int4"]
