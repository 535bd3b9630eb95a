"""Fine-tuning: every choice trains, an interrupted run resumes to the same adapter."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.memory import measure
from transformers import TrainerCallback

import ktlib
from ktlib.assets import BASE
from ktlib.diagnosis.audit import audit, component
from ktlib.diagnosis.trace import NonFinite
from ktlib.files.ownership import TEMPORARY
from ktlib.integrations.transformers_experts import is_experts
from ktlib.system.cpu import cpu_info
from ktlib.training import sft
from ktlib.training.parameters import LORA_DTYPES, target_names
from ktlib.training.resume import complete_checkpoint
from ktlib.training.tasks import codebook, dates

ROWS, TEST = dates(n_train=64, n_test=8)
SMALL = {"steps": 3, "batch_size": 4, "sequence_length": 64, "progress": False}


pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(**options):
    model, tokenizer = sft.load_model("base")
    return sft.add_lora(model, **{"rank": 4, "alpha": 8} | options), tokenizer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_tokenizer_without_a_padding_token(tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    _, tokenizer = sft.load_model(folder)
    batch = sft.collator(tokenizer)(sft.encode(tokenizer, ROWS[:5], 64))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()


def test_a_tokenizer_without_an_end_token_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    folder = shutil.copytree(BASE, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    monkeypatch.setattr(sft, "model_class", None)
    with pytest.raises(ValueError, match="model: the tokenizer in .*model has no eos_token, needs one"):
        sft.load_model(folder)


def test_labels_cover_the_response_and_its_end_only():
    _, tokenizer = sft.load_model("base")
    (example,) = sft.encode(tokenizer, ROWS[:1], 64)
    answer = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(answer) == ROWS[0]["response"] + tokenizer.eos_token
    assert example["input_ids"][-len(answer) :] == answer
    batch = sft.collator(tokenizer)(sft.encode(tokenizer, ROWS[:5], 64))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, lengths.max())
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_long_rows_are_left_out_and_said_so():
    _, tokenizer = sft.load_model("base")
    rows = [{"prompt": "Say fox", "response": "fox"}, {"prompt": "Say fox", "response": "fox " * 50}]
    with pytest.warns(UserWarning, match="1 of 2 rows exceed 32 tokens"):
        assert len(sft.encode(tokenizer, rows, 32)) == 1
    with pytest.raises(ValueError, match="sequence_length: got 32, need more"):
        sft.encode(tokenizer, rows[1:], 32)


def test_long_rows_are_left_out_of_evaluation(monkeypatch):
    """What would be generated for them, and for all others of the batch, has no bound."""
    model, tokenizer = sft.load_model("base")
    asked = []

    def generate(model, tokenizer, prompts, max_new_tokens, *_):
        asked.append(max_new_tokens)
        return ["fox " for _ in prompts]

    monkeypatch.setattr(sft, "generate", generate)
    rows = [{"prompt": f"Say {word}", "response": word} for word in ("fox", "fox " * 50, "fox", "apple")]
    short = max(len(tokenizer(row["response"])["input_ids"]) for row in rows if len(row["response"]) < 10) + 4
    with pytest.warns(UserWarning, match="1 of 4 rows exceed 32 tokens, left out") as caught:
        accuracy, answers = sft.exact_match(model, tokenizer, rows, progress=False, sequence_length=32)
    assert caught[0].filename == __file__
    assert accuracy == 2 / 3 and answers == ["fox ", None, "fox ", "fox "] and asked == [short]
    rows[1]["response"] = "fox " * 1000  # the model was made for 1024 tokens
    with pytest.warns(UserWarning, match="1 of 4 rows exceed 1024 tokens, left out"):
        assert sft.exact_match(model, tokenizer, rows, progress=False) == (accuracy, answers)
    with pytest.raises(ValueError, match="sequence_length: got 32, need more: none of 1 rows fits"):
        sft.exact_match(model, tokenizer, rows[1:2], progress=False, sequence_length=32)


COMPONENT_OF = {"attention": "self_attn", "experts": "routed_experts", "shared": "shared_experts", "dense": "dense_mlp"}


@pytest.mark.parametrize("targets", [*COMPONENT_OF, "attention+experts", "all"])
def test_targets_train_what_they_name(targets, tmp_path):
    model, tokenizer = adapted(targets=targets)
    before = weights(model)
    assert {component(name) for name in before} == {COMPONENT_OF[target] for target in target_names(targets)}
    result = sft.train(model, tokenizer, ROWS, tmp_path, **SMALL)
    after = weights(model)
    moved = [name for name in before if "lora_B" in name and not torch.equal(before[name], after[name])]
    assert len(moved) == sum("lora_B" in name for name in before)
    assert [entry["step"] for entry in result["log"]] == [1, 2, 3]
    assert result["tokens_per_second"] > 0 and result["peak_rss_mib"] > 0


def test_a_single_step_trains(tmp_path):
    model, tokenizer = adapted()
    (entry,) = sft.train(model, tokenizer, ROWS, tmp_path, **SMALL | {"steps": 1})["log"]
    assert entry["learning_rate"] == 3e-3
    assert all(p.any() for name, p in weights(model).items() if "lora_B" in name)


def test_a_part_that_the_model_lacks_is_an_error(monkeypatch):
    model, _ = sft.load_model("base")
    model.model.layers = model.model.layers[1:]  # no dense layer
    with pytest.raises(ValueError, match="targets: got 'attention.dense'.*has no dense; it has attention, experts"):
        sft.add_lora(model, "attention+dense")


@pytest.mark.parametrize(
    "lora, options",
    [
        ({"lora_dtype": "bf16"}, {}),
        ({"lora_dtype": "fp32"}, {"gradient_checkpointing": True}),
        ({"lora_dtype": "bf16"}, {"gradient_checkpointing": True, "grad_accumulation": 2}),
        ({"rank": 3, "alpha": 1.5}, {"grad_accumulation": 3, "batch_size": 1}),
    ],
)
def test_every_choice_trains(lora, options, tmp_path):
    model, tokenizer = adapted(**lora)
    result = sft.train(model, tokenizer, ROWS, tmp_path, **SMALL | options)
    assert {p.dtype for p in weights(model).values()} == {LORA_DTYPES[lora.get("lora_dtype", "fp32")]}
    assert all(
        math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in map(floats, result["log"])
    )


def floats(entry):
    return {key: float(value) for key, value in entry.items()}


def test_checkpointing_and_accumulation_do_not_change_the_result(tmp_path):
    def loss(**options):
        model, tokenizer = adapted()
        folder = tmp_path / str(options)
        return [float(e["loss"]) for e in sft.train(model, tokenizer, ROWS, folder, **SMALL | options)["log"]]

    plain = loss()
    assert loss(gradient_checkpointing=True) == plain
    assert loss(batch_size=2, grad_accumulation=2) == pytest.approx(plain, rel=0.02)


class Poison(TrainerCallback):
    """One weight of one routed expert of the last layer becomes NaN at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step + 1 == self.step:
            experts = [module for module in ktlib.stack_experts(model).modules() if is_experts(module)][-1]
            with torch.no_grad():
                experts.down_proj[:, 3, 7] = math.nan


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_run_that_goes_bad_ends_with_its_cause_and_resumes_from_before(tmp_path):
    options = SMALL | {"steps": 6, "save_every": 2}
    whole, tokenizer = adapted()
    sft.train(whole, tokenizer, ROWS, tmp_path / "whole", **options)

    spoilt, folder = adapted()[0], tmp_path / "bad"
    before = hooks(spoilt)
    with pytest.warns(UserWarning, match="stopped in step 4"), pytest.raises(NonFinite) as caught:
        sft.train(spoilt, tokenizer, ROWS, folder, **options, callbacks=[Poison(4)])
    finding = caught.value.finding
    assert finding.module == "model.layers.3.mlp.experts" and finding.stage == "down" and finding.token is not None
    assert "down_proj[" in (folder / "nonfinite.txt").read_text() and (folder / "nonfinite.json").is_file()
    assert audit(spoilt).clean and audit(folder / "last_good").clean
    assert complete_checkpoint(folder / "checkpoints")[1] == 2
    assert hooks(spoilt) == before

    again, _ = adapted()  # the same command, with the memory module replaced
    assert sft.train(again, tokenizer, ROWS, folder, **options)["resumed_from"] == 2
    assert not (folder / "nonfinite.txt").exists()
    for name, expected in weights(whole).items():
        assert torch.equal(expected, weights(again)[name]), name


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora_dtype", LORA_DTYPES)
def test_an_interrupted_run_resumes_to_the_same_adapter_and_says_so(tmp_path, lora_dtype, monkeypatch, capsys):
    options = SMALL | {"steps": 4, "save_every": 2}
    whole, tokenizer = adapted(lora_dtype=lora_dtype)
    sft.train(whole, tokenizer, ROWS, tmp_path / "whole", **options)

    broken, _ = adapted(lora_dtype=lora_dtype)
    before = hooks(broken)
    with pytest.raises(KeyboardInterrupt):
        sft.train(broken, tokenizer, ROWS, tmp_path / "cut", **options, callbacks=[StopAt(3)])
    assert hooks(broken) == before
    with pytest.raises(ValueError, match="output_dir: .*interrupted run with another learning_rate"):
        sft.train(adapted(lora_dtype=lora_dtype)[0], tokenizer, ROWS, tmp_path / "cut", **options, learning_rate=1e-4)
    with pytest.raises(ValueError, match="another adapters"):
        sft.train(adapted(lora_dtype=lora_dtype, rank=5)[0], tokenizer, ROWS, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match="another data"):
        sft.train(adapted(lora_dtype=lora_dtype)[0], tokenizer, ROWS[1:], tmp_path / "cut", **options)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"another isa \(\w+, now portable\)"):
        patch.setenv("KTLIB_ISA", "portable")
        sft.train(adapted(lora_dtype=lora_dtype)[0], tokenizer, ROWS, tmp_path / "cut", **options)
    resumed, _ = adapted(lora_dtype=lora_dtype)
    capsys.readouterr()
    result = sft.train(resumed, tokenizer, ROWS, tmp_path / "cut", **options | {"progress": "lines"})
    assert capsys.readouterr().out.startswith("resuming from the checkpoint of step 2 of 4\nstep     3 of 4")
    assert result["resumed_from"] == 2 and [entry["step"] for entry in result["log"]] == [1, 2, 3, 4]
    for name, expected in weights(whole).items():
        assert torch.equal(expected, weights(resumed)[name]), name


