"""Optimizers: each learns, resumes to the bit through a checkpoint's files, and follows a rate that is a function."""

import functools
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from train.averaging import averaged_weights, make_average, require_whole_weights
from train.config import Config
from train.expert_settings import OPTIMIZERS, ExpertSettings, OptimizerSettings
from train.identity import Identity, flatten, require_same_run
from train.optim import CLASSES, learning_rate, load_optimizer_state, make_optimizer, optimizer_state, set_rate
from train.optimizer_state import flatten_optimizer, unflatten_optimizer
from wan_finetune.adapters import inject_lora, lora_weights, set_lora_weights
from wan_finetune.errors import InputError
from wan_finetune.experts import HIGH, load_expert
from wan_finetune.lora import LoraSettings
from wan_finetune.settings import load_settings

ROOT = Path(__file__).parent.parent

IN, RANK, OUT, STEPS = 1024, 8, 640, 8
"""Weights of more than 4096 numbers: smaller ones bitsandbytes keeps in 32 bits."""

# bitsandbytes on a CPU has no pages to move, and says so.
NO_PAGES = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")

CASES = {
    **{name: {"name": name} for name in OPTIMIZERS},
    "any class": {"name": "torch.optim:RAdam", "arguments": {"decoupled_weight_decay": True}},
    "LoRA+": {"name": "adamw", "lora_plus_ratio": 16.0},
    "LoRA+, 8 bit": {"name": "adamw8bit", "lora_plus_ratio": 16.0},
    "LoRA+, schedulefree": {"name": "schedulefree", "lora_plus_ratio": 4.0},
    "betas": {"name": "adamw", "betas": (0.8, 0.95), "eps": 1e-6},
    "adafactor with momentum": {"name": "adafactor", "arguments": {"beta1": 0.9}},
}


class Pair(nn.Module):
    """A LoRA pair with the names that PEFT gives one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.to_q = nn.ModuleDict(
            {
                "lora_A": nn.ModuleDict({"default": nn.Linear(IN, RANK, bias=False)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(RANK, OUT, bias=False)}),
            }
        )
        with torch.no_grad():
            self.a.copy_(torch.randn(RANK, IN, generator=generator) / 32)
            self.b.zero_()

    @property
    def a(self) -> torch.Tensor:
        return self.to_q["lora_A"]["default"].weight

    @property
    def b(self) -> torch.Tensor:
        return self.to_q["lora_B"]["default"].weight


@functools.cache
def target() -> torch.Tensor:
    """A map of rank 2, which the pair can learn."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(OUT, 2, generator=generator) @ torch.randn(2, IN, generator=generator) / 32


def loss_at(model: Pair, step: int) -> torch.Tensor:
    """How far the pair is from the target, on inputs drawn by the step."""
    x = torch.randn(16, IN, generator=torch.Generator().manual_seed(100 + step))
    return (x @ model.a.T @ model.b.T - x @ target().T).square().mean()


def take_steps(model: Pair, optimizer, settings: OptimizerSettings, peak: float, first: int, last: int) -> None:
    for step in range(first, last):
        set_rate(optimizer, learning_rate(step, peak, STEPS, settings))
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def through_files(state: dict, folder: Path) -> dict:
    """An optimizer's state as a checkpoint's files give it back."""
    tensors, plain = flatten_optimizer(state)
    save_file(tensors, folder / "o.safetensors")
    return unflatten_optimizer(load_file(folder / "o.safetensors"), json.loads(json.dumps(plain)))


