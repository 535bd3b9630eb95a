"""Both layouts of a checkpoint load, the fused one without a copy; the converter stays within its bound of memory."""

import gc
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from support.memory import measure
from support.models import PER_EXPERT, tiny_model
from transformers import AutoModelForCausalLM

import ktlib
from ktlib.conversion.fuse import NOTE, fuse_checkpoint
from ktlib.files import ownership, tensor_files
from ktlib.lab import synthetic


def save_hub(folder, family="deepseek_v2", **options):
    """A checkpoint with one tensor per expert, as transformers writes it for the hub; returns the model too."""
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(folder, **options)
    return folder, model


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="ktlib", **options)


def names(folder):
    return {name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys()}


@pytest.mark.compatible("checkpoints as on the hub, and fused")
@pytest.mark.parametrize("family", PER_EXPERT)
def test_both_layouts_load_to_the_same_model(family, tmp_path):
    hub, model = save_hub(tmp_path / "hub", family)
    (hub / "tokenizer.json").write_text("{}")
    assert any(re.search(r"\.experts\.3\.", name) for name in names(hub)), "not the hub's layout"
    fused = ktlib.fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    assert names(fused) == set(model.state_dict()), "not transformers 5's own names"
    assert (fused / "tokenizer.json").read_text() == "{}"
    wanted = model.state_dict()
    for folder in (hub, fused):
        got = load(folder).state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], value) for name, value in wanted.items()), folder
    again = fuse_checkpoint(fused, tmp_path / "again", progress=False)  # a fused one is copied
    for path in fused.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("family", ("deepseek_v3", "glm4_moe"))
def test_layers_that_predict_more_tokens_keep_the_names_and_bits_of_the_file(family, tmp_path):
    """transformers has no such layers. Their weights lie behind those of the last layer, as on the hub."""
    hub, model = save_hub(tmp_path / "hub", family)
    more = {}

    def add(tensors):
        more.update({name.replace(".1.", ".2.", 1): t + 1 for name, t in tensors.items() if "layers.1." in name})
        tensors.update(more)

    rewrite(hub, add)
    fused = fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    got = {name: value for file in fused.glob("*.safetensors") for name, value in load_file(file).items()}
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in more
    assert all(torch.equal(got.pop(name), value) for name, value in more.items())
    assert all(torch.equal(got[name], value) for name, value in model.state_dict().items())


def test_nan_in_a_checkpoint_is_copied_and_said(tmp_path):
    hub, _ = save_hub(tmp_path / "hub", "qwen3_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse_checkpoint(hub, tmp_path / "clean", progress=False)
    (path,) = hub.glob("*.safetensors")
    tensors = load_file(path)
    for name, value in (("mlp.experts.3.up_proj", float("nan")), ("self_attn.q_proj", float("-inf"))):
        tensors[f"model.layers.1.{name}.weight"][2, 5] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="NaN or Inf") as warned:
        fused = fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    assert sorted(re.findall(r"model\.layers[\w.]+", str(warned[0].message))) == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    copied = [item for file in fused.glob("*.safetensors") for item in load_file(file).items()]
    bad = {name for name, value in copied if not value.isfinite().all()}
    assert bad == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj.weight"}


def mapped_file(tensor):
    """The file whose mapping holds the tensor's memory, or None."""
    for line in open("/proc/self/maps"):
        span, _, rest = line.partition(" ")
        low, high = (int(text, 16) for text in span.split("-"))
        if low <= tensor.data_ptr() < high:
            return rest.split()[-1] if "/" in rest else None
    return None


@pytest.mark.compatible("fused checkpoints used where they lie in the file")
def test_fused_weights_are_used_where_they_lie(tmp_path):
    hub, _ = save_hub(tmp_path / "hub")
    fused = fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    before = {path.name: path.read_bytes() for path in fused.glob("*.safetensors")}
    mapped = load(fused)
    for name, parameter in mapped.named_parameters():
        if parameter.dtype == torch.float32:  # from transformers 5.24 on, whatever the dtype of the file
            assert name == "model.layers.1.mlp.gate.weight"
        else:
            assert (mapped_file(parameter) or "").startswith(str(fused)), f"{name} is a copy"
    experts = mapped.model.layers[1].mlp.experts
    assert (
        experts.gate_up_proj.data_ptr() % tensor_files.PAGE == 0
        or experts.down_proj.data_ptr() % tensor_files.PAGE == 0
    )
    # the mapping is private: whatever a program does to the parameters, the files stay as they are
    with torch.no_grad():
        experts.gate_up_proj.zero_()
    del mapped, experts
    assert before == {path.name: path.read_bytes() for path in fused.glob("*.safetensors")}


