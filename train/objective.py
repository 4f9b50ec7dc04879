"""The loss of one micro-batch, every draw addressed by (seed, expert, step, position in the global batch)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_finetune.addressing import torch_rng
from wan_finetune.density import (
    Beta,
    Density,
    LogitNormal,
    Mode,
    Uniform,
    quantile_edges,
    sample_schedule,
    sample_sigma,
)
from wan_finetune.errors import InputError
from wan_finetune.experts import ExpertName
from wan_finetune.flow import Interval, add_noise, clamp_to, timestep, velocity
from wan_finetune.sampling import SamplingSettings
from wan_finetune.spec import NUM_TRAIN_TIMESTEPS

from .expert_settings import FlowSettings

LEAST_SHARE = 1e-6
"""Of a density, inside an expert's interval: the tails beyond cannot be told apart in fp64."""

NoiseLevels = Callable[[Tensor], Tensor]
"""Uniform draws [B] in [0, 1) -> noise levels sigma [B] inside an expert's interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What is random about a micro-batch of B clips."""

    sigma: Tensor
    """Noise levels, [B] fp32, inside the expert's interval."""
    noise: Tensor
    """Standard normal, [B, C, F, H, W] fp32."""


def noise_levels(flow: FlowSettings, interval: Interval, sampling: SamplingSettings) -> NoiseLevels:
    """The distribution that a configuration asks for, restricted to an expert.

    Raises:
        InputError: a sampler's schedule that never visits this expert.
    """
    if flow.density == "schedule":
        levels = sampler_levels(sampling.steps, sampling.shift, interval)
        if not len(levels):
            raise InputError(
                f'flow.density = "schedule": {sampling.steps} sampler steps at shift {sampling.shift:g} never visit '
                f"noise levels {interval.low:g} to {interval.high:g}; raise sampling.steps or take another density"
            )
        return lambda v: sample_schedule(v, levels)
    densities: dict[str, Density] = {
        "uniform": Uniform(),
        "logit_normal": LogitNormal(flow.logit_mean, flow.logit_std),
        "mode": Mode(flow.mode_scale),
        "beta": Beta(flow.beta_a, flow.beta_b),
    }
    density = densities[flow.density]
    low, high = quantile_edges(interval, flow.shift, density)
    if high - low < LEAST_SHARE:
        raise InputError(
            f"flow.density = {flow.density!r}: as it is set, {high - low:.1g} of all draws are between noise levels "
            f"{interval.low:g} and {interval.high:g}, so this expert could not be trained by it; flow.shift = "
            f"{flow.shift:g} and the density's parameters decide that"
        )
    return lambda v: sample_sigma(v, interval, flow.shift, density)


def sampler_levels(steps: int, shift: float, interval: Interval) -> Tensor:
    """The noise levels [N] at which `WanPipeline` calls an expert in this many UniPC steps, the highest first."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    low, high = interval.low * NUM_TRAIN_TIMESTEPS, interval.high * NUM_TRAIN_TIMESTEPS
    mine = (scheduler.timesteps >= low) & ((scheduler.timesteps < high) | (interval.high == 1.0))
    return clamp_to(interval, scheduler.sigmas[:-1][mine].float())


def draw(
    *,
    seed: int,
    expert: ExpertName,
    step: int,
    positions: range,
    global_batch: int,
    levels: NoiseLevels,
    shape: torch.Size,
) -> Draws:
    """Draw for these positions of the step's global batch; `shape` is one clip's [C, F, H, W].

    Uniform time is stratified over the global batch: position p has its own slice of it, in an order that changes
    with the step. Same distribution, less variance, whatever the number of processes.
    """
    slices = torch.randperm(global_batch, generator=torch_rng(seed, expert, "strata", step))
    inside, noise = torch.empty(len(positions)), torch.empty(len(positions), *shape)
    for place, position in enumerate(positions):
        inside[place].uniform_(generator=torch_rng(seed, expert, "sigma", step, position))
        noise[place].normal_(generator=torch_rng(seed, expert, "noise", step, position))
    uniform = (slices[positions.start : positions.stop] + inside) / global_batch
    return Draws(sigma=levels(uniform), noise=noise)


def flow_matching_error(
    model: Callable[..., tuple[Tensor, ...]],
    latents: Tensor,
    text: Tensor,
    draws: Draws,
    flow: FlowSettings,
    device: torch.device,
) -> Tensor:
    """How far v(x_t, t, text) is from noise - latents at each place, [B, C, F, H, W]; text is [B, 512, D]."""
    latents, noise, sigma = latents.to(device), draws.noise.to(device), draws.sigma.to(device)
    predicted = model(
        hidden_states=add_noise(latents, noise, sigma),
        timestep=timestep(sigma),
        encoder_hidden_states=text.to(device),
        return_dict=False,
    )[0]
    return miss(predicted.float(), velocity(latents, noise), flow)


def miss(predicted: Tensor, target: Tensor, flow: FlowSettings) -> Tensor:
    """The squared error of each place, or Huber's: the same for small errors, and linear beyond delta."""
    if flow.loss == "mse":
        return (predicted - target).square()
    return 2.0 * torch.nn.functional.huber_loss(predicted, target, reduction="none", delta=flow.huber_delta)


def level_weights(sigma: Tensor, flow: FlowSettings) -> Tensor:
    """Factor of a clip's loss by its noise level, [B]; `cosmap` is Esser et al. 2024."""
    if flow.weighting == "none":
        return torch.ones_like(sigma)
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    return compute_loss_weighting_for_sd3(flow.weighting, sigma)


def weighted_loss(errors: Tensor, masks: Tensor | None, weights: Tensor) -> Tensor:
    """The mean over clips of errors [B, C, F, H, W], each a mean under its mask [B, F, H, W], times its weight [B]."""
    places = errors.mean(1)
    if masks is None:
        clips = places.mean((1, 2, 3))
    else:
        masks = masks.to(places)
        # A window that its mask hides all through has nothing to teach.
        clips = (places * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp_min(1e-6)
    return (clips * weights.to(clips)).mean()
