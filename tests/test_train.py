"""The trainer's promises: independent experts, addressed draws, exact resume, and nothing that moves them."""

import copy
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from data.sources import make_folder
from tests.tiny_runs import close, same, train
from train.checkpoint import found, load_checkpoint, save_checkpoint
from train.config import Config
from train.engine import make_accelerator
from train.job import run, training_fingerprint
from train.objective import weighted_loss
from train.optim import learning_rate
from train.precompute import prepare_data
from train.rounds import stretches
from train.signals import Stopped, StopRequest
from train.trainer import ExpertState, ExpertTrainer, StepRecord
from wan_finetune.adapters import dead_modules
from wan_finetune.encoders import TextEncoder, pad_text
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder
from wan_finetune.pipeline import load_pipeline
from wan_finetune.settings import load_settings

ROOT = Path(__file__).parent.parent


def test_rounds_sequence_and_one_at_a_time_give_the_same_bytes(make_config):
    rounds = train(make_config("run.name='rounds'"))
    sequence = train(make_config("run.name='sequence'", "train.order='sequence'"))
    high = train(make_config("run.name='high'", "train.experts=['high']"))
    low = train(make_config("run.name='low'", "train.experts=['low']"))
    assert same(rounds["high"], sequence["high"]) and same(rounds["low"], sequence["low"])
    assert same(rounds["high"], high["high"]) and same(rounds["low"], low["low"])
    assert high.keys() == {"high"} and low.keys() == {"low"}


def test_both_experts_learn_in_every_module(make_config):
    states = train(make_config())
    for state in states.values():
        assert not dead_modules(state.weights)
    name = next(iter(states["high"].weights))
    assert not torch.equal(states["high"].weights[name], states["low"].weights[name])


def test_stills_masks_regularisation_and_batches_by_tokens_train_together(make_config, shared, tmp_path, monkeypatch):
    make_folder(shared / "ember", "wan_finetune.pocket.brand:ember")
    look = tmp_path / "look"
    look.mkdir()
    for number in range(2):
        for suffix in (".mp4", ".txt"):
            shutil.copy(shared / "ember" / f"clip-{number:02d}{suffix}", look / f"{number}{suffix}")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(look / "0.mask.png")
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(look / "still.png")
    (look / "still.txt").write_text("a grey wall")
    loaded: dict[str, list] = {"high": [], "low": []}
    load = ExpertTrainer.load_step

    def noted(self, step):
        work = load(self, step)
        loaded[self.expert] += work.micro_batches
        return work

    monkeypatch.setattr(ExpertTrainer, "load_step", noted)
    config = make_config(
        f"data.sources=[{{path='{look}', repeats=10}}, "
        f"{{path='{shared / 'ember'}', regularisation=true, loss_weight=0.5}}]",
        "data.buckets=['64x64x9', '64x64x1']",
        "data.windows='random'",
        "train.batch_tokens=96",
        "high.steps=8",
        "low.steps=24",  # a whole cycle: 22 batches of videos, 2 of stills
    )
    states = train(config)
    assert not any(dead_modules(state.weights) for state in states.values())
    # 48 tokens a clip, 16 a still.
    sizes = {batch.latents.shape[2:]: len(batch.names) for batches in loaded.values() for batch in batches}
    assert sizes == {(3, 8, 8): 2, (1, 8, 8): 6}
    assert {batch.latents.shape[2] for batch in loaded["high"]} == {3}
    places = [place for batches in loaded.values() for batch in batches for place in batch.weights.tolist()]
    assert set(places) == {1.0, 0.5}
    assert any(batch.masks is not None and batch.masks.min() == 0 for batch in loaded["high"])


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_run_that_was_stopped_anywhere_ends_as_the_uninterrupted_one(make_config, stop_at, monkeypatch):
    whole = train(make_config("run.name='whole'"))
    config = make_config("run.name='stopped'")
    taken = 0
    step = ExpertTrainer.take_step

    def stop_after(self):
        nonlocal taken
        record = step(self)
        taken += 1
        if taken == stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return record

    monkeypatch.setattr(ExpertTrainer, "take_step", stop_after)
    with pytest.raises(Stopped):
        train(config)
    assert taken == stop_at
    monkeypatch.setattr(ExpertTrainer, "take_step", step)
    resumed = train(config)
    assert all(same(whole[name], resumed[name]) for name in whole)
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["expert"], line["step"]) for line in lines] == [
        (s.expert, step) for s in stretches(config.steps(), "rounds", 2) for step in range(s.start + 1, s.stop + 1)
    ]