def equal(first, second) -> bool:
    """Whether two states are alike to the bit, lists and tuples apart."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second or (first != first and second != second)


def peak_of(settings: OptimizerSettings) -> float:
    return 1.0 if "rodigy" in settings.name else 1e-3


@NO_PAGES
@pytest.mark.parametrize("case", CASES)
def test_n_steps_and_n_more_are_2n_steps_to_the_bit(case, tmp_path, capsys):
    settings = OptimizerSettings(warmup_steps=2, **CASES[case])
    peak = peak_of(settings)
    whole = Pair()
    optimizer = make_optimizer(whole.named_parameters(), settings, peak)
    take_steps(whole, optimizer, settings, peak, 0, STEPS)
    half = Pair()
    first = make_optimizer(half.named_parameters(), settings, peak)
    take_steps(half, first, settings, peak, 0, STEPS // 2)
    saved = through_files(optimizer_state(first), tmp_path)
    resumed = Pair()
    resumed.load_state_dict(half.state_dict())
    second = make_optimizer(resumed.named_parameters(), settings, peak)
    load_optimizer_state(second, saved)
    take_steps(resumed, second, settings, peak, STEPS // 2, STEPS)
    assert torch.equal(whole.a, resumed.a) and torch.equal(whole.b, resumed.b)
    assert equal(optimizer_state(optimizer), optimizer_state(second))
    # A state that was lost would show.
    fresh = make_optimizer(half.named_parameters(), settings, peak)
    take_steps(half, fresh, settings, peak, STEPS // 2, STEPS)
    assert not torch.equal(whole.b, half.b)
    assert capsys.readouterr().out == ""


@NO_PAGES
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_learns(name):
    settings = OptimizerSettings(name=name, warmup_steps=0)
    model = Pair()
    optimizer = make_optimizer(model.named_parameters(), settings, 1.0 if name == "prodigy" else 1e-2)
    before = loss_at(model, 999).item()
    # Prodigy begins at a rate of a millionth, and finds its own in some 150 steps here.
    take_steps(model, optimizer, settings, optimizer.param_groups[0]["lr"], 0, 200 if name == "prodigy" else 120)
    assert loss_at(model, 999).item() < 0.8 * before


def test_eight_bit_states_are_eight_bits_and_a_state_is_a_copy():
    settings = OptimizerSettings(name="adamw8bit", warmup_steps=0)
    model = Pair()
    optimizer = make_optimizer(model.named_parameters(), settings, 1e-3)
    take_steps(model, optimizer, settings, 1e-3, 0, 1)
    state = optimizer_state(optimizer)
    tensors, _ = flatten_optimizer(state)
    assert {tensors[name].dtype for name in tensors if name.endswith("state1")} == {torch.uint8}
    before = {name: value.clone() for name, value in tensors.items()}
    take_steps(model, optimizer, settings, 1e-3, 1, 3)
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_lora_plus_multiplies_the_rate_of_lora_b_alone():
    settings = OptimizerSettings(name="torch.optim:SGD", lora_plus_ratio=16.0, warmup_steps=0, weight_decay=0)
    moves = {}
    for ratio in (16.0, 1.0):
        pair, kept = Pair(), settings.model_copy(update={"lora_plus_ratio": ratio})
        # With lora_B at zero, lora_A has no gradient.
        pair.b.data.copy_(torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(4)))
        before = pair.a.detach().clone(), pair.b.detach().clone()
        take_steps(pair, make_optimizer(pair.named_parameters(), kept, 0.1), kept, 0.1, 0, 1)
        moves[ratio] = pair.a.detach() - before[0], pair.b.detach() - before[1]
    assert moves[1.0][0].any() and torch.equal(moves[16.0][0], moves[1.0][0])
    assert torch.allclose(moves[16.0][1], 16.0 * moves[1.0][1], rtol=1e-3, atol=1e-4 * moves[16.0][1].abs().max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "muon", "betas": (0.9, 0.9)}, "optimizer.betas: muon takes no such argument; it takes .*momentum"),
        ({"name": "adamw", "arguments": {"momentun": 1}}, "optimizer.momentun: adamw takes no such argument"),
        ({"name": "adamw", "arguments": {"amsgrad": True, "betas": [2, 2]}}, "adamw refuses them: Invalid beta"),
        ({"name": "adamw", "arguments": {"lr": 1}}, "lr is not set here; the rate is each expert's learning_rate"),
        ({"name": "torch.optim:AdamZ"}, "cannot be had: there is no AdamZ in torch.optim"),
        ({"name": "no_such_package:Lion"}, "cannot be had: there is no Lion in no_such_package"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(Pair().named_parameters(), OptimizerSettings(**settings), 1e-3)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy", "schedulefree"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    place, extra, _ = CLASSES[name]
    for module in (place.split(":")[0], place.split(".")[0].split(":")[0]):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        InputError, match=f'optimizer.name = "{name}" cannot be had: pip install "{extra}"'.replace("[", r"\[")
    ):
        make_optimizer(Pair().named_parameters(), OptimizerSettings(name=name), 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam-w"}, "known are adamw, .*module:Class"),
        ({"name": "schedulefree", "schedule": "cosine"}, 'needs schedule = "constant"'),
        ({"name": "schedulefree", "ema_decay": 0.9}, "exports an average of its own"),
        ({"name": "prodigy", "lora_plus_ratio": 4.0}, "one rate for all weights"),
        ({"betas": (0.9, 1.0)}, "below 1"),
        ({"ema_decay": 1.0}, "less than 1"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)


def test_a_rate_of_one_is_for_optimizers_that_find_their_own():
    ExpertSettings(steps=1, learning_rate=1.0, optimizer=OptimizerSettings(name="prodigy"))
    ExpertSettings(steps=1, learning_rate=1.0, optimizer=OptimizerSettings(name="some:Class"))
    with pytest.raises(ValueError, match="learning_rate must be below 1 with adamw, got 1"):
        ExpertSettings(steps=1, learning_rate=1.0)
    with pytest.raises(ValueError, match="muon takes matrices alone"):
        ExpertSettings(
            steps=1, learning_rate=0.1, optimizer=OptimizerSettings(name="muon"), lora=LoraSettings(dora=True)
        )


def test_tables_in_tables_survive_being_written_down_and_one_expert_may_have_others(tmp_path):
    changes = [
        "lora.rank_pattern={'ffn.net.2'=2, 're:blocks\\.0\\..*to_q'=3}",
        "lora.start_from='runs/earlier'",
        "high.lora.rank_pattern={'ffn.net.2'=5}",
        "optimizer.name='torch.optim:RAdam'",
        "optimizer.arguments={decoupled_weight_decay=true, betas=[0.5, 0.9]}",
        "low.optimizer.arguments={}",
    ]
    config = load_settings(Config, ROOT / "configs" / "pocket.toml", changes)
    assert config.expert("high").lora.rank_pattern == {"ffn.net.2": 5}
    assert config.expert("low").lora.rank_pattern == {"ffn.net.2": 2, r"re:blocks\.0\..*to_q": 3}
    assert config.expert("low").optimizer.arguments == {} != config.expert("high").optimizer.arguments
    (tmp_path / "c.toml").write_text(tomli_w.dumps(config.resolved()))
    assert load_settings(Config, tmp_path / "c.toml", []) == config


def test_a_run_does_not_go_on_with_other_patterns_or_arguments(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text((ROOT / "configs" / "pocket.toml").read_text().replace("alpha = 8\n", "\n"))
    pattern = "lora.rank_pattern={'ffn.net.2'=2}"

    def identity(*changes: str) -> Identity:
        config = load_settings(Config, path, list(changes))
        return Identity(values=flatten(config), samples=torch.zeros(1))

    # Without alpha each module's is its own rank: with a pattern that is another adapter than alpha = rank.
    for before, after, key in (
        ((pattern,), (), r"high\.lora\.rank_pattern"),
        ((), (pattern,), r"high\.lora\.rank_pattern"),
        ((pattern,), ("lora.rank_pattern={'ffn.net.2'=3}",), r"high\.lora\.rank_pattern"),
        ((pattern,), (pattern, "lora.alpha=8"), r"high\.lora\.alpha"),
        (("optimizer.arguments={amsgrad=true}",), (), r"high\.optimizer\.arguments"),
    ):
        with pytest.raises(InputError, match=key):
            require_same_run(identity(*before), identity(*after), {"high": 2, "low": 2}, "here")
    assert require_same_run(identity(), identity("lora.alpha=8"), {"high": 2, "low": 2}, "here") == []


SCHEDULES = ["constant", "linear", "cosine", "cosine_restarts", "polynomial"]


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 50),
    restarts=st.integers(1, 5),
    minimum=st.floats(0, 1),
)
def test_a_rate_rises_to_its_peak_and_stays_between_floor_and_peak(schedule, steps, warmup, restarts, minimum):
    settings = OptimizerSettings(schedule=schedule, warmup_steps=warmup, restarts=restarts, minimum_factor=minimum)
    rates = [learning_rate(step, 0.1, steps, settings) for step in range(steps)]
    assert all(0 < rate <= 0.1 * (1 + 1e-12) or minimum == 0 for rate in rates)
    rising, rest = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert not rest or rest[0] == pytest.approx(0.1)
    floor = 0.1 * (1.0 if schedule == "constant" else minimum)
    assert all(rate >= floor * (1 - 1e-12) for rate in rest)
    if schedule not in ("constant", "cosine_restarts"):
        assert rest == sorted(rest, reverse=True)
    if schedule == "cosine_restarts" and minimum < 1 and len(rest) >= 20:
        assert sum(late > early * (1 + 1e-9) for early, late in pairwise(rest)) == restarts


def test_schedules_are_the_curves_that_they_are_named_for():
    def at(step, **settings):
        return learning_rate(step, 1.0, 100, OptimizerSettings(warmup_steps=0, **settings))

    assert at(50, schedule="linear") == pytest.approx(0.5)
    assert at(25, schedule="cosine") == pytest.approx(0.5 + math.sqrt(2) / 4)
    assert at(50, schedule="polynomial", power=3.0) == pytest.approx(0.125)
    assert at(50, schedule="linear", minimum_factor=0.2) == pytest.approx(0.6)
    assert at(50, schedule="cosine_restarts", restarts=1) == pytest.approx(1.0)
    assert at(25, schedule="cosine_restarts", restarts=1) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def expert(tiny_base):
    """An expert with LoRA; tests put the weights back."""
    model = load_expert(tiny_base, HIGH, torch.float32)
    inject_lora(model, LoraSettings(rank=2), "high", 0)
    start = lora_weights(model)
    yield model
    set_lora_weights(model, start)


def trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def drift(model, optimizer, average, steps: range) -> None:
    """Steps under gradients drawn by the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, p in trainable(model):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if average is not None:
            average.step([p for _, p in trainable(model)])