def test_dropout_changes_the_curve_and_repeats(tmp_path):
    """Another curve than without; the same bits with the same seed, also after an interruption; the file says it."""
    options = SMALL | {"steps": 4, "save_every": 2}

    def trained(name, lora_dropout=0.2, seed=0, **more):
        model, tokenizer = adapted(lora_dropout=lora_dropout)
        log = sft.train(model, tokenizer, ROWS, tmp_path / name, seed=seed, **options, **more)["log"]
        return [entry["loss"] for entry in log], weights(model), model

    curve, wanted, model = trained("first")
    again, same, _ = trained("second")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", callbacks=[StopAt(3)])
    with pytest.raises(ValueError, match="another adapters"):
        trained("cut", lora_dropout=0.3)
    resumed_curve, resumed, _ = trained("cut")
    assert again == resumed_curve == curve
    assert all(torch.equal(same[name], wanted[name]) and torch.equal(resumed[name], wanted[name]) for name in wanted)
    without, _, _ = trained("without", lora_dropout=0.0)
    # B starts at zero, so dropout shows from the second step on
    assert without[0] == curve[0] and without[1:] != curve[1:]

    sft.save(model, tmp_path / "first")
    settings = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert settings["ktlib_lora_dropout"] == 0.2 and audit(tmp_path / "first").clean


