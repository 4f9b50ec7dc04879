"""What a run shows on the way: figures, previews, trackers; none of it moves the training."""

import io
import socket
import time

import pytest
import torch
from rich.console import Console

import train.terminal
from tests.tiny_runs import train_and_watch
from train.effect import effect_size
from train.panel import Figures, duration
from train.previews import Previews
from train.records import StepRecord
from train.rounds import Stretch
from train.showcase import midway_folder
from train.state import ExpertState
from wan_finetune.adapters import inject_lora, lora_weights, set_lora_weights
from wan_finetune.experts import LOW, load_expert
from wan_finetune.lora import LoraSettings


def record(step, loss=0.5, seconds=2.0):
    return StepRecord(
        expert="high", step=step, loss=loss, gradient_norm=0.25, learning_rate=1e-4, seconds=seconds,
        tokens_per_second=16_380.0, stall_seconds=0.1, memory_gib=31.24,
    )  # fmt: skip


def test_the_panel_tells_loss_pace_and_what_is_left():
    figures = Figures({"high": 100, "low": 100}, {"high": 0, "low": 40})
    figures.begin()
    for step, loss in ((1, 0.4), (2, 0.6)):
        figures.add(record(step, loss))
    assert figures.note() == "loss 0.5000  2.00 s/step"
    assert figures.details(record(2), None) == (
        "lr 1.0e-04  |  gradient 0.25  |  16,380 tokens/s  |  waiting for data 5%  |  31.2 GiB  |  "
        "run 21%, 5 min left"  # 158 steps of 2 s
    )
    assert [duration(s) for s in (12, 89.6, 600, 5400, 93_600)] == [
        "12 s",
        "90 s",
        "10 min",
        "1 h 30 min",
        "26 h 00 min",
    ]


def test_a_terminal_has_one_live_panel_and_a_pipe_a_line_now_and_then(monkeypatch, capsys):
    with train.terminal.progress_bar("low expert, steps 1-8", 8) as bar:
        for step in range(1, 9):
            bar.update(step, "loss 0.1", "details")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines] == ["2/8", "4/8", "6/8", "8/8"] and "details" not in "".join(lines)
    screen = io.StringIO()
    monkeypatch.setattr(train.terminal, "console", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with train.terminal.progress_bar("low expert, steps 1-8", 8) as bar:
        bar.update(8, "loss 0.1", "lr 1e-4  |  details")
    assert "8/8" in screen.getvalue() and "lr 1e-4  |  details" in screen.getvalue()
    # Processes of one launcher share its terminal.
    monkeypatch.setenv("RANK", "1")
    seen = screen.getvalue()
    with train.terminal.progress_bar("low expert, steps 1-8", 8) as bar:
        bar.update(8, "loss 0.1", "details")
        train.terminal.say("a line")
    assert screen.getvalue() == seen


def test_the_effect_size_is_the_updates_share_of_the_weights(tiny_base):
    model = load_expert(tiny_base, LOW, torch.float32)
    inject_lora(model, LoraSettings(rank=4, alpha=8, targets=("attn1.to_q", "ffn.net.2")), "low", 0)
    assert effect_size(model) == 0.0
    weights = {name: torch.randn_like(value) for name, value in lora_weights(model).items()}
    set_lora_weights(model, weights)
    ratios = []
    for name in (n.removesuffix(".lora_A.weight") for n in weights if "lora_A" in n):
        update = 2.0 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        ratios.append(update.norm() / model.get_submodule(name).base_layer.weight.norm())
    assert effect_size(model) == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-5)


def previews_of(make_config, *overrides):
    config = make_config("train.round_steps=2", "high.steps=8", "low.steps=8", *overrides)
    return config, Previews(config, lambda files: None)


def after(high, low):
    return {"high": ExpertState(step=high), "low": ExpertState(step=low)}


