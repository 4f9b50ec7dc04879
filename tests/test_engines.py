"""One training under every engine that accelerate knows, for real, in two processes on a CPU."""

import pytest
import torch

from tests.engine_runs import (
    EXACT,
    ONE,
    TWO,
    Trained,
    alone,
    largest_difference,
    make_config,
    pair,
    same,
)
from train.config import Config
from train.job import make_adapter
from train.optim import learning_rate
from wan_finetune.adapters import dead_modules
from wan_finetune.export import verify_adapter_folder, write_adapter_folder

__all__ = ["alone", "make_config", "pair"]  # fixtures

ENGINES = ("ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def reference(alone, make_config) -> Trained:
    """Six steps in one process, each of two micro-batches."""
    return alone(make_config(*ONE), 6)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_under_any_engine_train_what_one_does(pair, make_config, reference, engine, tmp_path):
    config = make_config(*TWO)
    trained = pair.train(engine, config, 6)
    assert trained.outcome["losses"] == pytest.approx(reference.outcome["losses"], abs=1e-6, rel=0)
    assert trained.outcome["norms"] == pytest.approx(reference.outcome["norms"], rel=1e-6)
    if engine in EXACT:
        assert same(trained.state, reference.state)
    assert largest_difference(trained.state, reference.state) < 1e-5
    assert trained.outcome["share"] == (0.5 if engine in ("fsdp2", "zero3") else 1)
    assert trained.outcome["freed"]
    # What was trained is whole: every module, and diffusers loads it.
    assert not dead_modules(trained.state.weights)
    adapter = make_adapter(config, "high", trained.state)
    write_adapter_folder(tmp_path, [adapter])
    verify_adapter_folder(config.model.base, tmp_path, [adapter])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_and_processes_leave_the_batch_and_the_learning_rate_as_they_are(
    pair, make_config, reference, engine
):
    config = make_config("train.batch_size=1", "train.gradient_accumulation=2")
    trained = pair.train(engine, config, 6)
    settings = config.expert("high")
    rates = [learning_rate(step, settings.learning_rate, settings.steps, settings.optimizer) for step in range(6)]
    assert trained.outcome["rates"] == rates == reference.outcome["rates"]
    assert trained.outcome["losses"] == pytest.approx(reference.outcome["losses"], abs=1e-6, rel=0)
    assert largest_difference(trained.state, reference.state) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_in_two_processes_and_again_in_one(pair, alone, make_config, reference, engine):
    one, two = make_config(*ONE), make_config(*TWO)
    first = alone(one, 2)
    second = pair.train(engine, two, 2, start=first)
    third = alone(one, 2, start=second)
    assert third.state.step == 6
    if engine in EXACT:
        assert same(third.state, reference.state)
    assert largest_difference(third.state, reference.state) < 1e-5
    losses = [loss for part in (first, second, third) for loss in part.outcome["losses"]]
    assert losses == pytest.approx(reference.outcome["losses"], abs=1e-6, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_under_a_sharding_engine_a_resumed_run_ends_as_the_uninterrupted_one(pair, make_config, engine):
    config = make_config(*TWO, "lora.rank=3")  # which two processes do not divide
    whole = pair.train(engine, config, 4, expert="low")
    half = pair.train(engine, config, 2, expert="low")
    resumed = pair.train(engine, config, 2, expert="low", start=half)
    assert same(resumed.state, whole.state)
    assert half.outcome["losses"] + resumed.outcome["losses"] == whole.outcome["losses"]


PLUS = "optimizer.lora_plus_ratio=16"
GROUPS = (PLUS, "lora.rank=4", "lora.rank_pattern={'attn2.to_k'=2, 'ffn.net.2'=8}")
"""Two groups, each with a rate of its own, of weights that two processes divide evenly."""
ODD_GROUPS = (PLUS, "lora.rank=5", "lora.rank_pattern={'attn2.to_k'=3, 'ffn.net.2'=8}")
"""The same of weights that they do not."""


def learning_rates(config: Config, ratio: float) -> list[list[float]]:
    """Of both groups, by step, as the schedule has them."""
    settings = config.expert("high")
    slow = [learning_rate(step, settings.learning_rate, settings.steps, settings.optimizer) for step in range(4)]
    return [[rate, ratio * rate] for rate in slow]


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_with_a_rate_each_and_modules_with_a_rank_each_are_trained_as_in_one_process(
    pair, alone, make_config, engine
):
    single = alone(make_config(*GROUPS, *ONE), 4)
    trained = pair.train(engine, make_config(*GROUPS, *TWO), 4)
    assert single.outcome["group_rates"] == learning_rates(make_config(*GROUPS), 16)
    assert trained.outcome["group_rates"] == single.outcome["group_rates"]
    assert {min(weight.shape) for weight in trained.state.weights.values()} == {2, 4, 8}
    assert trained.outcome["losses"] == pytest.approx(single.outcome["losses"], abs=1e-6, rel=0)
    assert largest_difference(trained.state, single.state) < 5e-5  # lora_B takes steps of 16 times the rate
    if engine in EXACT:
        assert same(trained.state, single.state)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_groups_of_uneven_shares_are_resumed_to_the_bit(pair, alone, make_config, engine):
    config = make_config(*ODD_GROUPS, *TWO)
    whole = pair.train(engine, config, 4)
    half = pair.train(engine, config, 2)
    rest = pair.train(engine, config, 2, start=half)
    assert same(rest.state, whole.state)
    assert half.outcome["losses"] + rest.outcome["losses"] == whole.outcome["losses"]
    assert half.outcome["group_rates"] + rest.outcome["group_rates"] == learning_rates(config, 16)
    # The last numbers of an odd share are rounded otherwise, as they do not fill a vector of the processor; and lora_B
    # takes steps of 16 times the rate. In the wrong group a weight would be 1e-2 away.
    single = alone(make_config(*ODD_GROUPS, *ONE), 4)
    assert whole.outcome["losses"] == pytest.approx(single.outcome["losses"], abs=1e-6, rel=0)
    assert largest_difference(whole.state, single.state) < 5e-5
    # What one process left goes on in two, in the groups that it had.
    begun = alone(make_config(*ODD_GROUPS, *ONE), 2)
    assert largest_difference(pair.train(engine, config, 2, start=begun).state, single.state) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_the_gradient_is_clipped_once_whoever_clips(pair, alone, make_config, engine):
    # Clipping scales Adam's first moment by as much, and hardly moves the weights.
    clipped = ("optimizer.gradient_clip=0.01", *TWO)
    free = pair.train(engine, make_config(*TWO), 1)
    held = pair.train(engine, make_config(*clipped), 1)
    assert held.outcome["norms"] == free.outcome["norms"] and free.outcome["norms"][0] > 0.05
    factor = 0.01 / (free.outcome["norms"][0] + 1e-6)
    for index, entry in free.state.optimizer["state"].items():
        moment = held.state.optimizer["state"][index]["exp_avg"]
        assert torch.allclose(moment, entry["exp_avg"] * factor, rtol=1e-5, atol=1e-12)


def test_each_expert_has_a_largest_gradient_of_its_own(alone, make_config):
    free = {expert: alone(make_config(*ONE), 1, expert=expert) for expert in ("high", "low")}
    config = make_config(*ONE, "high.optimizer.gradient_clip=0.01")
    held = {expert: alone(config, 1, expert=expert) for expert in ("high", "low")}
    assert same(held["low"].state, free["low"].state) and not same(held["high"].state, free["high"].state)
    # Adam's first moment is a tenth of the gradient or less: clipped it has a hundredth's norm, by the same share.
    moments = [torch.cat([e["exp_avg"].flatten() for e in run.state.optimizer["state"].values()]) for run in
               (free["high"], held["high"])]  # fmt: skip
    before = free["high"].outcome["norms"][0]
    assert held["high"].outcome["norms"] == [before] and before > 0.05
    assert float(moments[1].norm() / moments[0].norm()) == pytest.approx(0.01 / before, rel=1e-4)


def test_an_epoch_that_ends_within_an_accumulated_step_changes_nothing(alone, make_config):
    steps = ("high.steps=8", "optimizer.gradient_clip=1000")
    whole = alone(make_config("train.batch_size=4", "train.gradient_accumulation=1", *steps), 8)
    parts = alone(make_config("train.batch_size=1", "train.gradient_accumulation=4", *steps), 8)
    # 22 clips are trained on, two are held out: the epoch ends after two micro-batches of the sixth step.
    config = make_config(*steps)
    used = (config.run_folder / "data_report.jsonl").read_text().count('"used": true') - config.validation.clips
    assert used % 4 > 0 and used < 4 * 8
    assert parts.outcome["losses"] == pytest.approx(whole.outcome["losses"], abs=1e-5, rel=0)
    assert parts.outcome["rates"] == whole.outcome["rates"] and parts.state.step == whole.state.step == 8


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_in_bf16_the_lora_and_the_time_path_stay_fp32(pair, alone, make_config, engine):
    config = ("model.dtype='bfloat16'", "train.mixed_precision='bf16'", "memory.checkpointing='full'")
    trained = pair.train(engine, make_config(*config, *TWO), 3)
    single = alone(make_config(*config, *ONE), 3)
    dtypes = trained.outcome["dtypes"]
    assert dtypes == single.outcome["dtypes"]
    assert {dtype for name, dtype in dtypes.items() if "lora" in name or "time_embedder" in name} == {"torch.float32"}
    assert dtypes["blocks.0.attn1.to_q.base_layer.weight"] == "torch.bfloat16"
    # A last bit that differs becomes a bf16's last bit, 1/256.
    assert trained.outcome["losses"] == pytest.approx(single.outcome["losses"], abs=1e-4, rel=0)
    assert trained.outcome["freed"]


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["latents", "gradient"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_in_one_process_stops_both_before_the_update(pair, make_config, engine, spoiled):
    config = make_config(*TWO)
    before = pair.train(engine, config, 1)
    stopped = pair.train(engine, config, 3, spoiled=spoiled)
    assert "high expert, step 2" in stopped.outcome["stopped"]
    assert same(stopped.state, before.state)