def test_weights_that_go_elsewhere_leave_no_file_mapped_behind(tmp_path):
    hub, _ = save_hub(tmp_path / "hub")
    made = synthetic.write_checkpoint(synthetic.deepseek_v2_small(), tmp_path / "made", progress=False)
    for folder in (fuse_checkpoint(hub, tmp_path / "fused", progress=False), made):
        model = ktlib.pin_experts(load(folder))
        routers = [name for name, p in model.named_parameters() if p.dtype == torch.float32]  # as above: copies
        assert all(name.endswith(".gate.weight") for name in routers)
        files = {name: mapped_file(p) for name, p in model.named_parameters() if name not in routers}
        experts = {file for name, file in files.items() if ".experts." in name}
        others = {file for name, file in files.items() if ".experts." not in name}
        assert experts and others and not experts & others and mapped(folder) == experts | others
        model.to("meta")
        assert mapped(folder) == experts


def mapped(folder):
    """The files of the folder that this process has mapped."""
    return {line.split()[-1] for line in open("/proc/self/maps") if f" {folder}/" in line}


CONFIG = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
    "num_hidden_layers": 9, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def mid_size(tmp_path_factory):
    """A checkpoint of 205 MB in eight MoE layers of 64 experts, in the hub's layout, and its size."""
    folder, weight_map = tmp_path_factory.mktemp("checkpoints"), {}
    fused = synthetic.write_checkpoint(synthetic.deepseek_v2_lite(**CONFIG), folder / "source", progress=False)
    (folder / "hub").mkdir()
    for path in sorted(fused.glob("*.safetensors")):
        tensors = {}
        for name, value in load_file(path).items():
            stem, _, leaf = name.rpartition(".")
            projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf)
            if projections and value.dim() == 3:
                for e, expert in enumerate(value):
                    for projection, rows in zip(projections, expert.chunk(len(projections)), strict=True):
                        tensors[f"{stem}.{e}.{projection}.weight"] = rows.clone()
            else:
                tensors[name] = value
        save_file(tensors, folder / "hub" / path.name)
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / "hub" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "hub" / "config.json").write_text((fused / "config.json").read_text())
    return folder, sum(path.stat().st_size for path in fused.glob("*.safetensors"))


SETUP = """
import warnings, torch, ktlib
warnings.simplefilter("ignore")
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import modeling_deepseek_v2
torch.set_num_threads(1)
folder = Path({folder!r})
"""
LOAD = "AutoModelForCausalLM.from_pretrained(folder / {name!r}, dtype=torch.bfloat16, experts_implementation='ktlib')"