@pytest.mark.parametrize(
    ("wish", "wanted"),
    [("none", []), ("midway", ["midway"]), ("rounds", ["step-000004", "midway", "step-000012"])],
)
def test_previews_come_when_they_are_wished_for(make_config, wish, wanted):
    config, previews = previews_of(make_config, f"train.previews='{wish}'")
    made = []
    for number in range(4):
        for expert, reached in (("high", (2 * number + 2, 2 * number)), ("low", (2 * number + 2, 2 * number + 2))):
            if target := previews.folder(Stretch(expert, 2 * number, 2 * number + 2, number), after(*reached)):
                target.mkdir(parents=True)
                made.append(target.name)
    assert made == wanted and (midway_folder(config).is_dir() == ("midway" in wanted))


def test_previews_after_rounds_keep_to_their_share_of_the_time(make_config):
    _, previews = previews_of(make_config, "train.previews='rounds'", "train.preview_share=0.25")
    previews.began = time.monotonic() - 100
    previews.spent_seconds, previews.last_seconds = 20.0, 10.0
    stretch = Stretch("low", 0, 2, 0)
    assert previews.folder(stretch, after(2, 2)) is None  # 30 s of 100 would be more than a quarter
    previews.began -= 30
    assert previews.folder(stretch, after(2, 2)) is not None


def test_a_preview_that_does_not_fit_costs_no_run(make_config, monkeypatch, capsys):
    _, previews = previews_of(make_config, "train.previews='rounds'")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("train.previews.make_clips", full)
    target = previews.folder(Stretch("low", 0, 2, 0), after(2, 2))
    previews.make(target, [])
    assert "no step-000004 preview: out of memory; training goes on" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr("train.previews.make_clips", lambda *a: [][0])
    with pytest.raises(IndexError):
        previews.make(target, [])


def stored_by(tracker, config):
    """All that a tracker has on the disk."""
    if tracker == "trackio":
        from trackio.utils import TRACKIO_DIR

        files = [file for file in TRACKIO_DIR.rglob("*") if file.is_file()]
    else:
        pattern = {"wandb": "*.wandb", "tensorboard": "events.out.*"}[tracker]
        files = list((config.run_folder / "tracker").rglob(pattern))
    return b"".join(file.read_bytes() for file in files)


@pytest.fixture
def only_this_machine(monkeypatch):
    """A connection to another machine fails; what was tried is told."""
    connect, tried = socket.socket.connect, []

    def local(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            tried.append(address)
            raise OSError(f"no way to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    return tried


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_gets_the_figures_and_no_path_or_machine(make_config, monkeypatch, tracker, only_this_machine):
    monkeypatch.setenv("WANDB_MODE", "offline")
    secrets = ["f" * 40, "hf_" + "t" * 34, "a-person-logged-in"]
    monkeypatch.setenv("WANDB_API_KEY", secrets[0])
    monkeypatch.setenv("HF_TOKEN", secrets[1])
    monkeypatch.setattr("huggingface_hub.whoami", lambda **_: {"name": secrets[2]})
    config = make_config(f"tracking.tracker={tracker}", "high.steps=2", "low.steps=2", "train.round_steps=1")
    _, metrics = train_and_watch(config)
    metrics.accelerator.end_training()
    deadline = time.monotonic() + 30
    while True:
        content = stored_by(tracker, config)
        if b"low/held_out_loss" in content and b"high/tokens_per_second" in content:
            break
        assert time.monotonic() < deadline, "the tracker stored nothing"
        time.sleep(0.1)
    assert tracker == "tensorboard" or b"samples/" in content  # the clips of the preview midway
    for secret in (str(config.run.folder), str(train.terminal.__file__), "pytest", *secrets):
        assert secret.encode() not in content, secret
    # tensorboard puts the machine's name into the file's own, which stays here; a short one is in any file by chance.
    machine = socket.gethostname().encode()
    assert tracker == "tensorboard" or len(machine) < 6 or machine not in content
    assert only_this_machine == []
    if tracker == "trackio":
        check_what_trackio_shows(config)


def check_what_trackio_shows(config):
    """By its own reader: each figure under its expert's name, and nothing of the machine."""
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(config.tracking.project, config.run.name)
    named = {key for row in rows for key in row} - {"timestamp", "step"}
    assert named and all(key.startswith(("high/", "low/", "samples/")) for key in named), named
    assert {row["high/step"] for row in rows if "high/loss" in row} == {1, 2}
    assert SQLiteStorage.get_system_logs(config.tracking.project, config.run.name) == []