def test_files_of_others_in_the_output_folder_are_left_alone(tmp_path):
    model, tokenizer = adapted()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="output_dir: .*which holds checkpoints: not written by ktlib"):
        sft.train(model, tokenizer, ROWS, tmp_path, **SMALL)
    sft.save(model, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with open(tmp_path / "adapter_model.safetensors", "rb") as reader:  # of a file that a later save replaces
        torch.nn.init.ones_(next(p for p in model.parameters() if p.requires_grad))
        sft.save(model, tmp_path)
        assert reader.read() == before != (tmp_path / "adapter_model.safetensors").read_bytes()
    found = {path.name for path in tmp_path.iterdir()}
    assert found >= {"checkpoints", "adapter_model.safetensors", "adapter_config.json"}
    assert not [name for name in found if name.startswith(TEMPORARY)]
    assert (tmp_path / "checkpoints" / "thesis.txt").exists()


# ----------------------------------------------------------------------------------------------- the weights themselves


def whole(experts="ktlib", targets="experts"):
    model, tokenizer = sft.load_model("base", experts_implementation=experts)
    return sft.prepare(model, "full", targets), tokenizer


@pytest.mark.parametrize("targets", ["experts", "attention+experts+shared", "all"])
def test_full_finetuning_trains_the_weights_of_its_targets(targets, tmp_path):
    model, tokenizer = whole(targets=targets)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sft.train(model, tokenizer, ROWS, tmp_path, **SMALL)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    components = {COMPONENT_OF[target] for target in target_names(targets)}
    wanted = {name for name, p in before.items() if component(name) in components and p.dim() > 1}
    assert moved == wanted and {model.get_parameter(name).dtype for name in wanted} == {torch.bfloat16}
    file = next(BASE.glob("*.safetensors"))
    assert file.stat().st_mtime < (tmp_path).stat().st_mtime, "training wrote into the mapped checkpoint"


@pytest.mark.compatible("full-parameter fine-tuning of experts")
def test_full_finetuning_follows_stock_experts(tmp_path):
    """Losses differ from those of stock experts no more than two stock implementations differ from one another."""

    def losses(experts):
        model, tokenizer = whole(experts)
        options = SMALL | {"steps": 12, "learning_rate": 1e-3}
        return torch.tensor([float(e["loss"]) for e in sft.train(model, tokenizer, ROWS, tmp_path, **options)["log"]])

    ours, eager, grouped = map(losses, ("ktlib", "eager", "grouped_mm"))
    noise = (eager - grouped).abs().max() / eager.mean()
    assert ours[-3:].mean() < 0.8 * ours[:3].mean(), "it did not learn"
    assert (ours - eager).abs().max() / eager.mean() < 2 * noise + 0.005, (ours, eager, grouped)


@pytest.mark.compatible("full-parameter fine-tuning of experts")
def test_an_interrupted_full_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = SMALL | {"steps": 4, "save_every": 2, "learning_rate": 1e-3}
    straight, tokenizer = whole()
    sft.train(straight, tokenizer, ROWS, tmp_path / "whole", **options)
    broken, _ = whole()
    with pytest.raises(KeyboardInterrupt):
        sft.train(broken, tokenizer, ROWS, tmp_path / "cut", **options, callbacks=[StopAt(3)])
    with pytest.raises(ValueError, match="interrupted run with another adapters"):
        sft.train(adapted()[0], tokenizer, ROWS, tmp_path / "cut", **options)
    resumed, again = whole()[0], whole()[0]
    assert sft.train(resumed, tokenizer, ROWS, tmp_path / "cut", **options)["resumed_from"] == 2
    monkeypatch.setattr(sft.Trainer, "training_step", lambda *_: pytest.fail("trained again"))
    assert sft.train(again, tokenizer, ROWS, tmp_path / "cut", **options)["resumed_from"] == 4
    for name, expected in weights(straight).items():
        assert torch.equal(expected, weights(resumed)[name]) and torch.equal(expected, weights(again)[name]), name


@pytest.mark.compatible("full-parameter fine-tuning of experts")
def test_a_model_trained_as_a_whole_is_saved_for_stock_transformers(tmp_path):
    sft.save(adapted()[0], tmp_path)  # an earlier run's
    model, tokenizer = whole()
    sft.train(model, tokenizer, ROWS, tmp_path, **SMALL | {"learning_rate": 1e-3})
    sft.save(model, tmp_path, tokenizer)
    assert not (tmp_path / "checkpoints").exists() and sft.load_model(tmp_path)[1].get_vocab() == tokenizer.get_vocab()
    loaded, _ = sft.load_model("base")
    stock = type(loaded).from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="eager")
    for name, value in model.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name]), name
    assert not torch.equal(loaded.model.layers[1].mlp.experts.down_proj, stock.model.layers[1].mlp.experts.down_proj)


