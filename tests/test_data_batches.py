"""Batches that hold what was cached, and choices that depend on their address alone."""

import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from data.batches import Chosen, ExpertBatches, TrainingData
from data.cache import Cache
from tests.data_material import add_clip, config_for, good_folder, prepare
from wan_finetune.errors import InputError


@pytest.fixture
def material(tmp_path):
    """The configuration and the samples of three clips, encoded."""

    def make(*sources, **changes):
        config = config_for(*(sources or (good_folder(tmp_path),)), cache=tmp_path / "cache", **changes)
        return config, prepare(config, tmp_path / "data_report.jsonl")

    return make


def data_of(config, samples, **changes):
    return TrainingData(samples, Cache(config.cache), config, text_fingerprint="umt5-1", **changes)


def place(samples, index, caption, window=0):
    return Chosen(sample=samples[index], window=window, caption=caption)


def test_batches_hold_the_cached_tensors(material):
    config, samples = material()
    data, cache = data_of(config, samples), Cache(config.cache)
    batch = data.load([place(samples, 2, ""), place(samples, 0, "a blue square")])
    assert batch.names == ["sub/c.mkv", "a.MOV"] and batch.latents.dtype == torch.float32 and batch.masks is None
    assert batch.latents.shape == (2, 16, 5, 8, 8) and batch.weights.tolist() == [1.0, 1.0]
    for row, index in zip(batch.latents, (2, 0), strict=True):
        assert torch.equal(row, cache.read("latent", samples[index].latent_keys[0])["latent"])
    assert [tuple(rows.shape) for rows in batch.text] == [(1, 4), (4, 4)]
    with pytest.raises(InputError, match="not in the cache; run the same command again"):
        data.load([place(samples, 0, "never encoded")])


def test_captions_are_held_up_to_a_bound_and_latents_are_not(material):
    config, samples = material()
    data = data_of(config, samples, memory_bytes=200)
    for caption in ("a blue square", "", "a red ball rolls", "a green star & a moon", ""):
        # One row a word and one that ends the text, of four numbers each.
        assert data.load([place(samples, 0, caption)]).text[0].shape == (len(caption.split()) + 1, 4)
        assert 0 < data.held_bytes <= 200


def test_threads_that_read_the_same_captions_hold_and_count_each_once(material, monkeypatch):
    config, samples = material()
    data = data_of(config, samples, memory_bytes=100)
    read = data.cache.read

    def overtaken(*arguments):
        monkeypatch.setattr(data.cache, "read", read)
        data.load([place(samples, 0, "")])
        return read(*arguments)

    monkeypatch.setattr(data.cache, "read", overtaken)
    data.load([place(samples, 0, "")])
    assert data.held_bytes == 16  # one row of four numbers
    # A caption that one thread has just found is not dropped by the other before it is taken.
    rows = {caption: read("text", data._text_key(caption)) for caption in ("", "a blue square", "a red ball rolls")}
    monkeypatch.setattr(data.cache, "read", lambda _, key: rows[{data._text_key(c): c for c in rows}[key]])
    captions = [*rows] * 3000
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(data._text, captions))
    finally:
        sys.setswitchinterval(usual)
    assert all(torch.equal(one, rows[caption]["text"]) for one, caption in zip(found, captions, strict=True))
    assert data.held_bytes == sum(held.nbytes for held in data._held.values()) <= 100


def test_the_keys_in_use_are_those_of_the_cache(material):
    config, samples = material(windows_per_clip=2)
    data = data_of(config, samples)
    assert {kind: keys for kind, keys in data.used_keys().items() if keys} == {
        kind: data.cache.keys(kind) for kind in ("latent", "text")
    }


def places_of(config, samples, steps, seed=0, expert="high", batch_size=2):
    batches = ExpertBatches(data_of(config, samples), expert, seed, dict.fromkeys(samples.column("bucket"), batch_size))
    return [batches.places(step) for step in range(steps)]