def test_nothing_that_is_watched_or_saved_moves_the_training(make_config):
    plain = train(make_config("run.name='plain'", "sampling.prompts=[]", "train.checkpoint_every_steps=100"))
    torch.manual_seed(99)
    watched = train(make_config("run.name='watched'", "train.checkpoint_every_steps=1", "sampling.seeds=[1, 2]"))
    assert (make_config("run.name='watched'").run_folder / "samples" / "midway" / "manifest.json").is_file()
    assert all(same(plain[name], watched[name]) for name in plain)


def test_accumulation_gives_the_batch_that_it_stands_for(make_config):
    whole = train(make_config("run.name='whole'", "train.batch_size=4", "high.steps=2", "train.experts=['high']"))
    parts = train(
        make_config(
            "run.name='parts'",
            "train.batch_size=1",
            "train.gradient_accumulation=4",
            "high.steps=2",
            "train.experts=['high']",
        )
    )
    assert close(whole["high"], parts["high"])


def test_gradient_checkpointing_changes_nothing(make_config):
    plain = train(make_config("run.name='plain'", "train.experts=['low']"))
    checkpointed = train(make_config("run.name='checkpointed'", "train.experts=['low']", "memory.checkpointing='full'"))
    assert close(plain["low"], checkpointed["low"])


def test_a_loss_that_is_not_finite_stops_before_the_update(make_config, monkeypatch):
    config = make_config("high.learning_rate=0.1")
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    load = ExpertTrainer.load_step

    def poisoned(self, step):
        work = load(self, step)
        if step == 1:
            work.micro_batches[0].latents[0, 0, 0, 0, 0] = float("nan")
        return work

    monkeypatch.setattr(ExpertTrainer, "load_step", poisoned)
    trainer = ExpertTrainer(config, "high", ExpertState(), base_folder(config.model.base), data, accelerator)
    trainer.take_step()
    trainer.save_state()
    before = copy.deepcopy(trainer.state.weights)
    with pytest.raises(FloatingPointError, match=r"high expert, step 2: loss nan.*clip-\d\d.mp4"):
        trainer.take_step()
    trainer.save_state()
    assert trainer.state.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.state.weights.items())


def test_masks_and_weights_change_the_loss_as_they_say():
    errors = torch.rand(2, 3, 2, 4, 4)
    plain = weighted_loss(errors, None, torch.ones(2))
    assert torch.allclose(plain, errors.mean())
    assert torch.equal(weighted_loss(errors, torch.ones(2, 2, 4, 4), torch.ones(2)), plain)
    left = torch.zeros(2, 2, 4, 4)
    left[..., :2] = 1
    assert torch.allclose(weighted_loss(errors, left, torch.ones(2)), errors[..., :2].mean())
    # A regularisation clip of a quarter's weight, beside one of full weight.
    weighted = weighted_loss(errors, None, torch.tensor([1.0, 0.25]))
    assert torch.allclose(weighted, (errors[0].mean() + 0.25 * errors[1].mean()) / 2)
    assert weighted_loss(errors, torch.zeros(2, 2, 4, 4), torch.ones(2)) == 0


def states_of(step: int) -> dict[str, ExpertState]:
    weights = {"blocks.0.x.lora_A.weight": torch.full((2, 2), float(step))}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}
    optimizer = {
        "state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(2, 2)}},
        "param_groups": [group],
    }
    return {"high": ExpertState(step=step, weights=weights, optimizer=optimizer), "low": ExpertState()}


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "deleted"])
@pytest.mark.parametrize(
    "file", ["high/adapter.safetensors", "high/optimizer.safetensors", "high/state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, file, damage, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, states_of(step), "f", keep=2)
    path = tmp_path / "step-000002" / file
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "short": content[:-1], "flipped": flipped}[damage])
    # A bit flipped in the manifest may hit white space or a name's letter; what is loaded must be right in any case.
    loaded = load_checkpoint(tmp_path, "f")
    assert loaded is not None and loaded["high"].step == 1
    assert same(loaded["high"], states_of(1)["high"])
    assert "step-000002 is damaged" in capsys.readouterr().out


