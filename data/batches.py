"""Batches from the caches."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_finetune.addressing import numpy_rng
from wan_finetune.errors import InputError
from wan_finetune.spec import LATENT_CHANNELS

from .cache import Cache, Kind, text_key
from .config import DataConfig, Expert
from .samples import Sample, SampleTable
from .schedule import Schedule, Share


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples of one bucket, on the CPU."""

    latents: Tensor
    """Raw latent means [B, C, f, h, w], fp32."""
    text: list[Tensor]
    """B embeddings [L_i, D], real rows only, in the encoder's dtype."""
    masks: Tensor | None
    """How much each place of a latent counts [B, f, h, w], 0..1, or None where no sample has a mask."""
    weights: Tensor
    """Factor of each clip's loss [B]."""
    names: list[str]
    """The clips they come from."""

    def part(self, start: int, stop: int) -> "Batch":
        """Samples `start` to `stop` of it."""
        return Batch(
            latents=self.latents[start:stop],
            text=self.text[start:stop],
            masks=None if self.masks is None else self.masks[start:stop],
            weights=self.weights[start:stop],
            names=self.names[start:stop],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """One place of a batch, settled."""

    sample: Sample
    window: int
    """Which of the sample's windows."""
    caption: str


class TrainingData:
    """Samples whose tensors lie in the cache; captions used last stay in memory, up to `memory_bytes`.

    Those of `held_out` [N] are for validation: no batch for training has them. `load` may be called by several threads,
    as batches are made ahead while held-out clips are looked at.
    """

    def __init__(
        self,
        samples: SampleTable,
        cache: Cache,
        config: DataConfig,
        *,
        text_fingerprint: str,
        held_out: NDArray[np.bool_] | None = None,
        memory_bytes: int = 2**28,
    ) -> None:
        self.samples, self.config = samples, config
        self.held_out = np.zeros(len(samples), dtype=bool) if held_out is None else held_out
        self.cache = cache
        self._text_fingerprint = text_fingerprint
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.held_bytes = 0

    def load(self, chosen: Sequence[Chosen]) -> Batch:
        """The batch of these places, all of one bucket.

        Raises:
            ValueError: samples of several buckets.
            InputError: an entry is missing from the cache or damaged.
        """
        if len({place.sample.bucket for place in chosen}) != 1:
            raise ValueError(f"a batch is one bucket's; got {sorted({str(p.sample.bucket) for p in chosen})}")
        latents = torch.empty(len(chosen), LATENT_CHANNELS, *chosen[0].sample.bucket.latent_shape)
        for latent, place in zip(latents, chosen, strict=True):
            key = place.sample.latent_keys[place.window]
            if not self.cache.read_into("latent", key, latent):
                self._raise_missing("latent", key)
        return Batch(
            latents=latents,
            text=[self._text(place.caption) for place in chosen],
            masks=self._masks(chosen),
            weights=torch.tensor([self.config.sources[place.sample.source].loss_weight for place in chosen]),
            names=[place.sample.clip for place in chosen],
        )

    def used_keys(self) -> dict[Kind, set[str]]:
        """The keys of all entries that training may ask for."""
        used: dict[Kind, set[str]] = {"latent": set(), "mask": set(), "text": {self._text_key("")}}
        for sample in self.samples:
            used["latent"].update(sample.latent_keys)
            used["mask"].update(sample.mask_keys)
            used["text"].update(self._text_key(caption) for orders in sample.captions for caption in orders)
        return used

    def _masks(self, chosen: Sequence[Chosen]) -> Tensor | None:
        if not any(place.sample.mask_keys for place in chosen):
            return None
        masks = torch.ones(len(chosen), *chosen[0].sample.bucket.latent_shape)
        for mask, place in zip(masks, chosen, strict=True):
            if place.sample.mask_keys and not self.cache.read_into("mask", place.sample.mask_keys[place.window], mask):
                self._raise_missing("mask", place.sample.mask_keys[place.window])
        return masks

    def _text(self, caption: str) -> Tensor:
        """One caption's rows; those used last are held, for captions come again and again."""
        with self._lock:
            if caption in self._held:
                self._held.move_to_end(caption)
                return self._held[caption]
        key = self._text_key(caption)
        entry = self.cache.read("text", key)
        if entry is None:
            self._raise_missing("text", key)
        rows = entry["text"]
        with self._lock:
            # Another thread may have read it meanwhile.
            if caption not in self._held:
                self._held[caption] = rows
                self.held_bytes += rows.nbytes
            while self.held_bytes > self._memory_bytes:
                _, dropped = self._held.popitem(last=False)
                self.held_bytes -= dropped.nbytes
        return rows

    def _text_key(self, caption: str) -> str:
        return text_key(caption, self._text_fingerprint)

    def _raise_missing(self, kind: Kind, key: str) -> NoReturn:
        raise InputError(f"{self.cache.path(kind, key)}: not in the cache; run the same command again")


class ExpertBatches:
    """What one expert is trained on, batch by batch: a function of seed, expert and step.

    Args:
        batch_size: clips in a global batch of each bucket, by the bucket's name.

    Raises:
        InputError: no sample is for this expert.
    """

    def __init__(self, data: TrainingData, expert: Expert, seed: int, batch_size: dict[str, int]) -> None:
        self.data, self.expert, self.seed = data, expert, seed
        sources, stills = data.samples.column("source"), data.samples.column("still")
        mine = [
            expert in experts_of(data.config, int(s), bool(still)) for s, still in zip(sources, stills, strict=True)
        ]
        self.indices = np.flatnonzero(np.array(mine) & ~data.held_out)
        self.held_out = np.flatnonzero(np.array(mine) & data.held_out)
        if not len(self.indices):
            raise InputError(
                f"none of the {len(sources)} samples is for the {expert} expert: stills go to the low one "
                f"alone; add videos, name it in the experts of a source, or leave it out of train.experts"
            )
        self.schedule = Schedule(
            buckets=data.samples.column("bucket")[self.indices].tolist(),
            sources=sources[self.indices].tolist(),
            shares=[Share(repeats=source.repeats or 1, weight=source.weight) for source in data.config.sources],
            batch_size=batch_size,
            address=(seed, expert),
        )

    def places(self, step: int) -> list[Chosen]:
        """The global batch of a step, each place settled."""
        _, visits = self.schedule.batch_at(step)
        return [self.choose(step, position, int(self.indices[v.sample]), v.epoch) for position, v in enumerate(visits)]

    def choose(self, step: int, position: int, index: int, epoch: int) -> Chosen:
        """One of a sample's windows, by the epoch; and one of its captions, or the empty one."""
        sample: Sample = self.data.samples[index]
        rng = numpy_rng(self.seed, self.expert, "caption", step, position)
        # All draws are made always, so that the caption chosen does not depend on the dropout.
        dropped = rng.random() < self.data.config.caption_dropout
        orders = sample.captions[int(rng.integers(len(sample.captions)))]
        caption = orders[int(rng.integers(len(orders)))]
        window = 0
        if len(sample.latent_keys) > 1:
            window = int(numpy_rng(self.seed, self.expert, "window", epoch, index).integers(len(sample.latent_keys)))
        return Chosen(sample=sample, window=window, caption="" if dropped else caption)


def experts_of(config: DataConfig, source: int, still: bool) -> tuple[Expert, ...]:
    """Which experts see a sample: what its source says; else both see videos, and stills teach no motion."""
    return config.sources[source].experts or (("low", "single") if still else ("high", "low", "single"))
