"""The held-out loss: what is kept apart, that nothing moves it, and what follows from it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from data.holdout import hold_out
from tests.tiny_runs import same, train
from train.engine import make_accelerator
from train.job import choose_state, run
from train.preparing import prepare_data
from train.recommendation import Candidate, recommend
from train.signals import StopRequest
from train.state import ExpertState
from train.trainer import ExpertTrainer
from train.validation import Validation, level_losses
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder
from wan_finetune.formats import diffusers as diffusers_format


def prepared(config):
    accelerator = make_accelerator(config)
    return accelerator, prepare_data(config, accelerator)


def lines(config):
    return [json.loads(line) for line in (config.run_folder / "validation.jsonl").read_text().splitlines()]


def test_what_is_held_out_is_chosen_by_content_and_no_batch_has_it(make_config, shared, tmp_path):
    config = make_config()
    accelerator, data = prepared(config)
    assert data.held_out.sum() == 2
    kept = {data.samples[int(i)].latent_keys for i in np.flatnonzero(data.held_out)}
    trainer = ExpertTrainer(config, "low", ExpertState(), base_folder(config.model.base), data, accelerator)
    seen = {place.sample.latent_keys for step in range(24) for place in trainer.batches.places(step)}
    trainer.close()
    assert len(seen) == 22 and not seen & kept
    # Other names, in another order: the same clips.
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number in range(24):
        for suffix in (".mp4", ".txt"):
            shutil.copy(shared / "ember" / f"clip-{number:02d}{suffix}", renamed / f"x{97 * number % 24:02d}{suffix}")
    _, again = prepared(make_config(f"data.sources=[{{path='{renamed}'}}]", "run.seed=5", "run.name='renamed'"))
    assert {again.samples[int(i)].latent_keys for i in np.flatnonzero(again.held_out)} == kept


def test_a_small_set_is_not_made_much_smaller(make_config):
    config = make_config()
    _, data = prepared(config)
    assert [int(hold_out(data.samples, config.data, clips).sum()) for clips in (0, 1, 2, 20)] == [0, 1, 2, 2]


def test_the_loss_without_lora_is_the_bases_and_both_are_the_same_every_time(make_config):
    config = make_config("high.steps=4", "train.experts=['high']", "validation.every_steps=2")
    train(config)
    found = lines(config)
    assert [line["step"] for line in found] == [0, 2, 4]
    # A fresh LoRA changes nothing, so that the first loss is the base's, to the bit.
    assert found[0]["loss"] == found[0]["base_loss"] and len(found[0]["levels"]) == 4
    assert {line["base_loss"] for line in found} == {found[0]["base_loss"]}
    assert found[2]["loss"] != found[0]["loss"]
    assert all(0.875 <= level["sigma"] <= 1 for level in found[0]["levels"])
    # The trained weights, measured again in another process state, with another seed.
    accelerator, data = prepared(config)
    torch.manual_seed(7)
    trainer = ExpertTrainer(config, "high", ExpertState(), base_folder(config.model.base), data, accelerator)
    validation = Validation(config.validation, config.run_folder, accelerator)
    again = validation.measure(trainer)
    trainer.close()
    assert again is not None and again.loss == found[0]["loss"]


def test_validation_does_not_move_the_training(make_config):
    often = train(make_config("run.name='often'", "validation.every_steps=1", "lora.dropout=0.3"))
    never = train(
        make_config("run.name='never'", "validation.every_steps=4", "validation.levels=1", "lora.dropout=0.3")
    )
    assert all(same(often[name], never[name]) for name in often)


def test_without_validation_nothing_is_held_out(make_config):
    config = make_config("validation.every_steps=0")
    _, data = prepared(config)
    assert not data.held_out.any()


def test_patience_ends_an_expert_and_a_resumed_run_knows_it(make_config, monkeypatch):
    config = make_config("validation.every_steps=1", "validation.patience=2", "high.steps=9", "train.experts=['high']")
    losses = iter([1.0, 0.8, 0.7, 0.75, 0.72, 0.9, 0.9])
    monkeypatch.setattr("train.validation.level_losses", lambda *_: torch.full((4,), next(losses)))
    states = train(config)
    assert states["high"].step == 3  # the first value is the base's, the second step 0's
    assert train(config)["high"].step == 3


def test_each_expert_may_have_a_patience_of_its_own(make_config, monkeypatch):
    config = make_config("validation.every_steps=1", "validation.patience=3", "low.patience=0", "high.patience=1")
    monkeypatch.setattr("train.validation.level_losses", lambda *_: torch.full((4,), 1.0))
    states = train(config)
    assert (states["high"].step, states["low"].step) == (1, 4)
    assert [config.patience(name) for name in ("high", "low")] == [1, 0]
    assert make_config("validation.patience=3", "low.patience=0").patience("high") == 3


@pytest.mark.parametrize(
    "override",
    ["validation.patience=1", "low.patience=1", "validation.export='best'", "hub={push='best', repo='acme/look'}"],
)
def test_what_goes_by_a_loss_that_is_never_measured_is_refused(make_config, override):
    with pytest.raises(InputError, match=r"goes by the held-out loss, and validation.every_steps = 0 measures none"):
        make_config("validation.every_steps=0", override)


def test_a_set_too_small_to_keep_a_clip_back_is_told_of(make_config, shared, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for clip in sorted((shared / "ember").glob("*.mp4"))[:9]:
        shutil.copy(clip, few)
        shutil.copy(clip.with_suffix(".txt"), few)
    config = make_config(f"data.sources=[{{path='{few}'}}]", "validation.export='best'")
    prepared(config)
    assert "no clip is kept from training" in capsys.readouterr().out
    state = ExpertState(step=3)
    validation = Validation(config.validation, config.run_folder, make_accelerator(config))
    assert choose_state(config, validation, "low", state) is state
    assert "no held-out loss was measured, so its last state" in capsys.readouterr().out


def test_the_best_state_becomes_the_adapter_where_that_is_asked_for(make_config, monkeypatch, capsys):
    config = make_config(
        "validation.every_steps=1", "validation.export='best'", "high.steps=3", "train.experts=['high']"
    )
    values = iter([1.0, 1.0, 0.9, 0.5, 0.8])  # base, steps 0 to 3
    kept = {}
    monkeypatch.setattr("train.validation.level_losses", lambda *_: torch.full((4,), next(values)))
    take = ExpertTrainer.take_step

    def noted(self):
        record = take(self)
        self.save_state()
        kept[record.step] = {name: value.clone() for name, value in self.state.weights.items()}
        return record

    monkeypatch.setattr(ExpertTrainer, "take_step", noted)
    run(config, StopRequest())
    assert "the high-noise expert: step 2 of 3 is recommended: the held-out loss is lowest there" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    adapter = diffusers_format.read(config.run_folder / "adapter" / "high_noise.safetensors", "high")
    assert adapter.about["steps"] == "2"
    assert all(torch.equal(value, kept[2][name]) for name, value in adapter.weights.items())


def test_the_best_states_file_must_be_that_step(make_config, tmp_path):
    from train.best import keep_best, load_best

    keep_best(tmp_path, "low", 3, {"x": torch.ones(2)})
    assert torch.equal(load_best(tmp_path, "low", 3)["x"], torch.ones(2))
    with pytest.raises(InputError, match="holds step 3, not 4"):
        load_best(tmp_path, "low", 4)


def test_masks_and_processes_do_not_change_what_is_measured(make_config, monkeypatch):
    config = make_config()
    accelerator, data = prepared(config)
    trainer = ExpertTrainer(config, "low", ExpertState(), base_folder(config.model.base), data, accelerator)
    from train.validation import held_out_places

    clips, sigmas = held_out_places(trainer), torch.tensor([0.1, 0.5, 0.8])
    alone = level_losses(trainer, clips, sigmas)
    shares = []
    for rank in (0, 1, 2, 3):
        monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 4))
        monkeypatch.setattr(type(accelerator), "process_index", property(lambda self, r=rank: r))
        monkeypatch.setattr(type(accelerator), "reduce", lambda self, value, how: value)
        shares.append(level_losses(trainer, clips, sigmas))
    monkeypatch.undo()
    trainer.close()
    assert torch.allclose(sum(shares), alone, rtol=1e-6)


def candidate(step, loss, look=None, motion=None):
    return Candidate(step=step, held_out_loss=loss, look_distance=look, motion_kept=motion)


@pytest.mark.parametrize(
    ("candidates", "step", "reason"),
    [
        ([candidate(1, 0.5), candidate(2, 0.3), candidate(3, 0.4)], 2, "lowest there, 0.3000 .base 0.6000, last step"),
        ([candidate(1, 0.5), candidate(2, 0.4)], 2, "still falling"),
        ([candidate(1, 0.7), candidate(2, 0.8)], 1, "no state has a lower held-out loss than the base"),
        ([candidate(1, 0.3, 2.0, 1.0), candidate(2, 0.4, 1.0, 0.9)], 2, r"nearest there \(1.00\) with 90%"),
        ([candidate(1, 0.4, 2.0, 1.0), candidate(2, 0.3, 1.0, 0.5)], 1, "100% of the motion kept"),
        ([candidate(1, 0.4, 2.0, 0.6), candidate(2, 0.3, 1.0, 0.5)], 1, "no state keeps the motion"),
        ([candidate(1, 0.4), candidate(2, 0.3, 1.0, 1.0)], 2, "still falling"),
    ],
)
def test_the_recommendation_follows_the_figures_it_names(candidates, step, reason):
    found = recommend(candidates, base_loss=0.6)
    assert found.step == step
    assert re.search(reason, found.reason)


def test_averaged_weights_are_validated_where_they_are_exported_and_training_goes_on_unmoved(make_config):
    settings = ["high.steps=4", "train.experts=['high']", "optimizer.ema_decay=0.9"]
    config = make_config(*settings, "run.name='watched'", "validation.every_steps=1")
    watched = train(config)
    plain = train(make_config(*settings, "run.name='plain'", "validation.every_steps=4"))
    assert same(watched["high"], plain["high"])
    accelerator, data = prepared(config)
    exported = ExpertState(weights=watched["high"].average, taken=watched["high"].taken)
    trainer = ExpertTrainer(
        make_config("optimizer.ema_decay=0"), "high", exported, base_folder(config.model.base), data, accelerator
    )
    again = Validation(config.validation, config.run_folder / "again", accelerator)
    again.file.path.parent.mkdir()
    found = again.measure(trainer)
    trainer.close()
    assert found is not None and found.loss == lines(config)[-1]["loss"]
    assert watched["high"].average.keys() == watched["high"].weights.keys()
