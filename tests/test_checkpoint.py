"""Checkpoints: whole or not there, judged before they are used, and never too few."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.disk_faults import largest_file, small_disk
from tests.tiny_runs import same
from train.checkpoint import MANIFEST, States, found, resume, save_checkpoint, sole_writer, verify
from train.config import TrainSettings
from train.identity import Identity
from train.optimizer_state import configuration_stays, flatten_optimizer, unflatten_optimizer
from train.state import ExpertState
from wan_finetune.errors import InputError

IDENTITY = Identity(values={"train.experts": ["high", "low"], "x": 1}, samples=torch.arange(6).reshape(3, 2))
FILES = [
    *[f"{expert}/{name}" for expert in ("high", "low") for name in ("adapter.safetensors", "optimizer.safetensors")],
    *["high/state.json", "low/state.json", "samples.safetensors", MANIFEST],
]
DAMAGES = ["empty", "one byte short", "half", "one bit", "deleted", "another step's"]


def states_of(step: int, size: int = 2) -> States:
    """Both experts after `step` steps each, with `size` x `size` weights."""
    group = {"lr": 0.1, "betas": [0.9, 0.99], "params": [0]}
    return {
        name: ExpertState(
            step=step,
            weights={"blocks.0.x.lora_A.weight": torch.full((size, size), step + offset)},
            optimizer={
                "state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((size, size), step + offset)}},
                "param_groups": [group],
            },
        )
        for name, offset in (("high", 0.25), ("low", 0.5))
    }


def load(folder: Path) -> States:
    return resume(folder, IDENTITY, Accelerator(cpu=True))


def damage(path: Path, how: str, other: Path) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "another step's":
        shutil.copy(other, path)
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(
            {"empty": b"", "one byte short": content[:-1], "half": content[: len(content) // 2], "one bit": flipped}[
                how
            ]
        )


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_one_before(tmp_path, file, how, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, states_of(step), IDENTITY, keep=2)
    assert sorted(FILES) == sorted(
        str(p.relative_to(tmp_path / "step-000004")) for p in (tmp_path / "step-000004").rglob("*") if p.is_file()
    )
    damage(tmp_path / "step-000004" / file, how, tmp_path / "step-000002" / file)
    loaded = load(tmp_path)
    if (file, how) == ("samples.safetensors", "another step's"):  # which is the same file
        assert loaded["high"].step == 2
        return
    assert all(same(loaded[name], state) for name, state in states_of(1).items())
    told = capsys.readouterr().out
    assert "checkpoint step-000004 is damaged" in told and file in told


def test_every_byte_of_a_manifest_counts(tmp_path):
    save_checkpoint(tmp_path, states_of(1), IDENTITY, keep=2)
    path = tmp_path / "step-000002" / MANIFEST
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert verify(path.parent), f"bit {place % 8} of byte {place}"


def test_when_every_checkpoint_is_damaged_the_run_stops_instead_of_starting_anew(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, states_of(step), IDENTITY, keep=2)
        (tmp_path / f"step-{2 * step:06d}" / "high" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"no checkpoint is whole .*step-000004: high/adapter.*step-000002: high/adapt"
    ):
        load(tmp_path)


def test_a_checkpoint_of_another_format_is_refused_by_its_number(tmp_path):
    old = tmp_path / "step-000004"
    old.mkdir()
    (old / MANIFEST).write_text(json.dumps({"fingerprint": "abc", "files": {}}))
    with pytest.raises(
        InputError, match=r"step-000004: format 1 of another version .* reads format 2\. Finish the run"
    ):
        load(tmp_path)


def test_a_checkpoint_that_is_still_there_when_the_run_comes_by_again_is_replaced(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, states_of(step), IDENTITY, keep=2)
    (tmp_path / "step-000004" / "low" / "state.json").unlink()
    save_checkpoint(tmp_path, states_of(2), IDENTITY, keep=2)
    assert [verify(path) for path in found(tmp_path)] == [None, None]


def test_damaged_checkpoints_do_not_crowd_out_the_good_ones(tmp_path):
    for step in (1, 3, 4):
        save_checkpoint(tmp_path, states_of(step), IDENTITY, keep=3)
    for name in ("step-000006", "step-000008"):
        (tmp_path / name / MANIFEST).unlink()
    # The run went on from step 2, with more checkpoints than before.
    save_checkpoint(tmp_path, states_of(2), IDENTITY, keep=2)
    assert [path.name for path in found(tmp_path) if verify(path) is None] == ["step-000004", "step-000002"]
    assert load(tmp_path)["high"].step == 2


def test_a_whole_checkpoint_is_there_at_every_instant(tmp_path, monkeypatch):
    """Looked at before each change of the folder, and at the end; between two changes nothing happens to it."""
    instants = []
    watching = True

    def look(event: str, arguments: tuple) -> None:
        if watching and event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"):
            instants.append((event, [path.name for path in found(tmp_path) if verify(path) is None]))

    save_checkpoint(tmp_path, states_of(1), IDENTITY, keep=2)
    sys.addaudithook(look)
    for step in range(2, 7):
        save_checkpoint(tmp_path, states_of(step), IDENTITY, keep=2)
        if step == 4:
            (tmp_path / "step-000008" / MANIFEST).write_bytes(b"")
            save_checkpoint(tmp_path, states_of(step), IDENTITY, keep=2)
    watching = False
    assert all(whole for _, whole in instants)
    assert {"os.rename", "os.remove", "os.rmdir", "os.mkdir"} <= {event for event, _ in instants}
    assert [path.name for path in found(tmp_path)] == ["step-000012", "step-000010"]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_to_keep_the_last_one_alone_is_refused():
    with pytest.raises(ValueError, match="keep_checkpoints"):
        TrainSettings(keep_checkpoints=1)


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path):
    for name in (".step-000002.partial", ".step-000001.retired"):
        (tmp_path / name / "high").mkdir(parents=True)
        (tmp_path / name / "high" / "adapter.safetensors").write_bytes(b"half")
    assert load(tmp_path) == {}
    save_checkpoint(tmp_path, states_of(1), IDENTITY, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("part", range(12))
def test_a_write_that_fails_anywhere_says_what_it_needs_and_leaves_the_earlier_whole(tmp_path, part):
    save_checkpoint(tmp_path, states_of(1, size=64), IDENTITY, keep=2)
    before = total_bytes(tmp_path)
    largest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    with largest_file(largest * part // 12), pytest.raises(InputError) as caught:
        save_checkpoint(tmp_path, states_of(2, size=64), IDENTITY, keep=2)
    message = str(caught.value)
    assert f"{tmp_path / 'step-000004'}: the checkpoint could not be written" in message and "too large" in message
    # Two experts, each with a weight and an average of 64 x 64 floats; the rest is small.
    assert 4 * 64 * 64 * 4 <= int(message.split("needs about ")[1].split()[0]) <= 4 * 64 * 64 * 4 + 1000
    assert f"bytes are free in {tmp_path}" in message
    assert total_bytes(tmp_path) == before and not list(tmp_path.glob(".*"))
    assert load(tmp_path)["high"].step == 1
    save_checkpoint(tmp_path, states_of(2, size=64), IDENTITY, keep=2)
    assert load(tmp_path)["high"].step == 2


def test_a_full_disk_says_what_is_free_and_leaves_the_earlier_whole(tmp_path):
    with small_disk(tmp_path, 2 << 20):
        # 4 x 256 x 256 floats are a MiB: one fits, and the second does not.
        save_checkpoint(tmp_path, states_of(1, size=256), IDENTITY, keep=2)
        with pytest.raises(InputError, match="No space left on device") as caught:
            save_checkpoint(tmp_path, states_of(2, size=256), IDENTITY, keep=2)
        need, free = (int(str(caught.value).split(word)[1].split()[0]) for word in ("about ", "bytes, and "))
        assert free < 1 << 20 <= need
        assert free == shutil.disk_usage(tmp_path).free
        assert load(tmp_path)["high"].step == 1


@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, what):
    save_checkpoint(tmp_path, states_of(1), IDENTITY, keep=2)
    states = states_of(2)
    held = states["low"].weights if what == "weights" else states["low"].optimizer["state"][0]
    next(value for value in held.values() if value.ndim)[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"low expert, step 2: .* is not finite .* \(low\.learning_rate\)"):
        save_checkpoint(tmp_path, states, IDENTITY, keep=2)
    assert load(tmp_path)["low"].step == 1


def test_a_run_has_one_writer(tmp_path):
    folder = tmp_path / "runs" / "brand" / "checkpoints"
    with sole_writer(folder):
        child = os.fork()
        if child == 0:
            try:
                with sole_writer(folder):
                    os._exit(1)
            except InputError as error:
                os._exit(0 if "brand: another process is training this run" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with sole_writer(folder):
        pass


@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_survives_the_files_and_keeps_what_the_configuration_says(steps):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 3)) for _ in range(3)]

    def optimizer(decay: float) -> torch.optim.Optimizer:
        groups = [{"params": weights[:1], "lr": torch.tensor(0.1)}, {"params": weights[1:]}]
        return torch.optim.AdamW(groups, lr=0.2, betas=(0.8, 0.9), weight_decay=decay, foreach=False)

    first = optimizer(decay=0.1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(3, 3)
        first.step()
    tensors, plain = flatten_optimizer(first.state_dict())
    read = unflatten_optimizer(tensors, json.loads(json.dumps(plain)))
    second = optimizer(decay=0.3)
    with configuration_stays(second):
        second.load_state_dict(read)
    assert [group["weight_decay"] for group in second.param_groups] == [0.3, 0.3]
    assert [float(group["lr"]) for group in second.param_groups] == [pytest.approx(0.1), 0.2]
    for before, after in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before | after)
