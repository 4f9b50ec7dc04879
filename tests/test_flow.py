"""Noise levels: every t that trains an expert is one at which the pipeline would call it."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from train.expert_settings import FlowSettings
from train.objective import draw, miss, noise_levels, sampler_levels
from wan_finetune.density import Beta, LogitNormal, Mode, Uniform, sample_sigma
from wan_finetune.errors import InputError
from wan_finetune.experts import HIGH, LOW
from wan_finetune.flow import Interval, add_noise, shift_time, timestep, unshift_sigma, velocity
from wan_finetune.sampling import SamplingSettings

DENSITIES = [Uniform(), LogitNormal(0.0, 1.0), LogitNormal(-0.5, 0.7), Mode(1.29), Mode(-0.9), Beta(0.4, 3.0)]


@given(
    shift=st.floats(0.2, 20),
    boundary=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
    density=st.sampled_from(DENSITIES),
)
def test_every_timestep_goes_where_inference_would_send_it(shift, boundary, seed, density):
    u = torch.cat([torch.rand(64, generator=torch.Generator().manual_seed(seed)), torch.tensor([0.0, 1.0 - 2**-24])])
    for expert in (HIGH, LOW):
        t = timestep(sample_sigma(u, expert.interval(boundary), shift, density))
        is_high = t >= boundary * 1000  # WanPipeline.__call__: t >= boundary_timestep is the transformer's
        assert is_high.all() if expert is HIGH else not is_high.any()
        assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1000


def spread(density, count):
    """Evenly spread draws of a density, by an outside oracle where there is one."""
    p = (np.arange(count) + 0.5) / count
    if isinstance(density, Beta):
        return scipy.stats.beta(density.a, density.b).ppf(p)
    if isinstance(density, LogitNormal):
        return scipy.special.expit(scipy.stats.norm(density.mean, density.std).ppf(p))
    if isinstance(density, Mode):  # Esser et al. 2024, equation 20
        return np.sort(1 - p - density.scale * (np.cos(np.pi / 2 * p) ** 2 - 1 + p))
    return p


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_each_expert_sees_the_shifted_density_restricted_to_it(shift, density):
    everywhere = shift_time(torch.from_numpy(spread(density, 200_000)), shift)
    u = (torch.arange(200_000) + 0.5) / 200_000
    for expert in (HIGH, LOW):
        interval = expert.interval(0.875)
        mine = everywhere[(everywhere >= interval.low) & (everywhere < interval.high)]
        drawn = sample_sigma(u, interval, shift, density).double()
        levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        assert torch.allclose(torch.quantile(mine, levels), torch.quantile(drawn, levels), atol=2e-3)


@given(shift=st.floats(0.1, 30), u=st.floats(0, 1))
def test_unshift_undoes_shift(shift, u):
    u = torch.tensor([u], dtype=torch.float64)
    assert torch.allclose(unshift_sigma(shift_time(u, shift), shift), u, atol=1e-9)


@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_the_shift_is_the_samplers(shift):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(40)
    # The sampler walks u from 1 down to a thousandth, and cuts its timesteps to whole ones.
    ours = timestep(shift_time(torch.linspace(1, 0.001, 41, dtype=torch.float64)[:-1], shift))
    assert (ours - scheduler.timesteps).min() >= 0 and (ours - scheduler.timesteps).max() < 1.0001


@pytest.mark.parametrize("shift", [5.0, 12.0])
def test_the_schedule_density_draws_the_samplers_own_levels_as_the_pipeline_shares_them(shift):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(40)
    high, low = (sampler_levels(40, shift, expert.interval(0.875)) for expert in (HIGH, LOW))
    assert len(high) == int((scheduler.timesteps >= 875).sum()) == {5.0: 17, 12.0: 26}[shift]
    assert torch.allclose(torch.cat([high, low]), scheduler.sigmas[:-1].float(), atol=1e-6)
    assert (timestep(high) >= 875).all() and (timestep(low) < 875).all()
    levels = noise_levels(FlowSettings(density="schedule"), HIGH.interval(0.875), SamplingSettings(shift=shift))
    drawn = levels((torch.arange(1000) + 0.5) / 1000)
    values, counts = drawn.unique(return_counts=True)
    assert torch.equal(values.flip(0), high) and counts.max() - counts.min() <= 1
    with pytest.raises(InputError, match="2 sampler steps at shift 1 never visit"):
        noise_levels(FlowSettings(density="schedule"), Interval(0.2, 0.4), SamplingSettings(steps=2, shift=1.0))


def test_a_density_that_never_reaches_an_expert_is_refused():
    flow = FlowSettings(density="logit_normal", logit_mean=-1.5, logit_std=0.4, shift=1.0)
    with pytest.raises(InputError, match=r"of all draws are between noise levels 0\.875 and 1"):
        noise_levels(flow, HIGH.interval(0.875), SamplingSettings())
    assert noise_levels(flow, LOW.interval(0.875), SamplingSettings())(torch.tensor([0.5])) < 0.5


def test_hubers_loss_is_the_squared_error_of_small_misses_and_linear_beyond():
    target = torch.zeros(3)
    huber = miss(torch.tensor([0.1, 0.5, 10.0]), target, FlowSettings(loss="huber", huber_delta=1.0))
    assert torch.allclose(huber, torch.tensor([0.01, 0.25, 2 * (10.0 - 0.5)]))
    assert torch.equal(
        miss(torch.tensor([0.1, 0.5, 10.0]), target, FlowSettings()), torch.tensor([0.1, 0.5, 10.0]) ** 2
    )


def test_the_velocity_takes_the_noisy_latent_back_to_both_ends():
    latents, noise, sigma = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    noisy, target, s = add_noise(latents, noise, sigma), velocity(latents, noise), sigma.view(-1, 1, 1, 1, 1)
    assert torch.allclose(noisy - s * target, latents, atol=1e-6)
    assert torch.allclose(noisy + (1 - s) * target, noise, atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (-0.1, 1.0), (0.2, 1.1)])
def test_an_interval_that_is_none_is_refused(bounds):
    with pytest.raises(ValueError, match="interval"):
        Interval(*bounds)


def draws(**changes):
    arguments = {
        "seed": 1,
        "expert": "high",
        "step": 7,
        "positions": range(8),
        "global_batch": 8,
        "levels": noise_levels(FlowSettings(shift=5.0), HIGH.interval(0.875), SamplingSettings()),
        "shape": torch.Size([2, 1, 2, 2]),
    }
    return draw(**{**arguments, **changes})


def test_draws_are_a_function_of_their_address():
    torch.manual_seed(0)
    first = draws()
    torch.randn(5)
    again = draws()
    assert torch.equal(first.noise, again.noise) and torch.equal(first.sigma, again.sigma)
    for change in ({"seed": 2}, {"step": 8}, {"expert": "low"}):
        assert not torch.equal(first.noise, draws(**change).noise)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    whole = draws()
    parts = [draws(positions=range(start, start + 2)) for start in (0, 2, 4, 6)]
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.sigma, torch.cat([part.sigma for part in parts]))


def test_noise_levels_are_spread_over_the_batch():
    sigma = draws(step=3).sigma.double()
    edges = unshift_sigma(torch.tensor([0.875, 1.0], dtype=torch.float64), 5.0)
    place = (unshift_sigma(sigma, 5.0) - edges[0]) / (edges[1] - edges[0])
    assert sorted((place * 8).floor().clamp(0, 7).tolist()) == list(range(8))


def test_each_place_of_the_batch_sees_the_whole_distribution_over_the_steps():
    # Spread over the batch, and yet no clip is tied to a noise level: over steps each place draws what all together do.
    levels = noise_levels(FlowSettings(shift=5.0), HIGH.interval(0.875), SamplingSettings())
    drawn = torch.cat([draws(step=step, positions=range(3, 4), levels=levels).sigma for step in range(2000)])
    edges = unshift_sigma(torch.tensor([0.875, 1.0], dtype=torch.float64), 5.0)
    place = ((unshift_sigma(drawn.double(), 5.0) - edges[0]) / (edges[1] - edges[0])).sort().values
    distance = (place - (torch.arange(2000) + 0.5) / 2000).abs().max()
    assert distance < 1.36 / 2000**0.5  # Kolmogorov and Smirnov's bound at 95%


def test_expert_names_are_diffusers(tiny_base: Path):
    index = json.loads((tiny_base / "model_index.json").read_text())
    assert HIGH.component == "transformer" and LOW.component == "transformer_2"
    assert {HIGH.component, LOW.component} <= index.keys()
