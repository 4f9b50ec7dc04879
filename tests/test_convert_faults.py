"""What cannot be converted is refused by name, with a reason, before anything is written."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.original_checkpoints import (
    INDEX,
    original_config,
    tiny_autoencoder,
    wide,
    write_a14b,
)
from wan_finetune.cli import main
from wan_finetune.convert import planning
from wan_finetune.convert.job import convert
from wan_finetune.convert.planning import ConvertSettings
from wan_finetune.errors import InputError

FIRST = "high_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors"
SECOND = "low_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors"
TEXT, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    write_a14b(folder)
    return folder


def change(file, edit):
    """Edit the tensors of a safetensors file."""
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


def change_pth(file, edit):
    weights = torch.load(file, weights_only=True)
    edit(weights)
    torch.save(weights, file)


def truncate(file, keep):
    with file.open("r+b") as stream:
        stream.truncate(int(keep * file.stat().st_size) if keep < 1 else file.stat().st_size - 1)


def claim(file, header):
    """A safetensors file that says something of itself, and has 64 bytes of numbers."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def config_says(folder, **changes):
    for expert in ("high_noise_model", "low_noise_model"):
        (folder / expert / "config.json").write_text(json.dumps(original_config(**changes)))


def without_index_key(folder):
    path = folder / "high_noise_model" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["blocks.0.unheard.weight"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def index_elsewhere(folder):
    path = folder / "high_noise_model" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] = {name: "../../secret.safetensors" for name in index["weight_map"]}
    path.write_text(json.dumps(index))


def other_tokenizer(folder):
    """One whose end of a text has another number."""
    path = folder / "google" / "umt5-xxl" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[1], vocabulary[3] = vocabulary[3], vocabulary[1]
    path.write_text(json.dumps(content))


def drop_block(weights):
    for name in [name for name in weights if name.startswith("blocks.0.")]:
        del weights[name]


def set_nan(weights):
    weights["blocks.0.ffn.2.weight"][3, 4] = torch.nan


