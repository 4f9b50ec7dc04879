"""Which samples make which batch, in closed form: a function of its arguments, with no state to save or to lose.

Each bucket has an endless stream of its samples, one permutation after another (one is an *epoch* of that bucket).
A *cycle* holds ceil(n / batch_size) batches of each bucket of n samples, shuffled; each takes the next `batch_size`
samples of its bucket's stream.
"""

from collections.abc import Sequence

from wan_finetune.addressing import numpy_rng


def group_by_bucket(buckets: Sequence[str]) -> dict[str, list[int]]:
    """Sample indices of each bucket, buckets sorted by name."""
    return {name: [i for i, bucket in enumerate(buckets) if bucket == name] for name in sorted(set(buckets))}


def cycle_length(buckets: Sequence[str], batch_size: int) -> int:
    """Batches in one cycle, after which every sample has been seen at least once."""
    return sum(-(-len(indices) // batch_size) for indices in group_by_bucket(buckets).values())


def batch_at(step: int, *, buckets: Sequence[str], batch_size: int, seed: int, expert: str) -> list[int]:
    """Indices [batch_size] of the samples in global batch number `step`, all of one bucket.

    `buckets` names the bucket of each sample. Where `batch_size` does not divide a bucket, a batch spans two of its
    epochs and may then hold a sample twice.

    Raises:
        ValueError: no samples, a negative step, or a batch size below 1.
    """
    if not buckets or step < 0 or batch_size < 1:
        raise ValueError(f"needs samples, step >= 0, batch_size >= 1; got {len(buckets)}, {step}, {batch_size}")
    groups = group_by_bucket(buckets)
    sequence = [name for name, indices in groups.items() for _ in range(-(-len(indices) // batch_size))]
    cycle, place = divmod(step, len(sequence))
    shuffled = [sequence[i] for i in numpy_rng(seed, expert, "buckets", cycle).permutation(len(sequence))]
    bucket = shuffled[place]
    batches_before = cycle * sequence.count(bucket) + shuffled[:place].count(bucket)
    indices = groups[bucket]
    batch = []
    orders: dict[int, list[int]] = {}
    for position in range(batches_before * batch_size, (batches_before + 1) * batch_size):
        epoch, offset = divmod(position, len(indices))
        if epoch not in orders:
            orders[epoch] = numpy_rng(seed, expert, "order", bucket, epoch).permutation(len(indices)).tolist()
        batch.append(indices[orders[epoch][offset]])
    return batch