def test_the_estimate_of_full_finetuning_is_what_training_takes():
    """Anonymous memory of gradients and moments, and of the weights that are no longer those of the mapped file."""
    setup = """
import torch
torch.set_num_threads(1)
import ktlib
from support.models import tiny_model
model = tiny_model("olmoe", "ktlib", dtype=torch.bfloat16, hidden_size=512, intermediate_size=1024, num_experts=16)
for p in model.parameters():
    p.requires_grad_(p.dim() == 3)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, fused=True)
x = torch.arange(3, 35)[None]
size = sum(p.nbytes for p in trained)
assert size > 90e6
"""
    step = "(model(x, labels=x).loss.backward(), optimizer.step())"
    taken = measure(setup, step)["end"]
    experts = 2 * 16 * 3 * 512 * 1024
    assert 0.9 * 6 * experts < taken < 1.2 * 6 * experts


# ------------------------------------------------------------------------------------------------ whole runs


def test_generation_does_not_depend_on_batching():
    model, tokenizer = sft.load_model("base")
    prompts = ["Repeat: fox", "Repeat: river garden silver 4071", "Say apple"]
    together = sft.generate(model, tokenizer, prompts, 12, progress=False)
    assert together == [sft.generate(model, tokenizer, [prompt], 12, progress=False)[0] for prompt in prompts]


