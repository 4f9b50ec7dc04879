"""Which samples make which batch, in closed form: a function of its arguments, with no state to save or to lose.

Each bucket has an endless stream of visits. It is made of *cycles*; in one, every source of the bucket has its share
of visits, shuffled among the others', and each source walks through its samples in one permutation after another (one
is an *epoch* of that source in that bucket). Batches are cut from a bucket's stream, and buckets take turns in shuffled
order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wan_finetune.addressing import Address, numpy_rng


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How often a source is visited: `repeats` of each sample an epoch, or by `weight` against other weighted ones."""

    repeats: int = 1
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """One place in a batch."""

    sample: int
    """Index of the sample."""
    epoch: int
    """How often its source has been walked through before, in its bucket."""


@dataclass(frozen=True, slots=True)
class _Shuffled:
    """Labels in random order, and for each place how many equal ones stand before it."""

    labels: NDArray[np.int64]
    before: NDArray[np.int64]


class Schedule:
    """The batches of one expert.

    Args:
        buckets: name of each sample's bucket, [N].
        sources: number of each sample's source, [N].
        shares: one for each source.
        batch_size: clips in a global batch of each bucket.
        address: seed and expert; equal addresses give equal batches.
    """

    def __init__(
        self,
        *,
        buckets: Sequence[str] | NDArray[Any],
        sources: Sequence[int] | NDArray[Any],
        shares: Sequence[Share],
        batch_size: dict[str, int],
        address: tuple[Address, ...],
    ) -> None:
        if not len(buckets):
            raise ValueError("needs at least one sample")
        self.names = sorted(set(buckets))
        if small := [name for name in self.names if batch_size[name] < 1]:
            raise ValueError(f"batch size of {', '.join(small)} is below 1")
        self.batch_size, self.address = batch_size, address
        number = {name: index for index, name in enumerate(self.names)}
        source = np.asarray(sources, np.int32)
        bucket = np.fromiter((number[name] for name in buckets), np.int32, len(buckets))
        self.members = {
            (name, int(s)): np.flatnonzero((bucket == number[name]) & (source == s))
            for name in self.names
            for s in np.unique(source[bucket == number[name]])
        }
        self.visits = visits_in_a_cycle({key: len(m) for key, m in self.members.items()}, shares)
        self.cycle = {name: sum(n for (b, _), n in self.visits.items() if b == name) for name in self.names}
        self.turns = [-(-self.cycle[name] // batch_size[name]) for name in self.names]
        self._order = lru_cache(maxsize=2 * len(self.members))(self._order_uncached)
        self._mix = lru_cache(maxsize=2 * len(self.names))(self._mix_uncached)
        self._turns = lru_cache(maxsize=2)(self._turns_uncached)

    def __len__(self) -> int:
        """Batches in a cycle, after which every sample has been visited at least once."""
        return sum(self.turns)

    def batch_at(self, step: int) -> tuple[str, list[Visit]]:
        """The bucket of global batch number `step`, from 0, and its visits."""
        cycle, place = divmod(step, len(self))
        turns = self._turns(cycle)
        number = int(turns.labels[place])
        bucket = self.names[number]
        batch = cycle * self.turns[number] + int(turns.before[place])
        size = self.batch_size[bucket]
        return bucket, [self.visit(bucket, position) for position in range(batch * size, (batch + 1) * size)]

    def first_step_of(self, bucket: str) -> int:
        """The first batch that is of this bucket."""
        return int(np.flatnonzero(self._turns(0).labels == self.names.index(bucket))[0])

    def visit(self, bucket: str, position: int) -> Visit:
        """Place number `position` of a bucket's stream."""
        cycle, place = divmod(position, self.cycle[bucket])
        mix = self._mix(bucket, cycle)
        source = int(mix.labels[place])
        members = self.members[bucket, source]
        own = cycle * self.visits[bucket, source] + int(mix.before[place])
        epoch, place = divmod(own, len(members))
        return Visit(int(members[self._order(bucket, source, epoch)[place]]), epoch)

    def _order_uncached(self, bucket: str, source: int, epoch: int) -> NDArray[np.int64]:
        rng = numpy_rng(*self.address, "order", bucket, source, epoch)
        return rng.permutation(len(self.members[bucket, source]))

    def _mix_uncached(self, bucket: str, cycle: int) -> _Shuffled:
        counts = {source: n for (name, source), n in self.visits.items() if name == bucket}
        return _shuffle(counts, numpy_rng(*self.address, "sources", bucket, cycle))

    def _turns_uncached(self, cycle: int) -> _Shuffled:
        return _shuffle(dict(enumerate(self.turns)), numpy_rng(*self.address, "buckets", cycle))


def _shuffle(counts: dict[int, int], rng: np.random.Generator) -> _Shuffled:
    labels = np.repeat(list(counts), list(counts.values()))
    labels = labels[rng.permutation(len(labels))]
    before = np.empty(len(labels), np.int64)
    for label, count in counts.items():
        before[labels == label] = np.arange(count)
    return _Shuffled(labels, before)


def visits_in_a_cycle(sizes: dict[tuple[str, int], int], shares: Sequence[Share]) -> dict[tuple[str, int], int]:
    """Visits of each (bucket, source) in a cycle, from its number of samples.

    Weighted sources share out the samples that they have together, and each of its buckets gets a part by its size;
    none gets less than one visit.
    """
    weights = {s: share.weight for s, share in enumerate(shares) if share.weight is not None}
    total = sum(n for (_, s), n in sizes.items() if s in weights)
    present = {s for _, s in sizes}
    all_weights = sum(weight for s, weight in weights.items() if s in present)
    visits: dict[tuple[str, int], int] = {}
    for (bucket, source), n in sizes.items():
        if source in weights:
            own = sum(m for (_, s), m in sizes.items() if s == source)
            visits[bucket, source] = max(1, floor(total * weights[source] / all_weights * n / own + 0.5))
        else:
            visits[bucket, source] = shares[source].repeats * n
    return visits