def test_a_moving_average_is_that_of_the_formula_and_goes_on_to_the_bit(expert):
    settings = OptimizerSettings(ema_decay=0.5, warmup_steps=0)
    start = lora_weights(expert)
    parameters = [p for _, p in trainable(expert)]

    def run(*stretches: range):
        set_lora_weights(expert, start)
        weights, kept, state = {}, {}, {}
        for stretch in stretches:
            if weights:
                set_lora_weights(expert, weights)
            optimizer = make_optimizer(trainable(expert), settings, 1e-3)
            set_rate(optimizer, 1e-3)
            if state:
                load_optimizer_state(optimizer, state)
            average = make_average(expert, parameters, settings.ema_decay, stretch.start, kept)
            if weights:
                assert all(torch.equal(value, weights[name]) for name, value in lora_weights(expert).items())
            drift(expert, optimizer, average, stretch)
            weights = lora_weights(expert)
            kept = averaged_weights(expert, parameters, optimizer, average)
            state = optimizer_state(optimizer)
            assert all(torch.equal(value, weights[name]) for name, value in lora_weights(expert).items())
        return weights, kept

    weights, kept = run(range(6))
    parts, kept_parts = run(range(2), range(2, 6))
    assert equal(weights, parts) and equal(kept, kept_parts) and not equal(weights, kept)
    # The first step's average is its weights; after step n the decay is n / (9 + n), at most what is set.
    expected = None
    for steps in range(1, 7):
        now, _ = run(range(steps))
        decay = min(0.5, steps / (9 + steps)) if steps > 1 else 0.0
        expected = {k: v if expected is None else decay * expected[k] + (1 - decay) * v for k, v in now.items()}
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in kept.items())


