"""Whole runs with memory levers: rounds, checkpoints and both experts, and not a byte of the adapters changes."""

import pytest
import torch

from tests.tiny_runs import same, train
from train.engine import make_accelerator
from train.job import run
from train.preparing import prepare_data
from train.signals import StopRequest
from train.supported import tell_of_policies_for_nothing
from wan_finetune.errors import InputError
from wan_finetune.memory.residence import BaseExperts


def test_levers_that_move_memory_change_no_byte_of_a_run(make_config, monkeypatch):
    prepared: list[str] = []
    loads: list[str] = []
    prepare, take = BaseExperts.prepare_next, BaseExperts.take

    def noted_prepare(self, expert):
        prepared.append(expert)
        prepare(self, expert)

    def noted_take(self, expert):
        if expert not in self.kept:
            loads.append(expert)
        return take(self, expert)

    monkeypatch.setattr(BaseExperts, "prepare_next", noted_prepare)
    monkeypatch.setattr(BaseExperts, "take", noted_take)
    plain = train(make_config("run.name='plain'", "memory.checkpointing='none'"))
    assert loads == ["high", "low", "high", "low"] and dict.fromkeys(prepared) == {"low": None, "high": None}
    loads.clear(), prepared.clear()
    streamed = train(make_config("run.name='streamed'", "memory.stream_blocks=2", "memory.checkpointing='offloaded'"))
    assert loads == ["high", "low", "high", "low"]
    loads.clear(), prepared.clear()
    kept = train(make_config("run.name='kept'", "memory.resident='both'", "memory.checkpointing='full'"))
    assert loads == ["high", "low"] and set(prepared) <= {"low"}
    for expert in ("high", "low"):
        assert same(plain[expert], streamed[expert]) and same(plain[expert], kept[expert])


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_packed_base_trains_in_rounds_and_says_another_thing_than_the_plain_one(make_config, kind):
    overrides = ["train.experts=['low']", "low.steps=2", f"memory.quantization='{kind}'", "memory.checkpointing='full'"]
    once = train(make_config("run.name='once'", *overrides))
    again = train(make_config("run.name='again'", "train.round_steps=1", *overrides))
    plain = train(make_config("run.name='plain'", *overrides[:2]))
    assert same(once["low"], again["low"]) and not same(once["low"], plain["low"])
    assert all(torch.isfinite(value).all() for value in once["low"].weights.values())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["memory.quantization='int8'", "memory.stream_blocks=2"], "memory.stream_blocks with memory.quantization"),
        (["memory.quantization='fp8'", "lora.dora=true"], "lora.dora with memory.quantization"),
        (["memory.resident='both'", "low.lora={initialisation='pissa'}"], "the second stretch"),
        (["model.dtype='bfloat16'"], "inputs in fp32 would meet weights in bf16"),
    ],
)
def test_a_run_that_would_go_wrong_stops_before_any_work(make_config, overrides, says):
    config = make_config("memory.checkpointing='full'", *overrides)
    with pytest.raises(InputError, match=says):
        run(config, StopRequest())
    assert not config.run_folder.exists()


def test_a_policy_for_a_bucket_without_clips_is_told_of(make_config, capsys):
    config = make_config("memory.checkpointing_by_bucket={'64x64x5'='full', '64x64x9'='none'}")
    tell_of_policies_for_nothing(config, prepare_data(config, make_accelerator(config)))
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpointing_by_bucket" in line]
    assert said == ["warning: memory.checkpointing_by_bucket: no clip is in 64x64x5; clips are in 64x64x9"]
