"""A conversion that ends anywhere goes on where it was, to the same bytes, in memory bounded by a file."""

import fcntl
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.fork_server import fork
from tests.killed_conversions import convert_on_a_small_disk, convert_until, peak_over, settings_for
from tests.original_checkpoints import write_a14b, write_rest
from tests.original_wan import denoiser_shapes
from wan_finetune.cli import main
from wan_finetune.convert import planning
from wan_finetune.convert.job import convert
from wan_finetune.convert.planning import ConvertSettings
from wan_finetune.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    write_a14b(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(settings_for(checkpoint, out))
    return contents(out)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_in(folder):
    return {path: path.stat().st_ino for path in folder.rglob("*.safetensors")}


POINTS = [("bytes", 1), ("bytes", 173), ("before rename", 6), ("after rename", 8), ("verification", 1)]
MORE_POINTS = [
    ("bytes", 60), ("bytes", 400), ("before rename", 1), ("before rename", 21), ("after rename", 3),
    ("after rename", 15), ("before publishing", 1),
]  # fmt: skip
EARLY = [("bytes", 1), ("before rename", 1), ("after rename", 3)]
"""Points before the first file of weights is written down as finished."""


@pytest.mark.parametrize(
    ("point", "number"), [*POINTS, *(pytest.param(*point, marks=pytest.mark.slow) for point in MORE_POINTS)]
)
def test_a_killed_conversion_goes_on_and_redoes_nothing_that_was_finished(
    checkpoint, uninterrupted, tmp_path, point, number
):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    child = fork(convert_until, checkpoint, out, point, number, log=tmp_path / "log")
    assert child.wait() == -9, child.output
    assert not out.exists(), "no folder has the name before it is whole"
    journal = partial / ".journal.json"
    finished = set(json.loads(journal.read_text())["done"]) if journal.is_file() else set()
    before = weights_in(partial)
    convert(settings_for(checkpoint, out))
    assert contents(out) == uninterrupted
    assert not partial.exists()
    after = weights_in(out)
    kept = {name for name in finished if name.endswith(".safetensors")}
    assert all(after[out / name] == before[partial / name] for name in kept), "the same files, not new ones"
    assert kept or (point, number) in EARLY


def test_killed_after_the_name_was_given_the_folder_is_whole(checkpoint, uninterrupted, tmp_path):
    child = fork(convert_until, checkpoint, tmp_path / "out", "after publishing", 1, log=tmp_path / "log")
    assert child.wait() == -9, child.output
    has = contents(tmp_path / "out")
    assert {name: has[name] for name in uninterrupted} == uninterrupted


@pytest.fixture(scope="module")
def killed_late(checkpoint, tmp_path_factory):
    """OUT.partial of a conversion that was killed when all was written."""
    folder = tmp_path_factory.mktemp("killed")
    child = fork(convert_until, checkpoint, folder / "out", "before publishing", 1, log=folder / "log")
    assert child.wait() == -9, child.output
    return folder / "out.partial"


@pytest.mark.parametrize("damage", ["one bit", "shortened", "removed", "stray file"])
def test_a_file_damaged_in_between_is_made_again(checkpoint, uninterrupted, killed_late, tmp_path, damage):
    shutil.copytree(killed_late, tmp_path / "out.partial")
    file = sorted((tmp_path / "out.partial" / "transformer_2").glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    if damage == "one bit":
        data[-7] ^= 4
        file.write_bytes(data)
    elif damage == "shortened":
        file.write_bytes(data[:-1])
    elif damage == "removed":
        file.unlink()
    else:
        file.with_name("left over.safetensors.partial").write_bytes(b"x")
    convert(settings_for(checkpoint, tmp_path / "out"))
    assert contents(tmp_path / "out") == uninterrupted


def test_another_conversion_does_not_go_on_with_the_files_of_this_one(checkpoint, killed_late, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(killed_late, tmp_path / "out.partial")
    settings = settings_for(folder, tmp_path / "out")
    with pytest.raises(InputError, match="was begun with --dtype = bf16, and is asked to go on with fp16"):
        convert(settings.model_copy(update={"dtype": "fp16"}))
    (folder / "Wan2.1_VAE.pth").touch()
    with pytest.raises(InputError, match=r"was begun with other input files \(vae: Wan2.1_VAE.pth changed\)"):
        convert(settings)
    journal = tmp_path / "out.partial" / ".journal.json"
    journal.write_text("{")
    with pytest.raises(InputError, match="is damaged; remove"):
        convert(settings)
    journal.unlink()
    with pytest.raises(InputError, match="no record of a conversion; remove the folder"):
        convert(settings)


def test_two_conversions_do_not_write_into_one_folder(checkpoint, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another conversion writes there"):
            convert(settings_for(checkpoint, tmp_path / "out"))
    convert(settings_for(checkpoint, tmp_path / "out"))


@pytest.mark.parametrize("limit_bytes", [2_000, 20_000])
def test_a_full_disk_is_said_and_costs_only_the_file_being_written(checkpoint, uninterrupted, tmp_path, limit_bytes):
    child = fork(convert_on_a_small_disk, checkpoint, tmp_path / "out", limit_bytes, log=tmp_path / "log")
    assert child.wait() == 2, child.output
    assert "the disk is full; finished files stay in" in child.output and "Traceback" not in child.output
    assert not (tmp_path / "out").exists()
    convert(settings_for(checkpoint, tmp_path / "out"))
    assert contents(tmp_path / "out") == uninterrupted


@pytest.fixture(scope="module")
def forty_blocks(tmp_path_factory):
    """All true names of A14B's experts, in fp32 shards as published; widths scaled down, heads of 128 as there."""
    folder = tmp_path_factory.mktemp("forty") / "checkpoint"
    shapes = denoiser_shapes(dim=256, ffn_dim=704, num_layers=40, text_dim=32, freq_dim=256)
    assert len(shapes) == 1095
    generator = torch.Generator().manual_seed(0)
    for name in ("high_noise_model", "low_noise_model"):
        (folder / name).mkdir(parents=True)
        weights = {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        names = sorted(weights)
        places = {}
        for number in range(4):
            file = f"diffusion_pytorch_model-{number + 1:05d}-of-00004.safetensors"
            part = names[number::4]
            save_file({key: weights[key] for key in part}, folder / name / file)
            places |= dict.fromkeys(part, file)
        index = folder / name / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    write_rest(folder)
    return folder


def test_memory_is_bounded_by_a_shard_however_large_the_model(checkpoint, forty_blocks, tmp_path):
    shard_bytes = 20_000_000
    report = tmp_path / "peak"
    child = fork(peak_over, checkpoint, forty_blocks, tmp_path / "out", shard_bytes, report, log=tmp_path / "log")
    assert child.wait() == 0, child.output
    files = [path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")]
    peak = int(report.read_text())
    assert sum(files) > 7 * shard_bytes and max(files) > 0.9 * shard_bytes
    assert peak <= 2.5 * max(files), f"{peak / 1e6:.0f} MB over {max(files) / 1e6:.0f} MB"


def test_nothing_is_said_unless_someone_watches(checkpoint, tmp_path, capsys, monkeypatch):
    assert main(["convert", str(checkpoint), str(tmp_path / "a"), "--no-verify", "--flow-shift", "7"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out == f"{tmp_path / 'a'}: two experts, bf16, not verified\n"
    assert json.loads((tmp_path / "a/scheduler/scheduler_config.json").read_text())["flow_shift"] == 7
    for shift in ("inf", "nan", "-1"):
        assert main(["convert", str(checkpoint), str(tmp_path / "b"), "--flow-shift", shift]) == 2
        assert f"--flow-shift must be a number above 0, got {shift}" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["convert", str(checkpoint), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1/") and "transformer/diffusion_pytorch_model.safetensors" in lines[0]
    assert any("transformer_2 is the checkpoint's, to" in line for line in lines)


SWAPS = [
    ("denoiser_part", "blocks.1.attn1.to_q.weight", "blocks.1.attn1.to_k.weight", "transformer: block 1 differs by"),
    ("denoiser_part", "blocks.0.attn1.to_v.bias", "blocks.0.attn2.to_v.bias", "transformer: block 0 differs by"),
    (
        "text_encoder_part",
        "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
        "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
        "text_encoder: block 1 differs by",
    ),
    (
        "autoencoder_part",
        "decoder.up_blocks.0.resnets.1.norm1.gamma",
        "decoder.up_blocks.0.resnets.1.norm2.gamma",
        "vae: the decoder differs by",
    ),
    ("autoencoder_part", "encoder.down_blocks.9.norm1.gamma", "encoder.down_blocks.9.norm2.gamma", "vae: the encoder"),
]


@pytest.mark.parametrize(("maker", "one", "other", "message"), SWAPS)
def test_a_wrong_conversion_is_not_published(checkpoint, tmp_path, monkeypatch, maker, one, other, message):
    """Swapped names of equal shape pass every check but the arithmetic."""
    right = getattr(planning, maker)

    def swapped(*arguments):
        part = right(*arguments)
        exchange = {one: other, other: one}
        return replace(part, names={old: exchange.get(new, new) for old, new in part.names.items()})

    monkeypatch.setattr(planning, maker, swapped)
    settings = ConvertSettings(checkpoint=checkpoint, out=tmp_path / "out")
    with pytest.raises(RuntimeError, match=message):
        convert(settings)
    assert not (tmp_path / "out").exists()
