"""Order by address alone, and batches that hold what was cached."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import TrainingData, choose_caption
from data.cache import Cache
from data.clips import find_clips
from data.samples import list_samples
from data.schedule import batch_at, cycle_length
from tests.data_material import Encoders, config_for, good_folder, run_precompute
from wan_finetune.addressing import numpy_rng
from wan_finetune.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return good_folder(tmp_path)


bucket_lists = st.lists(st.sampled_from("abc"), min_size=1, max_size=25)


@given(bucket_lists, st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(["high", "low"]))
@settings(max_examples=60, deadline=None)
def test_every_sample_is_seen_once_in_each_epoch_of_its_bucket(buckets, batch_size, seed, expert):
    length = cycle_length(buckets, batch_size)
    assert length == sum(-(-n // batch_size) for n in Counter(buckets).values())
    seen = {name: [] for name in set(buckets)}
    for cycle in range(3):
        names = []
        for step in range(cycle * length, (cycle + 1) * length):
            batch = batch_at(step, buckets=buckets, batch_size=batch_size, seed=seed, expert=expert)
            assert len(batch) == batch_size and len({buckets[i] for i in batch}) == 1
            names.append(buckets[batch[0]])
            seen[names[-1]] += batch
        assert Counter(names) == {name: -(-n // batch_size) for name, n in Counter(buckets).items()}
    for name, stream in seen.items():
        members = [i for i, bucket in enumerate(buckets) if bucket == name]
        assert len(stream) >= 3 * len(members)
        for start in range(0, len(stream) - len(members) + 1, len(members)):
            assert sorted(stream[start : start + len(members)]) == members


def test_batch_depends_on_its_arguments_alone():
    buckets = ["a"] * 7 + ["b"] * 5

    def batches(steps, **changes):
        arguments = {"buckets": buckets, "batch_size": 2, "seed": 1, "expert": "high", **changes}
        return {step: batch_at(step, **arguments) for step in steps}

    forward = batches(range(60))
    np.random.seed(3)
    torch.manual_seed(3)
    backward = batches(reversed(range(60)))
    assert forward == backward and batches([41])[41] == forward[41]
    assert forward != batches(range(60), seed=2) and forward != batches(range(60), expert="low")
    orders = {tuple(i for s in range(35) for i in forward[s] if buckets[i] == "a")[7 * e : 7 * e + 7] for e in range(4)}
    assert len(orders) == 4
    # The members' order changes from epoch to epoch, and so does the buckets' from cycle to cycle.
    assert len({tuple(buckets[forward[s][0]] for s in range(7 * c, 7 * c + 7)) for c in range(8)}) > 1
    for wrong in ({"buckets": []}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="needs samples"):
            batches([0], **wrong)


def test_batches_hold_the_cached_tensors(folder, tmp_path):
    clips, _ = find_clips(config_for(folder))
    cache = Cache(tmp_path / "cache")
    samples = run_precompute(clips, cache, Encoders())
    training = TrainingData(samples, cache, text_fingerprint="umt5-1")
    assert training.buckets == ["64x64x17"] * 3
    batch = training.load([2, 0], ["", "a blue square"])
    assert batch.names == ["sub/c.mkv", "a.MOV"] and batch.latents.dtype == torch.float32
    assert batch.latents.shape == (2, 2, 5, 8, 8)
    for row, index in zip(batch.latents, (2, 0), strict=True):
        assert torch.equal(row, cache.read("latent", samples[index].latent_key)["latent"])
    assert [tuple(rows.shape) for rows in batch.text] == [(1, 4), (4, 4)]
    with pytest.raises(ValueError, match="a caption each"):
        training.load([0, 1], [""])
    with pytest.raises(InputError, match="not in the cache; run the precompute"):
        training.load([0], ["never encoded"])
    for entry in (tmp_path / "cache").rglob("*.safetensors"):
        entry.unlink()
    assert torch.equal(training.load([2], [""]).latents[0], batch.latents[0]), "still in memory"


def test_memory_stays_below_its_bound(folder, tmp_path):
    clips, _ = find_clips(config_for(folder))
    cache = Cache(tmp_path / "cache")
    samples = run_precompute(clips, cache, Encoders())
    one_latent = 4 * 2 * 5 * 8 * 8
    training = TrainingData(samples, cache, text_fingerprint="umt5-1", memory_bytes=2 * one_latent)
    for index in (0, 1, 2, 1, 0, 2):
        expected = cache.read("latent", samples[index].latent_key)["latent"]
        assert torch.equal(training.load([index], [samples[index].captions[0]]).latents[0], expected)
        assert 0 < training.held_bytes <= 2 * one_latent


def test_captions_are_chosen_by_address_and_dropped_at_the_given_rate(folder):
    clips, _ = find_clips(config_for(folder))
    sample = list_samples(clips, fps=16.0, video_fingerprint="v")[1]

    def chosen(dropout):
        return [choose_caption(sample, numpy_rng(0, "high", "caption", s, 0), dropout) for s in range(2000)]

    counts = Counter(chosen(0.2))
    assert chosen(0.2) == chosen(0.2) and set(counts) == {"", *sample.captions}
    # Four standard deviations of a binomial of 2000.
    assert abs(counts[""] - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8)
    assert abs(counts[sample.captions[0]] - 800) < 4 * math.sqrt(2000 * 0.4 * 0.6)
    assert "" not in chosen(0.0) and set(chosen(1.0)) == {""}
    kept = zip(chosen(0.0), chosen(0.2), strict=True)
    assert all(with_dropout in ("", without) for without, with_dropout in kept)