FAULTS = {
    "no checkpoint": (lambda f: shutil.rmtree(f), "no such file or folder"),
    "empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "holds no checkpoint that is known"),
    "no low expert": (lambda f: shutil.rmtree(f / "low_noise_model"), "has high_noise_model/ but no low_noise_model/"),
    "no shard": (lambda f: (f / FIRST).unlink(), "00001-of-00002.safetensors of 2 shards not there"),
    "no text encoder": (lambda f: (f / TEXT).unlink(), "holds no text encoder"),
    "no autoencoder": (lambda f: (f / VAE).unlink(), "holds no autoencoder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "google"), "there is no tokenizer"),
    "damaged tokenizer": (
        lambda f: (f / "google/umt5-xxl/tokenizer.json").write_text('{"model": '),
        "the tokenizer does not load",
    ),
    "another tokenizer": (other_tokenizer, "does not end a text as UMT5's tokenizer does"),
    "two text encoders": (lambda f: shutil.copy(f / TEXT, f / "models_t5_b.pth"), "more than one text encoder"),
    "empty shard": (lambda f: (f / FIRST).write_bytes(b""), "no safetensors file"),
    "shard short by a byte": (lambda f: truncate(f / FIRST, 1), "damaged: has"),
    "half a shard": (lambda f: truncate(f / SECOND, 0.5), "00002-of-00002.safetensors: damaged: has"),
    "half a text encoder": (lambda f: truncate(f / TEXT, 0.5), "damaged, or not written by torch.save"),
    "half an autoencoder": (lambda f: truncate(f / VAE, 0.9), "damaged, or not written by torch.save"),
    "text for a shard": (lambda f: (f / FIRST).write_text("404 not found, " * 9), "missing, cut or oversized"),
    "huge claim": (lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "cut or oversized"),
    "overlap": (
        lambda f: claim(f / FIRST, {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}),
        "does not begin where",
    ),
    "shape claim": (
        lambda f: claim(f / FIRST, {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 64]}}),
        "its shape asks",
    ),
    "unknown type": (
        lambda f: claim(f / FIRST, {"a": {"dtype": "F4", "shape": [64], "data_offsets": [0, 64]}}),
        "unknown kind of entry",
    ),
    "index of another": (without_index_key, "does not hold blocks.0.unheard.weight, as the index says"),
    "index outside": (index_elsewhere, "'../../secret.safetensors' is no file name"),
    "unexpected weight": (
        lambda f: change_pth(f / TEXT, lambda w: w.update({"blocks.0.unheard": torch.ones(1)})),
        "blocks.0.unheard is not of this model",
    ),
    "missing weight": (
        lambda f: change_pth(f / VAE, lambda w: w.pop("decoder.upsamples.7.time_conv.bias")),
        "decoder.up_blocks.1.upsamplers.0.time_conv.bias not there",
    ),
    "odd shape": (
        lambda f: change_pth(f / VAE, lambda w: w.update({"conv1.bias": torch.ones(31)})),
        "conv1.bias has the shape [31], the model asks [32]",
    ),
    "not a number": (lambda f: change(f / FIRST, set_nan), "blocks.0.ffn.2.weight has a number that is not finite"),
    "infinity": (
        lambda f: change(f / FIRST, lambda w: w["blocks.0.ffn.2.bias"].fill_(-torch.inf)),
        "blocks.0.ffn.2.bias has a number that is not finite",
    ),
    "integers": (
        lambda f: change_pth(f / VAE, lambda w: w.update({"conv1.bias": torch.ones(32, dtype=torch.int32)})),
        "conv1.bias is int32",
    ),
    "nested .pth": (
        lambda f: torch.save({"model": tiny_autoencoder()}, f / VAE),
        "is not a plain dictionary of tensors",
    ),
    "list in .pth": (lambda f: torch.save([torch.ones(1)], f / VAE), "is not a plain dictionary of tensors"),
    "offsets of text": (
        lambda f: claim(f / FIRST, {"a": {"dtype": "F32", "shape": [16], "data_offsets": ["0", {}]}}),
        "unknown kind of entry",
    ),
    "nested table": (
        lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "its table is no JSON",
    ),
    "a block of the text encoder": (
        lambda f: change_pth(f / TEXT, lambda w: w.update({"blocks.4000000000.norm1.weight": torch.ones(32)})),
        "block 2 of 4000000001 is missing",
    ),
    "a block of an expert": (
        lambda f: [change(f / name, drop_block) for name in (FIRST, FIRST.replace("00001", "00002", 1))],
        "does not hold blocks.0.",
    ),
    "heads in words": (lambda f: config_says(f, num_heads="two"), "num_heads is 'two', which is no such number"),
    "config of another": (lambda f: config_says(f, dim=32), "dim is 32, the weights beside it show 24"),
    "heads": (lambda f: config_says(f, num_heads=5), "cannot be shared by 5 heads"),
    "i2v by config": (lambda f: config_says(f, model_type="i2v"), "model_type is 'i2v'"),
    "bad config": (lambda f: (f / "high_noise_model/config.json").write_text("{"), "is no readable JSON"),
    "2.2's autoencoder": (
        lambda f: change_pth(f / VAE, lambda w: w.update({"conv2.weight": torch.ones(48, 48, 1, 1, 1)})),
        "has 48 latent channels; it is TI2V-5B's",
    ),
    "swapped .pth": (lambda f: shutil.copy(f / VAE, f / TEXT), "is no text encoder of Wan"),
    "diffusers folder": (lambda f: (f / "model_index.json").write_text("{}"), "is a diffusers folder already"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_leaves_nothing_that_looks_whole(original, tmp_path, capsys, fault):
    folder = tmp_path / "checkpoint"
    shutil.copytree(original, folder)
    damage, message = FAULTS[fault]
    damage(folder)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    # A number can only be seen when it is read; all else is refused before the first byte is written.
    assert fault in ("not a number", "infinity") or not (tmp_path / "out.partial").exists()


class Payload:
    """A pickle that would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("file", [TEXT, VAE])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(original, tmp_path, capsys, file, legacy):
    folder = tmp_path / "checkpoint"
    shutil.copytree(original, folder)
    payload = {"conv1.weight": Payload(f"touch {tmp_path}/was_run")}
    if legacy:
        (folder / file).write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, folder / file)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "refused" in said if not legacy else "damaged, or not written by torch.save" in said or "refused" in said
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "out").exists()


def test_one_expert_under_both_names_is_refused(original, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(original, folder)
    shutil.rmtree(folder / "low_noise_model")
    shutil.copytree(folder / "high_noise_model", folder / "low_noise_model")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "hold the same weights; the two experts differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_too_large_for_fp16_are_refused(original, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(original, folder)
    change(folder / FIRST, lambda weights: weights["blocks.0.ffn.2.weight"].fill_(7e4))
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "fp16"]) == 2
    assert "blocks.0.ffn.2.weight has a number that is too large for float16" in capsys.readouterr().err


def test_what_exists_is_not_written_over(original, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["convert", str(original), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(original), str(tmp_path / "no" / "such" / "folder"), "--max-shard-size", "much"]) == 2
    assert "'much' is no size" in capsys.readouterr().err


def test_too_small_a_disk_is_said_before_the_first_byte(original, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage)
    assert main(["convert", str(original), str(tmp_path / "out")]) == 2
    assert "0.1 GB are needed and 0.0 GB are free" in capsys.readouterr().err
    assert not list((tmp_path / "out.partial").rglob("*.safetensors"))
    monkeypatch.undo()
    assert main(["convert", str(original), str(tmp_path / "out"), "--dtype", "fp16", "--no-verify"]) == 0


def test_a_components_folder_without_the_parts_is_refused(original, tmp_path):
    save_file(wide(), tmp_path / "wan.safetensors")
    settings = {"checkpoint": tmp_path / "wan.safetensors", "out": tmp_path / "out"}
    with pytest.raises(InputError, match="has no text_encoder/"):
        convert(ConvertSettings(**settings, components_from=original))
    for part in ("text_encoder", "tokenizer", "vae"):
        (tmp_path / "other" / part).mkdir(parents=True)
        (tmp_path / "other" / part / "model.safetensors").write_bytes(b"x")
    kinds = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "X"],
        "vae": ["diffusers", "Y"],
    }
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(kinds))
    with pytest.raises(InputError, match="its text_encoder is a CLIPTextModel"):
        convert(ConvertSettings(**settings, components_from=tmp_path / "other"))
