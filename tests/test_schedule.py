"""Order by address alone: epochs that are permutations, shares that are kept, one bucket a batch."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schedule import Schedule, Share, visits_in_a_cycle

samples = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=30)
shares = st.lists(
    st.one_of(
        st.builds(Share, repeats=st.integers(1, 3)),
        st.builds(Share, weight=st.sampled_from([0.5, 1.0, 3.0])),
    ),
    min_size=3,
    max_size=3,
)


PLAIN = (Share(), Share(), Share())


def schedule_of(pairs, batch_size=2, shares=PLAIN, address=(1, "high")):
    buckets, sources = zip(*pairs, strict=True)
    sizes = batch_size if isinstance(batch_size, dict) else dict.fromkeys(buckets, batch_size)
    return Schedule(buckets=buckets, sources=sources, shares=shares, batch_size=sizes, address=address)


def check_order(pairs, shares, sizes, seed):
    """Every source walks through its samples in permutations, and gets its visits in every cycle."""
    schedule = schedule_of(pairs, sizes, shares, (seed, "low"))
    visits = visits_in_a_cycle(dict(Counter(pairs)), shares)
    streams: dict[str, list] = {}
    turns = Counter()
    for step in range(3 * len(schedule)):
        bucket, batch = schedule.batch_at(step)
        assert len(batch) == sizes[bucket] and {pairs[v.sample][0] for v in batch} == {bucket}
        streams.setdefault(bucket, []).extend(batch)
        turns[bucket] += 1
        if (step + 1) % len(schedule) == 0:
            cycle = (step + 1) // len(schedule)
            in_cycle = {b: sum(n for (name, _), n in visits.items() if name == b) for b in sizes}
            assert turns == {b: cycle * -(-in_cycle[b] // sizes[b]) for b, _ in pairs}
    for bucket, stream in streams.items():
        of_bucket = {s: n for (b, s), n in visits.items() if b == bucket}
        length = sum(of_bucket.values())
        for first in range(0, len(stream) - length + 1, length):
            assert Counter(pairs[v.sample][1] for v in stream[first : first + length]) == of_bucket
        for source in of_bucket:
            own = [v for v in stream if pairs[v.sample][1] == source]
            members = [i for i, pair in enumerate(pairs) if pair == (bucket, source)]
            for number, first in enumerate(range(0, len(own) - len(members) + 1, len(members))):
                epoch = own[first : first + len(members)]
                assert sorted(v.sample for v in epoch) == members and {v.epoch for v in epoch} == {number}


@given(samples, shares, st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 2**31))
@settings(max_examples=80)
def test_every_source_is_walked_through_in_permutations_and_gets_its_share(pairs, shares, sizes, seed):
    check_order(pairs, shares, dict(zip("abc", sizes, strict=True)), seed)


@pytest.mark.slow
@given(samples, shares, st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 2**31))
@settings(max_examples=10_000)
def test_the_order_holds_for_ten_thousand_sets(pairs, shares, sizes, seed):
    check_order(pairs, shares, dict(zip("abc", sizes, strict=True)), seed)


def test_repeats_multiply_and_weights_share_whatever_the_sizes():
    sizes = {("a", 0): 100, ("a", 1): 10, ("b", 1): 30, ("a", 2): 5}
    assert visits_in_a_cycle(sizes, [Share(repeats=2), Share(), Share(repeats=3)]) == {
        ("a", 0): 200,
        ("a", 1): 10,
        ("b", 1): 30,
        ("a", 2): 15,
    }
    # 140 weighted samples, shared out 1 to 3; of the second source's 105, the buckets get a quarter and three.
    assert visits_in_a_cycle(sizes, [Share(weight=1.0), Share(weight=3.0), Share()]) == {
        ("a", 0): 35,
        ("a", 1): 26,
        ("b", 1): 79,
        ("a", 2): 5,
    }


def test_a_batch_depends_on_its_arguments_alone():
    pairs = [("a", 0)] * 7 + [("b", 0)] * 5
    forward = [schedule_of(pairs).batch_at(step) for step in range(60)]
    np.random.seed(3)
    torch.manual_seed(3)
    schedule = schedule_of(pairs)
    backward = [schedule.batch_at(step) for step in reversed(range(60))]
    assert forward == backward[::-1]
    for address in ((2, "high"), (1, "low")):
        assert forward != [schedule_of(pairs, address=address).batch_at(step) for step in range(60)]
    first = [v.sample for bucket, batch in forward for v in batch if bucket == "a"]
    assert len({tuple(first[7 * e : 7 * e + 7]) for e in range(4)}) == 4
    names = [bucket for bucket, _ in forward]
    cycles = [tuple(names[c : c + len(schedule)]) for c in range(0, 56, len(schedule))]
    assert any(first != second for first, second in pairwise(cycles))


def test_no_sample_and_no_batch_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Schedule(buckets=[], sources=[], shares=[], batch_size={}, address=())
    with pytest.raises(ValueError, match="batch size of a is below 1"):
        schedule_of([("a", 0)], 0)


def test_a_step_of_a_million_samples_costs_what_one_of_a_hundred_does():
    def permuted(count):
        schedule = Schedule(
            buckets=["a"] * count, sources=[0] * count, shares=PLAIN, batch_size={"a": 2}, address=(1, "high")
        )
        drawn = []
        for name in ("_order", "_mix", "_turns"):
            made = getattr(schedule, f"{name}_uncached")
            cached = getattr(schedule, name)
            assert cached.cache_info().maxsize <= 2
            drawn.append((made, cached))
        for step in range(30):
            schedule.batch_at(step)
        return [cached.cache_info().misses for _, cached in drawn]

    assert permuted(1_000_000) == [1, 1, 1] and permuted(100) == [1, 1, 1]
