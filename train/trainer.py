"""Training one expert: load its base, inject LoRA, take steps. The loop is the algorithm; everything else is called."""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from torch import Tensor

from data.batches import Batch, Chosen, ExpertBatches, TrainingData
from data.buckets import Bucket
from data.prefetching import Prefetcher
from wan_finetune.adapters import inject_lora, lora_b, lora_weights, set_lora_weights
from wan_finetune.addressing import seed_at
from wan_finetune.encoders import latent_statistics, pad_text
from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS, ExpertName, boundary_ratio
from wan_finetune.memory.fitting import Fitting
from wan_finetune.memory.levers import is_out_of_memory, next_lever
from wan_finetune.memory.residence import BaseExperts

from .averaging import averaged_weights, make_average, other_weights, require_whole_weights
from .config import Config
from .engine import engine_name, home_device
from .identity import global_batch_size
from .objective import draw, flow_matching_error, level_weights, noise_levels, weighted_loss
from .optim import learning_rate, make_optimizer, set_rate
from .parallel import parallelize
from .records import StepRecord
from .state import ExpertState
from .terminal import say


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPart:
    """What goes through the model at once."""

    batch: Batch
    positions: range
    """Places of its clips in the global batch."""
    share: float
    """Of this process's clips in the step."""


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
        bases: BaseExperts | None = None,
    ) -> None:
        self.config, self.expert, self.state, self.accelerator = config, expert, state, accelerator
        self.data = data
        self.settings = config.expert(expert)
        buckets = [Bucket.parse(name) for name in set(data.samples.column("bucket"))]
        sizes = {str(bucket): self.global_batch_size(bucket) for bucket in buckets}
        self.batches = ExpertBatches(data, expert, config.run.seed, sizes)
        self.prefetcher = Prefetcher(self.load_step)
        self.splits: defaultdict[str, int] = defaultdict(lambda: 1)
        """Parts in which a bucket's micro-batches are worked through, to fit into memory."""
        interval = EXPERTS[expert].interval(boundary_ratio(base))
        self.levels = noise_levels(self.settings.flow, interval, config.sampling)
        self.latents_mean, self.latents_std = latent_statistics(base)
        self.bases = bases or make_bases(config, base, home_device(accelerator))
        model = self.bases.take(expert)
        taken = state.taken if state.weights else None
        state.taken = inject_lora(model, self.settings.lora, expert, config.run.seed, taken)
        if state.weights:
            set_lora_weights(model, state.weights)
        self.num_blocks = model.config.num_layers
        self.fitting = Fitting(
            model,
            config.memory,
            accelerator.device,
            home=home_device(accelerator),
            autocast=config.train.mixed_precision != "no",
        )
        if self.fitting.note:
            say(self.fitting.note)
        model.train()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        require_whole_weights(self.settings, accelerator.distributed_type.value)
        self.start = {} if state.weights else lora_b(lora_weights(model))
        optimizer = make_optimizer(named, self.settings.optimizer, self.settings.learning_rate)
        clip, decay = self.settings.optimizer.gradient_clip, self.settings.optimizer.ema_decay
        self.parallel = parallelize(accelerator, model, optimizer, state.optimizer, clip)
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer
        self.parameters = [p for p in self.parallel.module.parameters() if p.requires_grad]
        self.average = make_average(self.parallel.module, self.parameters, decay, state.step, state.average)

    def take_step(self) -> StepRecord:
        """One optimizer step on the global batch of this step.

        Raises:
            FloatingPointError: when the loss or the gradient is not finite; nothing has been updated then.
            InputError: when the device's memory is too small and the batch cannot be split further.
        """
        began = time.monotonic()
        step = self.state.step
        rate = learning_rate(step, self.settings.learning_rate, self.settings.steps, self.settings.optimizer)
        set_rate(self.optimizer, rate)
        work = self.prefetcher.take(step)
        loaded = time.monotonic()
        loss = self.accumulate_gradient(work, step)
        loss_value, norm_value = self.parallel.update(loss)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise FloatingPointError(
                f"{self.expert} expert, step {step + 1}: loss {loss_value}, gradient norm {norm_value}; samples: "
                f"{', '.join(sorted({place.sample.clip for place in work.places}))}. Nothing was updated; a lower "
                f"learning rate ({self.expert}.learning_rate) or leaving out a damaged clip helps"
            )
        if self.average is not None:
            self.average.step(self.parameters)
        self.state.step += 1
        seconds = time.monotonic() - began
        return StepRecord(
            expert=self.expert,
            step=self.state.step,
            loss=loss_value,
            gradient_norm=norm_value,
            learning_rate=rate,
            seconds=seconds,
            tokens_per_second=len(work.places) * work.places[0].sample.bucket.tokens / seconds,
            stall_seconds=loaded - began,
            memory_gib=memory_gib(self.accelerator.device),
        )

    def rehearse(self) -> None:
        """The largest batch once, forward and backward, so that memory runs out before the first step or not at all.

        Of each checkpointing policy: stills that keep everything may take more than clips. Gradients are dropped; what
        the optimizer will hold is held meanwhile.
        """
        states = [torch.empty_like(parameter) for parameter in self.parameters for _ in range(2)]
        schedule, policy = self.batches.schedule, self.config.memory.policy
        names = sorted(schedule.names, key=lambda name: schedule.batch_size[name] * Bucket.parse(name).tokens)
        for largest in {policy(name): name for name in names}.values():
            step = schedule.first_step_of(largest)
            self.accumulate_gradient(self.load_step(step), step)
            self.optimizer.zero_grad(set_to_none=True)
        del states

    def accumulate_gradient(self, work: StepWork, step: int) -> Tensor:
        """The gradient of the step's mean loss, which is returned; batches are split until they fit into memory."""
        bucket = str(work.places[0].sample.bucket)
        self.fitting.use(bucket)
        while True:
            try:
                return self.backward(work, step, self.splits[bucket])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.require_room(len(work.micro_batches[0].names), bucket, error)
            # Outside of the except clause, whose traceback holds the tensors of the attempt.
            self.optimizer.zero_grad(set_to_none=True)
            release_memory()
            self.splits[bucket] *= 2
            say(f"out of memory in {bucket}: each micro-batch goes through in {self.splits[bucket]} parts from now on")

    def backward(self, work: StepWork, step: int, splits: int) -> Tensor:
        """One pass over the micro-batches, each in `splits` parts; the mean loss, on the device."""
        losses = []
        parts = [part for index in range(len(work.micro_batches)) for part in self.parts_of(work, index, splits)]
        for number, part in enumerate(parts):
            with self.parallel.micro_batch(last=number == len(parts) - 1):
                loss = self.loss_of(part, step, len(work.places))
                loss = loss if len(parts) == 1 else loss * part.share
                self.parallel.backward(loss)
            losses.append(loss.detach())
        return sum(losses[1:], losses[0])

    def parts_of(self, work: StepWork, index: int, splits: int) -> list[BatchPart]:
        """A micro-batch, cut into at most `splits` parts."""
        batch, positions = work.micro_batches[index], self.positions(len(work.places), index)
        size = -(-len(positions) // splits)
        return [
            BatchPart(
                batch=batch.part(start, start + size) if splits > 1 else batch,
                positions=positions[start : start + size],
                share=len(positions[start : start + size]) / (len(positions) * len(work.micro_batches)),
            )
            for start in range(0, len(positions), size)
        ]

    def require_room(self, clips: int, bucket: str, error: RuntimeError) -> None:
        """Whether a batch can be split further.

        Raises:
            InputError: it cannot; what else would help.
        """
        alone = engine_name(self.accelerator) == "single"
        if self.splits[bucket] < clips and alone:
            return
        why = "one clip at a time is still too much" if alone else "the processes would have to agree on it"
        raise InputError(
            f"out of memory in {bucket}, {self.expert} expert; splitting the batch is no way out: {why}. "
            f"Next: {next_lever(self.config.memory, bucket, self.num_blocks)}"
        ) from error

    def load_step(self, step: int) -> StepWork:
        """What a step trains on: this process's micro-batches of its global batch."""
        places = self.batches.places(step)
        micro_batches = [
            self.data.load([places[p] for p in self.positions(len(places), index)])
            for index in range(self.config.train.gradient_accumulation)
        ]
        return StepWork(places=places, micro_batches=micro_batches)

    def loss_of(self, part: BatchPart, step: int, global_batch: int) -> Tensor:
        """The mean loss over a part's clips."""
        batch = part.batch
        latents = (batch.latents - self.latents_mean) / self.latents_std
        draws = draw(
            seed=self.config.run.seed,
            expert=self.expert,
            step=step,
            positions=part.positions,
            global_batch=global_batch,
            levels=self.levels,
            shape=latents.shape[1:],
        )
        if self.settings.lora.dropout:
            # It draws from torch's own generator, and within a checkpointed block again from the same state.
            torch.manual_seed(seed_at(self.config.run.seed, self.expert, "dropout", step, part.positions.start))
        flow, device = self.settings.flow, self.accelerator.device
        errors = flow_matching_error(self.model, latents, pad_text(batch.text), draws, flow, device)
        return weighted_loss(errors, batch.masks, batch.weights * level_weights(draws.sigma, flow))

    @contextmanager
    def exported_weights(self) -> Iterator[None]:
        """The weights that the adapter would have now: averaged ones where there are such."""
        model = self.parallel.module
        averaged = averaged_weights(model, self.parameters, self.optimizer, self.average)
        with other_weights(model, averaged) if averaged else nullcontext():
            yield

    @contextmanager
    def lora_off(self) -> Iterator[None]:
        """The base alone."""
        model: Any = self.parallel.module
        if self.state.taken:
            # What was taken out of the base makes it whole again.
            with other_weights(model, self.state.taken):
                yield
            return
        model.disable_lora()
        try:
            yield
        finally:
            model.enable_lora()

    def positions(self, global_batch: int, index: int) -> range:
        """Positions in the global batch of this process's share of micro-batch `index`."""
        size = global_batch // (self.config.train.gradient_accumulation * self.accelerator.num_processes)
        start = (index * self.accelerator.num_processes + self.accelerator.process_index) * size
        return range(start, start + size)

    def global_batch_size(self, bucket: Bucket) -> int:
        """Clips of this bucket in one optimizer step."""
        return global_batch_size(self.config, bucket, self.accelerator.num_processes)

    def save_state(self) -> None:
        """Bring `state` up to date: weights and optimizer, copied to the CPU."""
        self.state.weights = self.parallel.weights()
        self.state.average = averaged_weights(self.parallel.module, self.parameters, self.optimizer, self.average)
        self.state.optimizer = self.parallel.optimizer_state()

    def close(self) -> None:
        """Give the device's memory back; the state stays.

        Raises:
            RuntimeError: when the steps since the start left a LoRA where it began, so that nothing ever reached it.
        """
        self.prefetcher.close()
        self.save_state()
        self.model = self.optimizer = self.average = None
        self.parameters = []
        self.fitting.close()
        self.parallel.close()
        self.bases.release(self.expert)
        unmoved = [name for name, value in self.start.items() if torch.equal(value, self.state.weights[name])]
        if self.state.step and unmoved:
            raise RuntimeError(
                f"{self.expert} expert: {len(unmoved)} of {len(self.start)} LoRA modules have not moved by "
                f"step {self.state.step}, {unmoved[0]} the first; no gradient reaches them"
            )


def make_bases(config: Config, base: Path, device: torch.device) -> BaseExperts:
    """The frozen experts of a run, as [model] and [memory] say."""
    dtype = getattr(torch, config.model.dtype)
    return BaseExperts(base, config.memory, dtype, device, config.model.attention)


def memory_gib(device: torch.device) -> float:
    """The most memory that was in use so far, of a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