def test_schedule_free_weights_are_exported_averaged_and_left_as_they_were(expert):
    settings = OptimizerSettings(name="schedulefree", warmup_steps=0)
    parameters = [p for _, p in trainable(expert)]
    optimizer = make_optimizer(trainable(expert), settings, 1e-2)
    drift(expert, optimizer, None, range(4))
    before, state = lora_weights(expert), optimizer_state(optimizer)
    found = averaged_weights(expert, parameters, optimizer, None)
    assert equal(lora_weights(expert), before) and equal(optimizer_state(optimizer), state)
    # y = (1 - beta) z + beta x, where x is the average, z the last iterate.
    beta = optimizer.param_groups[0]["betas"][0]
    for (name, _), p in zip(trainable(expert), parameters, strict=True):
        x = (p.detach() - (1 - beta) * optimizer.state[p]["z"]) / beta
        assert torch.allclose(found[name.replace(".default", "")], x, atol=1e-5)
    assert not equal(found, before)
    assert (
        averaged_weights(expert, parameters, make_optimizer(trainable(expert), OptimizerSettings(), 1e-3), None) == {}
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": OptimizerSettings(ema_decay=0.9)},
        {"optimizer": OptimizerSettings(name="schedulefree")},
        {"lora": LoraSettings(initialisation="olora")},
    ],
    ids=["average", "schedulefree", "olora"],
)
def test_what_needs_whole_weights_is_refused_where_no_process_has_them(settings):
    common = {"steps": 1, "learning_rate": 1e-3}
    for engine in ("FSDP", "DEEPSPEED"):
        with pytest.raises(InputError, match=f"needs whole weights in each process: train with DDP, not {engine}"):
            require_whole_weights(ExpertSettings(**common, **settings), engine)
    require_whole_weights(ExpertSettings(**common, **settings), "MULTI_GPU")
    require_whole_weights(ExpertSettings(**common), "FSDP")