def test_captions_are_chosen_by_address_and_dropped_at_the_given_rate(material):
    config, samples = material(caption_dropout=0.2)

    def chosen(dropout):
        changed = config.model_copy(update={"caption_dropout": dropout})
        return [p.caption for batch in places_of(changed, samples, 1500) for p in batch if p.sample.clip == "b.mp4"]

    with_dropout, without = chosen(0.2), chosen(0.0)
    counts = Counter(with_dropout)
    captions = [orders[0] for orders in samples[1].captions]
    assert chosen(0.2) == with_dropout and set(counts) == {"", *captions} and counts.total() == 1000
    # Four standard deviations of a binomial of 1000.
    assert abs(counts[""] - 200) < 4 * math.sqrt(1000 * 0.2 * 0.8)
    assert abs(counts[captions[0]] - 400) < 4 * math.sqrt(1000 * 0.4 * 0.6)
    assert "" not in without and set(chosen(1.0)) == {""}
    assert all(one in ("", kept) for kept, one in zip(without, with_dropout, strict=True))
    half = places_of(config.model_copy(update={"caption_dropout": 0.5}), samples, 200)
    # Each place of a batch draws by itself: the two of half the batches differ, within four standard deviations.
    assert abs(sum((a.caption == "") != (b.caption == "") for a, b in half) - 100) < 4 * math.sqrt(200 * 0.25)


def test_a_random_window_is_a_function_of_seed_epoch_and_sample(material, tmp_path):
    add_clip(tmp_path / "long", "a.mp4", num_frames=90)
    config, samples = material(tmp_path / "long", windows="random", windows_per_clip=4)

    def windows(**changes):
        return [p.window for batch in places_of(config, samples, 200, batch_size=1, **changes) for p in batch]

    drawn = windows()
    assert drawn == windows() != windows(seed=1) and drawn != windows(expert="low")
    # A fifth of 200 draws would be 50 each: four standard deviations.
    assert all(abs(n - 50) < 4 * math.sqrt(200 * 0.25 * 0.75) for n in Counter(drawn).values()) and len(set(drawn)) == 4


def test_stills_go_to_the_low_expert_unless_the_source_says_otherwise(material, tmp_path):
    folder = tmp_path / "mixed"
    add_clip(folder, "a.mp4")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "b.png")
    (folder / "b.txt").write_text("a grey wall")
    buckets = ["64x64x17", "64x64x1"]
    config, samples = material(folder, buckets=buckets)

    def clips(expert, config=config):
        return {p.sample.clip for batch in places_of(config, samples, 20, expert=expert) for p in batch}

    assert clips("high") == {"a.mp4"} and clips("low") == {"a.mp4", "b.png"}
    both = config_for({"path": folder, "experts": ["high"]}, cache=config.cache, buckets=buckets)
    assert clips("high", both) == {"a.mp4", "b.png"}
    with pytest.raises(InputError, match="none of the 2 samples is for the low expert"):
        clips("low", both)


def test_a_video_that_fills_a_bucket_of_one_frame_alone_is_a_still(material, tmp_path):
    add_clip(tmp_path / "clips", "long.mp4")
    add_clip(tmp_path / "clips", "short.mp4", num_frames=10, seed=1)
    config, samples = material(tmp_path / "clips", buckets=["64x64x17", "64x64x1"])
    assert [(s.clip, str(s.bucket)) for s in samples] == [("long.mp4", "64x64x17"), ("short.mp4", "64x64x1")]
    high = {p.sample.clip for batch in places_of(config, samples, 20, expert="high") for p in batch}
    low = {p.sample.clip for batch in places_of(config, samples, 20, expert="low") for p in batch}
    assert (high, low) == ({"long.mp4"}, {"long.mp4", "short.mp4"})


def test_masks_and_weights_come_with_their_clips(material, tmp_path):
    add_clip(tmp_path / "look", "a.mp4")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "look" / "a.mask.png")
    add_clip(tmp_path / "rest", "b.mp4", seed=9)
    rest = {"path": tmp_path / "rest", "regularisation": True, "loss_weight": 0.25}
    config, samples = material(tmp_path / "look", rest)
    batch = data_of(config, samples).load([place(samples, 1, ""), place(samples, 0, "")])
    assert batch.weights.tolist() == [0.25, 1.0]
    assert torch.equal(batch.masks, torch.stack([torch.ones(5, 8, 8), torch.zeros(5, 8, 8)]))