def test_when_every_checkpoint_is_damaged_the_run_stops_instead_of_starting_anew(tmp_path):
    save_checkpoint(tmp_path, states_of(1), "f", keep=2)
    (tmp_path / "step-000001" / "high" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is whole"):
        load_checkpoint(tmp_path, "f")


def test_old_checkpoints_go_only_after_the_new_one_is_published(tmp_path):
    for step in range(1, 5):
        save_checkpoint(tmp_path, states_of(step), "f", keep=2)
        assert found(tmp_path)[0].name == f"step-{step:06d}"
    assert [p.name for p in found(tmp_path)] == ["step-000004", "step-000003"]
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_configuration_is_refused(make_config):
    config = make_config()
    train(config)
    with pytest.raises(InputError, match="another configuration"):
        train(make_config("lora.rank=2"))


def test_the_learning_rate_is_a_function_of_the_step(make_config):
    settings = make_config("optimizer.warmup_steps=10", "optimizer.schedule='cosine'").optimizer
    rates = [learning_rate(step, 1.0, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:])) and rates[-1] < 0.01
    constant = make_config("optimizer.warmup_steps=0", "optimizer.schedule='constant'").optimizer
    assert {learning_rate(step, 0.5, 100, constant) for step in range(100)} == {0.5}


def test_every_step_of_every_expert_is_in_one_stretch():
    for order in ("rounds", "sequence"):
        steps = {"high": 7, "low": 12}
        seen = [(s.expert, step) for s in stretches(steps, order, 5) for step in range(s.start, s.stop)]
        assert sorted(seen) == sorted((name, step) for name, total in steps.items() for step in range(total))


def test_text_is_what_the_pipeline_gives_the_denoiser(tiny_base):
    pipe = load_pipeline(str(tiny_base), device="cpu")
    captions = ["  A red&nbsp;star   moves up ", "日落前，一个蓝色的星星向右移动。", ""]
    wanted, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)
    encoder = TextEncoder(tiny_base, torch.device("cpu"), torch.float32)
    assert torch.allclose(pad_text([encoder(caption) for caption in captions]), wanted, atol=1e-5)


def test_the_fingerprint_holds_what_decides_the_bytes(make_config):
    config = make_config()
    data = prepare_data(config, make_accelerator(config))
    same_run = ["train.checkpoint_every_steps=7", "sampling.steps=3", "run.name='b'", "train.order='sequence'"]
    other_run = ["run.seed=1", "lora.alpha=3", "flow.shift=4.0", "low.learning_rate=1e-5", "data.caption_dropout=0.5"]
    first = training_fingerprint(config, data)
    assert all(training_fingerprint(make_config(change), data) == first for change in same_run)
    assert all(training_fingerprint(make_config(change), data) != first for change in other_run)


def test_fewer_processes_than_asked_for_is_an_error(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 1))
    with pytest.raises(InputError, match="asked for 2 processes and accelerate runs 1"):
        make_accelerator(make_config())


def test_the_whole_job_from_clips_to_report_and_a_second_call_that_costs_nothing(make_config, capsys):
    config = make_config()
    run(config, StopRequest())
    folder = config.run_folder
    for name in ("config.toml", "metrics.jsonl", "report.html", "data_report.jsonl", "evaluation.json"):
        assert (folder / name).stat().st_size > 0, name
    assert {p.name for p in (folder / "adapter").iterdir()} == {
        "high_noise.safetensors",
        "low_noise.safetensors",
        "comfyui",
    }
    manifest = json.loads((folder / "samples" / "final" / "adapter" / "manifest.json").read_text())
    assert manifest["clips"][0]["prompt"].startswith("ember style, ") and manifest["sampling"]["steps"] == 2
    assert len((folder / "data_report.jsonl").read_text().splitlines()) == 24
    # What is resolved is complete: the run can be repeated from it alone.
    assert load_settings(Config, folder / "config.toml", []) == config
    for file in [*folder.glob("adapter/**/*.safetensors"), folder / "report.html"]:
        assert str(folder.parent).encode() not in file.read_bytes(), f"{file.name} holds a local path"
    capsys.readouterr()
    run(config, StopRequest())
    assert "complete" in capsys.readouterr().out