def test_memory_of_loading_and_converting(mid_size):
    """The experts are in no memory of the process in either layout; transformers alone stacks those of the hub's."""
    folder, size = mid_size
    setup = SETUP.format(folder=str(folder))
    assert size > 150e6
    converting = measure(setup, "ktlib.fuse_checkpoint(folder / 'hub', folder / 'fused', progress=False)")
    quantising = {
        name: measure(setup, f"ktlib.fuse_checkpoint(folder / {name!r}, folder / '{name}-4', False, 'int4')")
        for name in ("hub", "fused")
    }
    hub = measure(setup, LOAD.format(name="hub"))
    run = measure(setup, f"({LOAD.format(name='hub')})(torch.arange(8)[None])")
    fused = measure(setup, LOAD.format(name="fused"))
    stacked = measure(setup, LOAD.format(name="hub").replace("'ktlib'", "'eager'"))
    print(
        {
            "size": size,
            "converting": converting,
            "quantising": quantising,
            "hub": hub,
            "run": run,
            "fused": fused,
            "stacked": stacked,
        }
    )
    assert converting["peak"] < size / 4, "more than two of nine layers in memory"
    assert all(taken["peak"] < size / 5 for taken in quantising.values()), "more than a layer's codes and an expert"
    assert fused["peak"] < size / 10, "a fused checkpoint was copied"
    assert hub["peak"] < size / 10 and run["peak"] < size / 5, "a checkpoint as on the hub was copied"
    assert stacked["end"] > 0.8 * size


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    hub, _ = save_hub(tmp_path / "hub")
    wanted = fuse_checkpoint(hub, tmp_path / "whole", progress=False)
    written, write = [], tensor_files.write

    def write_two(path, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tensors)

    monkeypatch.setattr(tensor_files, "write", write_two)
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(hub, tmp_path / "cut", progress=False)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 2
    assert not (tmp_path / "cut" / "model.safetensors.index.json").exists(), "half a checkpoint looks like a whole one"
    monkeypatch.setattr(tensor_files, "write", write)
    stamps = {path: path.stat().st_mtime_ns for path in written}
    fuse_checkpoint(hub, tmp_path / "cut", progress=False)
    assert stamps == {path: path.stat().st_mtime_ns for path in written}, "finished files were written again"
    for path in wanted.iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_source_that_changed_is_not_gone_on_with(tmp_path):
    """After more training names and sizes are the same; in a copy, the files' times are not."""
    hub, _ = save_hub(tmp_path / "hub")
    out = fuse_checkpoint(hub, tmp_path / "out", progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    shutil.copytree(hub, tmp_path / "copy", copy_function=shutil.copyfile)
    fuse_checkpoint(tmp_path / "copy", out, progress=False)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    for name in ("model.layers.1.mlp.experts.5.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        trained = shutil.copytree(hub, tmp_path / name)
        rewrite(trained, lambda t, name=name: t[name].mul_(1.1))
        with pytest.raises(ValueError, match="^out: .*out holds a checkpoint that was made from something else"):
            fuse_checkpoint(trained, out, progress=False)
    next(iter(stamps)).unlink()
    with pytest.raises(ValueError, match="made from something else"):  # nor is half of it made from another source
        fuse_checkpoint(trained, out, progress=False)


def test_a_kill_while_the_note_is_written_blocks_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    hub, _ = save_hub(tmp_path / "hub")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ownership.os, "link", stop)
        fuse_checkpoint(hub, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / NOTE).exists()
    out = fuse_checkpoint(hub, tmp_path / "out", progress=False)
    (out / NOTE).write_text((out / NOTE).read_text()[:50])
    with pytest.raises(ValueError, match=f"{NOTE}: not JSON"):
        fuse_checkpoint(hub, out, progress=False)


def rewrite(folder, change):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"), "missing 1: up of expert 5"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \(3,\), needs \(64,\)"),
        (
            lambda t: [t.pop(k) for k in list(t) if ".experts.7." in k],
            r"gate_up_proj is \(7, 96, 64\), needs \(8, 96, 64\)",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.5.up_proj.weight": torch.ones(48, 64)}),
            "differ in shape or dtype",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(change, message, tmp_path):
    hub, _ = save_hub(tmp_path / "hub")
    rewrite(hub, change)
    with pytest.raises(ValueError, match=message):
        fuse_checkpoint(hub, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_refused(tmp_path, monkeypatch):
    hub, _ = save_hub(tmp_path / "hub", max_shard_size="100KB")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        fuse_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="the source itself"):
        fuse_checkpoint(hub, tmp_path / "x" / ".." / "hub")
    tiny_model("gpt_oss").save_pretrained(tmp_path / "stacked")
    with pytest.raises(
        ValueError, match="source: .*stacked is of a family .gpt_oss. whose files hold .* stacked already"
    ):
        fuse_checkpoint(tmp_path / "stacked", tmp_path / "out")
    other, _ = save_hub(tmp_path / "other")
    with pytest.raises(ValueError, match="made from something else"):
        fuse_checkpoint(hub, other, progress=False)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="quantised"):
        fuse_checkpoint(other, tmp_path / "out")
    shard = sorted(hub.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}"):
        fuse_checkpoint(hub, tmp_path / "out")
    (tmp_path / "elsewhere").rename(shard)
    monkeypatch.setattr(tensor_files.os, "statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": 512}))
    with pytest.raises(OSError, match="GB free, the checkpoint needs"):
        fuse_checkpoint(hub, tmp_path / "out", progress=False)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="bad.safetensors: damaged"):
        tensor_files.read(tmp_path / "bad.safetensors")
    content = save({"w": torch.zeros(2, dtype=torch.uint8)})
    (tmp_path / "bad.safetensors").write_bytes(content.replace(b'"U8"', b'"F4"').replace(b"[2]", b"[4]"))
    with pytest.raises(ValueError, match="bad.safetensors: tensor w is F4, needs one of F64, "):
        tensor_files.read(tmp_path / "bad.safetensors")
    value = tensor_files.Stored((2, 2), torch.float32, lambda: torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"w: announced \(2, 2\) torch.float32, came \(2, 3\)"):
        tensor_files.write(tmp_path / "new.safetensors", {"w": value})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_file_is_mapped_from_its_first_loaded_tensor_to_its_last(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        file.write_bytes(save({file.stem: torch.tensor([0, 1, 2], dtype=torch.uint16)}))

    def mapped():
        gc.collect()
        return [file.stem for file in files if str(file) in Path("/proc/self/maps").read_text()]

    tensors = tensor_files.read(*files)
    assert list(tensors) == ["0", "1"] and mapped() == []
    loaded = tensors["1"].load()
    assert loaded.tolist() == [0, 1, 2] and mapped() == ["1"]
    del tensors, loaded
    assert mapped() == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "index.json: has no weight_map"),
        ('{"weight_map": {}}', "index.json: has no weight_map"),
        ('{"weight_map": {"a": "model-0', "index.json: not JSON"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names '../x.safetensors', which is no file of this folder"),
        ('{"weight_map": {"a": 7}}', "hub lacks 7"),
    ],
)
def test_a_damaged_index_is_named(text, message, tmp_path):
    hub, _ = save_hub(tmp_path / "hub", max_shard_size="100KB")
    (hub / "model.safetensors.index.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fuse_checkpoint(hub, tmp_path / "out")


def test_of_two_models_in_a_folder_the_one_counts_that_is_loaded(tmp_path):
    hub, _ = save_hub(tmp_path / "hub", max_shard_size="100KB")
    other, model = save_hub(tmp_path / "other")
    rewrite(other, lambda tensors: tensors["model.norm.weight"].fill_(3))
    shutil.copy(other / "model.safetensors", hub)
    fused = fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    assert load(hub).model.norm.weight[0] == load(fused).model.norm.weight[0] == 3


def test_mixtral_is_spelled_otherwise(tmp_path):
    hub, _ = save_hub(tmp_path / "hub", "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in names(hub)
