"""Batches from the caches."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wan_finetune.errors import InputError

from .cache import Cache, Kind, text_key
from .samples import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples of one bucket, on the CPU."""

    latents: Tensor
    """Raw latent means [B, C, f, h, w], fp32."""
    text: list[Tensor]
    """B embeddings [L_i, D], real rows only, in the encoder's dtype."""
    names: list[str]
    """The clips they come from."""


def choose_caption(sample: Sample, rng: np.random.Generator, dropout: float) -> str:
    """One of the sample's captions, each as likely, or "" with probability `dropout`.

    Address the generator by (seed, expert, "caption", step, position).
    """
    # Both draws are made always, so that the caption chosen does not depend on the dropout.
    dropped, choice = rng.random(), rng.integers(len(sample.captions))
    return "" if dropped < dropout else sample.captions[int(choice)]


class TrainingData:
    """Samples whose tensors lie in the cache; those used last stay in memory, up to `memory_bytes`."""

    def __init__(
        self, samples: Sequence[Sample], cache: Cache, *, text_fingerprint: str, memory_bytes: int = 2**30
    ) -> None:
        self.samples = list(samples)
        self._cache = cache
        self._text_fingerprint = text_fingerprint
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[tuple[Kind, str], Tensor] = OrderedDict()
        self.held_bytes = 0

    @property
    def buckets(self) -> list[str]:
        """The bucket of each sample, as `schedule.batch_at` wants them."""
        return [str(sample.bucket) for sample in self.samples]

    def load(self, indices: Sequence[int], captions: Sequence[str]) -> Batch:
        """The batch of these samples, all of one bucket, each with the caption chosen for it.

        Raises:
            ValueError: samples of several buckets, or not one caption for each.
            InputError: an entry is missing from the cache or damaged.
        """
        chosen = [self.samples[index] for index in indices]
        if len({sample.bucket for sample in chosen}) != 1 or len(captions) != len(chosen):
            raise ValueError(f"a batch is one bucket's, with a caption each; got {chosen} and {len(captions)} captions")
        latents = [self._tensor("latent", sample.latent_key) for sample in chosen]
        text = [self._tensor("text", text_key(caption, self._text_fingerprint)) for caption in captions]
        return Batch(latents=torch.stack(latents), text=text, names=[sample.clip for sample in chosen])

    def _tensor(self, kind: Kind, key: str) -> Tensor:
        if (kind, key) in self._held:
            self._held.move_to_end((kind, key))
            return self._held[kind, key]
        entry = self._cache.read(kind, key)
        if entry is None:
            raise InputError(f"{self._cache.path(kind, key)}: not in the cache; run the precompute again")
        tensor = entry[kind]
        self._held[kind, key] = tensor
        self.held_bytes += tensor.nbytes
        while self.held_bytes > self._memory_bytes:
            _, dropped = self._held.popitem(last=False)
            self.held_bytes -= dropped.nbytes
        return tensor