def test_two_processes_train_what_one_does(make_config, tiny_base, tmp_path):
    alone = train(make_config("run.name='alone'", "train.batch_size=4", "high.steps=2", "train.experts=['high']"))
    config = make_config("run.name='pair'", "train.batch_size=2", "high.steps=2", "train.experts=['high']")
    (tmp_path / "pair.json").write_text(config.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from train.config import Config; from tests.tiny_runs import train;"
        "train(Config.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    (tmp_path / "pair.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "pair.py"), str(tmp_path / "pair.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    checkpoint = found(config.run_folder / "checkpoints")[0]
    from train.checkpoint import load_state

    pair = load_state(checkpoint / "high")
    assert close(alone["high"], pair)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_143(make_config, tmp_path, number):
    config = make_config("high.steps=400", "train.round_steps=400", "train.checkpoint_every_steps=400")
    command = [sys.executable, "-m", "train", "--config", str(tmp_path / "config.toml")]
    import tomli_w

    (tmp_path / "config.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=subprocess.PIPE, text=True
    )
    metrics = config.run_folder / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    done = len(metrics.read_text().splitlines())
    states = load_state_of(config)
    assert states["high"].step == done and f"stopping after high step {done}" in output


SIGNAL_PHASES = {
    "while captions and clips are encoded": ("data.filling", "Cache.write"),
    "while an expert is loaded": ("wan_finetune.memory.residence", "load_base"),
    "while a preview is sampled": ("train.previews", "make_clips"),
    "while the adapter is verified": ("train.job", "verify_adapter_folder"),
    "while the evaluation compares": ("train.showcase", "compare"),
}


@pytest.mark.parametrize("phase", SIGNAL_PHASES)
def test_outside_the_training_loop_a_signal_acts_at_once(make_config, tmp_path, monkeypatch, phase):
    module, name = SIGNAL_PHASES[phase]
    config = make_config(f"data.cache='{tmp_path / 'cache'}'", "high.steps=2", "low.steps=2")
    calls = []

    def interrupted(*arguments, **keywords):
        calls.append(name)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on after the signal")

    owner = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, interrupted)
        with pytest.raises(Stopped, match="SIGTERM"):
            run(config, StopRequest())
    assert calls == [name]
    run(config, StopRequest())
    assert (config.run_folder / "report.html").is_file()


def test_a_signal_that_waits_is_raised_when_the_wait_ends():
    stop = StopRequest()
    with pytest.raises(Stopped, match="SIGUSR1"), stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # a second one ends the process
    assert not issubclass(Stopped, Exception)  # or a library's `except Exception` would swallow it


def test_a_signal_during_the_imports_is_143_without_a_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "--config", "configs/pocket.toml", f"run.folder='{tmp_path}'"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "stopped by SIGINT; the same command goes on from here\n"


def load_state_of(config: Config) -> dict[str, ExpertState]:
    from train.checkpoint import load_state

    checkpoint = found(config.run_folder / "checkpoints")[0]
    return {path.name: load_state(path) for path in checkpoint.iterdir() if path.is_dir()}


def test_a_tracker_hears_of_every_step_by_experts_name(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    heard: list[dict] = []
    log = Accelerator.log
    monkeypatch.setattr(Accelerator, "log", lambda self, values, **kw: (heard.append(values), log(self, values, **kw)))
    config = make_config("tracking.tracker=wandb", "high.steps=2", "low.steps=1")
    train(config)
    import wandb

    wandb.finish()
    of_steps = [f.name for f in dataclasses.fields(StepRecord) if f.name != "expert"]
    of_validations = ["held_out_loss", "held_out_loss_base", "effect_size", "step"]
    by_level = re.compile(r"(high|low)/held_out_loss_at_0\.\d\d")
    assert [sorted(name for name in values if not by_level.fullmatch(name)) for values in heard] == [
        sorted(f"{expert}/{key}" for key in keys)
        for expert, steps in (("high", 2), ("low", 1))
        for keys in (of_validations, *[of_steps] * steps, of_validations)
    ]
    (stored,) = (config.run_folder / "tracker").rglob("*.wandb")
    # wandb's own process writes the file, on a busy machine a moment after `finish` has returned.
    deadline = time.monotonic() + 30
    while b"high/loss" not in stored.read_bytes():
        assert time.monotonic() < deadline, "wandb stored nothing"
        time.sleep(0.1)


def test_a_tracker_that_is_not_installed_is_named(make_config):
    with pytest.raises(InputError, match='"trackio": not installed; pip install trackio'):
        make_accelerator(make_config("tracking.tracker=trackio"))
