"""The trainer with what a LoRA and an optimizer can be beyond the plain ones: exact, moved, and exported as trained."""

import os
import signal
from statistics import fmean

import pytest
import torch

from tests.tiny_runs import same, train
from train.effect import effect_size
from train.engine import make_accelerator
from train.job import make_adapter, run
from train.preparing import prepare_data
from train.signals import Stopped, StopRequest
from train.state import ExpertState
from train.trainer import ExpertTrainer
from wan_finetune.adapters import lora_weights, update_norms
from wan_finetune.errors import InputError
from wan_finetune.experts import LOW, base_folder, load_expert
from wan_finetune.export import probe_output, verify_adapter_folder, write_adapter_folder

ONE = ["train.experts=['low']", "low.steps=3", "train.batch_size=1"]


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

    def stop_after_one(self):
        record = step(self)
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return record

    monkeypatch.setattr(ExpertTrainer, "take_step", stop_after_one)
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


def test_without_its_lora_an_expert_is_the_base_though_a_start_was_taken_out(make_config, tiny_base):
    config = make_config(*ONE, "lora.initialisation='pissa'", "lora.alpha=3")
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    trainer = ExpertTrainer(config, "low", ExpertState(), base_folder(config.model.base), data, accelerator)
    trainer.take_step()
    trainer.save_state()
    model = accelerator.unwrap_model(trainer.model)
    adapter = make_adapter(config, "low", trainer.state)
    before = lora_weights(model)
    with trainer.lora_off():
        found = probe_output(model, tiny_base, adapter)
        assert effect_size(model, trainer.state.taken) == pytest.approx(0.0, abs=1e-6)
    base = load_expert(tiny_base, LOW, torch.float32)
    assert torch.allclose(found, probe_output(base, tiny_base, adapter), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in lora_weights(model).items())
    # As the exported adapter has it.
    trainer.close()
    adapter = make_adapter(config, "low", trainer.state)
    norms = update_norms(adapter)
    wanted = fmean(norms[name] / float(base.get_submodule(name).weight.norm()) for name in norms)
    assert effect_size(model, trainer.state.taken) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.start_from='absent'", "lora.start_from: absent: no such adapter file or folder"),
        ("optimizer.name='torch.optim:AdamZ'", "there is no AdamZ in torch.optim"),
    ],
)
def test_what_cannot_begin_is_told_before_anything_is_prepared(make_config, change, message):
    config = make_config(*ONE, change)
    with pytest.raises(InputError, match=message):
        run(config, StopRequest())
    assert not config.run_folder.exists()


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
