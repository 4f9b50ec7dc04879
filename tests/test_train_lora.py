"""The trainer with what a LoRA and an optimizer can be beyond the plain ones: exact, moved, and exported as trained."""

import os
import signal

import pytest
import torch

from tests.tiny_runs import same, train
from train.job import make_adapter
from train.signals import Stopped
from train.trainer import ExpertTrainer
from wan_finetune.export import verify_adapter_folder, write_adapter_folder

ONE = ["train.experts=['low']", "low.steps=4", "train.batch_size=1"]


@pytest.mark.parametrize(
    "changes",
    [
        ["lora.initialisation='pissa'", "optimizer.ema_decay=0.5", "optimizer.lora_plus_ratio=4"],
        ["optimizer.name='schedulefree'", "optimizer.schedule='constant'", "lora.dora=true", "lora.rslora=true"],
    ],
    ids=["pissa, average, LoRA+", "schedule-free, DoRA, rsLoRA"],
)
def test_a_stopped_run_ends_as_the_whole_one_and_exports_its_average(
    make_config,
    changes,
    tiny_base,
    tmp_path,
    monkeypatch,
):
    config = make_config("run.name='whole'", *ONE, *changes)
    whole = train(config)["low"]
    step = ExpertTrainer.take_step

    def stop_after_three(self):
        record = step(self)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return record

    monkeypatch.setattr(ExpertTrainer, "take_step", stop_after_three)
    stopped = make_config("run.name='stopped'", *ONE, *changes)
    with pytest.raises(Stopped):
        train(stopped)
    monkeypatch.setattr(ExpertTrainer, "take_step", step)
    resumed = train(stopped)["low"]
    assert same(whole, resumed)
    for part in ("average", "taken"):
        first, second = getattr(whole, part), getattr(resumed, part)
        assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    assert bool(whole.taken) == ("lora.initialisation='pissa'" in changes)
    adapter = make_adapter(config, "low", whole)
    rank = config.lora.rank
    for name, value in whole.average.items():
        assert not torch.equal(value, whole.weights[name])
        exported = adapter.weights[name]
        half = exported[:rank] if ".lora_A." in name else exported[:, :rank] if ".lora_B." in name else exported
        assert torch.equal(half, value)
    write_adapter_folder(tmp_path / "adapter", [adapter])
    verify_adapter_folder(str(tiny_base), tmp_path / "adapter", [adapter])


def test_a_lora_that_no_gradient_reaches_stops_the_run(make_config, monkeypatch):
    config = make_config(*ONE, "low.steps=1")
    init = ExpertTrainer.__init__

    def with_a_dead_end(self, *arguments):
        init(self, *arguments)
        # The first lora_B, as behind a layer that the model does not use.
        self.parameters[1].register_hook(torch.zeros_like)

    monkeypatch.setattr(ExpertTrainer, "__init__", with_a_dead_end)
    with pytest.raises(
        RuntimeError, match=r"low expert: 1 of 20 LoRA modules have not moved by step 1, blocks.0.attn1.to_q"
    ):
        train(config)
