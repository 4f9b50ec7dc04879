"""The loss on clips that training never sees, at fixed noise: by expert and noise level, LoRA off beside it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from data.batches import Chosen
from wan_finetune.addressing import torch_rng
from wan_finetune.encoders import pad_text
from wan_finetune.experts import ExpertName

from .config import ValidationSettings
from .effect import effect_size
from .expert_settings import FlowSettings
from .objective import Draws, flow_matching_error, weighted_loss
from .records import JsonLines
from .trainer import ExpertTrainer


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelLoss:
    """The loss at one noise level."""

    sigma: float
    loss: float
    base_loss: float
    """With the LoRA off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """One validation of one expert: means over clips and noise levels."""

    expert: ExpertName
    step: int
    loss: float
    base_loss: float
    levels: tuple[LevelLoss, ...]
    effect: float | None
    """`effect_size` of the LoRA at that step."""


class Validation:
    """All validations of a run, in `validation.jsonl` and in memory, the same in every process."""

    def __init__(self, settings: ValidationSettings, folder: Path, accelerator: Accelerator) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.file = JsonLines(folder / "validation.jsonl")
        self.done: list[HeldOutLoss] = []

    def begin(self, steps: dict[ExpertName, int]) -> None:
        """Take up what was written up to these steps; a resumed run measures the rest again."""
        lines: list[Any] = [None]
        if self.accelerator.is_main_process:
            self.file.forget_after(steps)
            lines = [self.file.lines()]
        broadcast_object_list(lines)
        self.done = [from_line(line) for line in lines[0]]

    def of(self, expert: ExpertName) -> list[HeldOutLoss]:
        """One expert's validations, in order."""
        return [each for each in self.done if each.expert == expert]

    def latest(self, expert: ExpertName) -> HeldOutLoss | None:
        return next(reversed(self.of(expert)), None)

    def is_due(self, expert: ExpertName, step: int, last_step: int) -> bool:
        """Whether to validate after `step` steps: before the first, every so often, and after the last."""
        every = self.settings.every_steps
        if not every or any(each.step == step for each in self.of(expert)):
            return False
        return step % every == 0 or step == last_step

    def measure(self, trainer: ExpertTrainer) -> HeldOutLoss | None:
        """Validate an expert as it stands and write it down; None where nothing is held out."""
        clips = held_out_places(trainer)
        if not clips:
            return None
        known = self.of(trainer.expert)
        sigmas = trainer.levels((torch.arange(self.settings.levels) + 0.5) / self.settings.levels)
        base = [level.base_loss for level in known[0].levels] if known else None
        if base is None:
            with trainer.lora_off():
                base = level_losses(trainer, clips, sigmas).tolist()
        with trainer.exported_weights():
            losses = level_losses(trainer, clips, sigmas).tolist()
            effect = effect_size(trainer.parallel.module, trainer.state.taken)
        levels = tuple(
            LevelLoss(sigma=sigma, loss=loss, base_loss=off)
            for sigma, loss, off in zip(sigmas.tolist(), losses, base, strict=True)
        )
        found = HeldOutLoss(
            expert=trainer.expert,
            step=trainer.state.step,
            loss=sum(losses) / len(losses),
            base_loss=sum(base) / len(base),
            levels=levels,
            effect=effect,
        )
        self.done.append(found)
        if self.accelerator.is_main_process:
            self.file.append(asdict(found))
        return found

    def has_stopped(self, expert: ExpertName, patience: int) -> bool:
        """Whether `patience` validations have passed without a new lowest loss."""
        losses = [each.loss for each in self.of(expert)]
        return bool(patience) and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])


def from_line(line: dict[str, Any]) -> HeldOutLoss:
    return HeldOutLoss(**{**line, "levels": tuple(LevelLoss(**level) for level in line["levels"])})


def held_out_places(trainer: ExpertTrainer) -> list[Chosen]:
    """One window of each held-out clip that this expert is for, with its first caption."""
    data, paths = trainer.data, set()
    places = []
    for index in trainer.batches.held_out.tolist():
        sample = data.samples[index]
        if sample.path not in paths:
            paths.add(sample.path)
            places.append(Chosen(sample=sample, window=0, caption=sample.captions[0][0]))
    return places


@torch.no_grad()
def level_losses(trainer: ExpertTrainer, clips: Sequence[Chosen], sigmas: Tensor) -> Tensor:
    """The mean squared error over clips at each noise level, [levels]; the processes share the work.

    Noise is a function of the clip and the level, so that runs and steps can be compared.
    """
    accelerator = trainer.accelerator
    work = [(clip, level) for clip in clips for level in range(len(sigmas))]
    # Every process runs as many forward passes as any other: sharded models wait for each other in each.
    rounds = -(-len(work) // accelerator.num_processes)
    sums = torch.zeros(len(sigmas), device=accelerator.device)
    trainer.model.eval()
    for number in range(rounds):
        place = number * accelerator.num_processes + accelerator.process_index
        clip, level = work[place % len(work)]
        batch = trainer.data.load([clip])
        latents = (batch.latents - trainer.latents_mean) / trainer.latents_std
        noise = torch.randn(latents.shape, generator=torch_rng("held-out", clip.sample.latent_keys[0], level))
        draws = Draws(sigma=sigmas[level : level + 1], noise=noise)
        errors = flow_matching_error(
            trainer.model, latents, pad_text(batch.text), draws, FlowSettings(), accelerator.device
        )
        if place < len(work):
            sums[level] += weighted_loss(errors, batch.masks, torch.ones(1))
    trainer.model.train()
    return accelerator.reduce(sums, "sum").cpu() / len(clips)
