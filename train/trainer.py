"""Training one expert: load its base, inject LoRA, take steps. The loop is the algorithm; everything else is called."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batches import Batch, Chosen, ExpertBatches, TrainingData
from data.buckets import Bucket
from data.prefetching import Prefetcher
from wan_finetune.adapters import inject_lora, set_lora_weights
from wan_finetune.encoders import latent_statistics, pad_text
from wan_finetune.experts import EXPERTS, ExpertName, boundary_ratio, load_expert
from wan_finetune.flow import add_noise, timestep, velocity

from .config import Config
from .objective import Draws, draw
from .optim import learning_rate, make_optimizer
from .parallel import parallelize


@dataclass(kw_only=True)
class ExpertState:
    """All that an expert's training carries from one step to the next, on the CPU."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one optimizer step reports."""

    expert: ExpertName
    step: int
    """Steps done, this one included."""
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What one process does of a step."""

    places: list[Chosen]
    """The global batch."""
    micro_batches: list[Batch]
    """This process's share of it, loaded."""


class ExpertTrainer:
    """One expert on its device, from its state and back into it."""

    def __init__(
        self,
        config: Config,
        expert: ExpertName,
        state: ExpertState,
        base: Path,
        data: TrainingData,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.expert, self.state, self.accelerator = config, expert, state, accelerator
        self.data = data
        self.settings = config.expert(expert)
        buckets = [Bucket.parse(name) for name in set(data.samples.column("bucket"))]
        sizes = {str(bucket): self.global_batch_size(bucket) for bucket in buckets}
        self.batches = ExpertBatches(data, expert, config.run.seed, sizes)
        self.prefetcher = Prefetcher(self.load_step)
        self.interval = EXPERTS[expert].interval(boundary_ratio(base))
        self.latents_mean, self.latents_std = latent_statistics(base)
        model = load_expert(base, EXPERTS[expert], getattr(torch, config.model.dtype))
        if config.model.attention != "native":
            model.set_attention_backend(config.model.attention)
        inject_lora(model, self.settings.lora, expert, config.run.seed)
        if config.memory.checkpointing == "full":
            model.enable_gradient_checkpointing()
        if state.weights:
            set_lora_weights(model, state.weights)
        model.train()
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], self.settings.optimizer)
        clip = self.settings.optimizer.gradient_clip
        self.parallel = parallelize(accelerator, model, optimizer, state.optimizer, clip)
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer

    def take_step(self) -> StepRecord:
        """One optimizer step on the global batch of this step.

        Raises:
            FloatingPointError: when the loss or the gradient is not finite; nothing has been updated then.
        """
        began = time.monotonic()
        step, accumulation = self.state.step, self.config.train.gradient_accumulation
        rate = learning_rate(step, self.settings.learning_rate, self.settings.steps, self.settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=self.accelerator.device)
        work = self.prefetcher.take(step)
        for index in range(accumulation):
            with self.parallel.micro_batch(last=index == accumulation - 1):
                part = self.micro_batch_loss(work, step, index) / accumulation
                self.parallel.backward(part)
            loss += part.detach()
        loss_value, norm_value = self.parallel.update(loss)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise FloatingPointError(
                f"{self.expert} expert, step {step + 1}: loss {loss_value}, gradient norm {norm_value}; samples: "
                f"{', '.join(sorted({place.sample.clip for place in work.places}))}. Nothing was updated; a lower "
                f"learning rate ({self.expert}.learning_rate) or leaving out a damaged clip helps"
            )
        self.state.step += 1
        return StepRecord(
            expert=self.expert,
            step=self.state.step,
            loss=loss_value,
            gradient_norm=norm_value,
            learning_rate=rate,
            seconds=time.monotonic() - began,
        )

    def load_step(self, step: int) -> StepWork:
        """What a step trains on: this process's micro-batches of its global batch."""
        places = self.batches.places(step)
        micro_batches = [
            self.data.load([places[p] for p in self.positions(len(places), index)])
            for index in range(self.config.train.gradient_accumulation)
        ]
        return StepWork(places=places, micro_batches=micro_batches)

    def micro_batch_loss(self, work: StepWork, step: int, index: int) -> Tensor:
        """The loss of this process's share of micro-batch `index`."""
        batch, global_batch = work.micro_batches[index], len(work.places)
        latents = (batch.latents - self.latents_mean) / self.latents_std
        draws = draw(
            seed=self.config.run.seed,
            expert=self.expert,
            step=step,
            positions=self.positions(global_batch, index),
            global_batch=global_batch,
            interval=self.interval,
            shift=self.settings.flow.shift,
            shape=latents.shape[1:],
        )
        errors = flow_matching_error(self.model, latents, pad_text(batch.text), draws, self.accelerator.device)
        return weighted_loss(errors, batch.masks, batch.weights)

    def positions(self, global_batch: int, index: int) -> range:
        """Positions in the global batch of this process's share of micro-batch `index`."""
        size = global_batch // (self.config.train.gradient_accumulation * self.accelerator.num_processes)
        start = (index * self.accelerator.num_processes + self.accelerator.process_index) * size
        return range(start, start + size)

    def global_batch_size(self, bucket: Bucket) -> int:
        """Clips of this bucket in one optimizer step."""
        settings = self.config.train
        micro = settings.batch_size
        if settings.batch_tokens is not None:
            micro = max(1, settings.batch_tokens // bucket.tokens)
        return micro * settings.gradient_accumulation * self.accelerator.num_processes

    def save_state(self) -> None:
        """Bring `state` up to date: weights and optimizer, copied to the CPU."""
        self.state.weights = self.parallel.weights()
        self.state.optimizer = self.parallel.optimizer_state()

    def close(self) -> None:
        """Give the device's memory back; the state stays."""
        self.prefetcher.close()
        self.save_state()
        self.model = self.optimizer = None
        self.parallel.close()


def flow_matching_error(
    model: Callable[..., tuple[Tensor, ...]], latents: Tensor, text: Tensor, draws: Draws, device: torch.device
) -> Tensor:
    """(v(x_t, t, text) - (noise - latents))^2, [B, C, F, H, W]; text is [B, 512, D]."""
    latents, noise, sigma = latents.to(device), draws.noise.to(device), draws.sigma.to(device)
    predicted = model(
        hidden_states=add_noise(latents, noise, sigma),
        timestep=timestep(sigma),
        encoder_hidden_states=text.to(device),
        return_dict=False,
    )[0]
    return (predicted.float() - velocity(latents, noise)).square()


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
