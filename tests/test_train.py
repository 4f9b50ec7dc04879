"""The trainer's promises: independent experts, addressed draws, exact resume, and nothing that moves them."""

import dataclasses
import gc
import json
import re
import shutil
import time
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from data.sources import make_folder
from tests.tiny_runs import close, same, train
from train import preparing
from train.config import Config
from train.engine import make_accelerator
from train.job import run
from train.objective import weighted_loss
from train.optim import learning_rate
from train.preparing import prepare_data
from train.records import StepRecord
from train.rounds import stretches
from train.signals import StopRequest
from train.trainer import ExpertTrainer
from wan_finetune.adapters import dead_modules
from wan_finetune.encoders import TextEncoder, pad_text
from wan_finetune.errors import InputError
from wan_finetune.pipeline import load_pipeline
from wan_finetune.settings import load_settings


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


def test_the_encoders_are_gone_before_training_starts(make_config, tmp_path, monkeypatch):
    loaded = []

    def watched(encoder_class):
        def load(*arguments, **keywords):
            encoder = encoder_class(*arguments, **keywords)
            loaded.extend(weakref.ref(part) for part in vars(encoder).values() if isinstance(part, torch.nn.Module))
            return encoder

        return load

    for name in ("TextEncoder", "VideoEncoder"):
        monkeypatch.setattr(preparing, name, watched(getattr(preparing, name)))
    config = make_config(f"data.cache='{tmp_path / 'cache'}'")
    accelerator = make_accelerator(config)
    gc.collect()
    gc.disable()  # a circle of references must not keep them until garbage is next collected
    try:
        prepare_data(config, accelerator)
        assert len(loaded) == 2 and [encoder() for encoder in loaded] == [None, None]
    finally:
        gc.enable()


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


def test_fewer_processes_than_asked_for_is_an_error(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 1))
    with pytest.raises(InputError, match="asked for 2 processes under ddp and accelerate runs 1"):
        make_accelerator(make_config())


def test_the_whole_job_from_clips_to_report_and_a_second_call_that_costs_nothing(make_config, capsys):
    config = make_config()
    run(config, StopRequest())
    folder = config.run_folder
    for name in ("config.toml", "metrics.jsonl", "report.html", "data_report.jsonl", "evaluation.json"):
        assert (folder / name).stat().st_size > 0, name
    assert {p.name for p in (folder / "adapter").iterdir()} == {
        "README.md",
        "high_noise.safetensors",
        "low_noise.safetensors",
        "comfyui",
    }
    manifest = json.loads((folder / "samples" / "final" / "adapter" / "manifest.json").read_text())
    assert manifest["clips"][0]["prompt"].startswith("ember style, ") and manifest["sampling"]["steps"] == 2
    assert len((folder / "data_report.jsonl").read_text().splitlines()) == 24
    # What is resolved is complete: the run can be repeated from it alone.
    assert load_settings(Config, folder / "config.toml", []) == config
    for file in [*folder.glob("adapter/**/*.*"), folder / "report.html"]:
        assert str(folder.parent).encode() not in file.read_bytes(), f"{file.name} holds a local path"
    capsys.readouterr()
    run(config, StopRequest())
    assert "complete" in capsys.readouterr().out


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


def test_a_tracker_that_is_not_installed_is_named(make_config, monkeypatch):
    monkeypatch.setattr("train.engine.find_spec", lambda name: None)
    with pytest.raises(InputError, match='"trackio": not installed; pip install trackio'):
        make_accelerator(make_config("tracking.tracker=trackio"))