def test_no_instruction_set_is_the_user_s_or_the_best(monkeypatch):
    monkeypatch.delenv("KTLIB_ISA", raising=False)
    monkeypatch.setattr(sft, "_isa", {})
    best = cpu_info()["isa"]

    def used(isa):
        sft.use_isa(isa)
        return cpu_info()["isa"]

    assert [used(isa) for isa in (None, "portable", None, "portable", "portable", None)] == [
        best, "portable", best, "portable", "portable", best,
    ]  # fmt: skip
    monkeypatch.setenv("KTLIB_ISA", "portable")  # the user's
    assert [used(isa) for isa in (None, best, None)] == ["portable", best, "portable"]
    monkeypatch.delenv("KTLIB_ISA")
    assert used(None) == best


def test_run_saves_an_adapter_that_stock_peft_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("KTLIB_ISA", "")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in codebook(n_train=30, n_test=1)[0]))
    result = sft.run(dataset=str(path), output_dir=tmp_path / "out", isa="portable", rank=4, **SMALL)
    assert result["saved"] == tmp_path / "out" and len(result["test"]) == 3
    assert 0 <= result["before"] <= 1 and len(result["answers_after"]) == 3
    stored = load_file(result["saved"] / "adapter_model.safetensors")
    model, _ = sft.load_model("base", experts_implementation="eager")
    loaded = PeftModel.from_pretrained(model, result["saved"])
    assert len(stored) == sum("lora_" in name for name, _ in loaded.named_parameters())


def test_what_was_trained_is_saved_before_it_is_evaluated(tmp_path, monkeypatch):
    evaluations = iter([(0.0, [])])
    monkeypatch.setattr(sft, "exact_match", lambda *_, **__: next(evaluations))
    with pytest.raises(StopIteration):
        sft.run(output_dir=tmp_path / "out", rank=4, **SMALL)
    assert audit(tmp_path / "out").clean and not (tmp_path / "out" / "checkpoints").exists()
