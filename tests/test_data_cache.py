"""The cache: nothing is stale, no write is seen half done, and nothing is deleted by surprise."""

import math
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data.buckets import Bucket
from data.cache import Cache, latent_key, mask_key, text_key
from data.framing import Box

ROOT = Path(__file__).resolve().parent.parent
KEY, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def written(cache, kind="text", key=KEY, size=64, record=None):
    cache.write(kind, key, {kind: torch.randn(size)}, record or {})
    return cache.path(kind, key)


def test_keys_follow_content_and_nothing_else():
    base = ("clip", 0.5, Bucket(64, 64, 17), 16.0, Box(0, 0, 64, 64))
    changes = [("other", *base[1:]), ("clip", 0.54, *base[2:]), ("clip", 0.5, Bucket(64, 64, 13), *base[3:])]
    changes += [(*base[:3], 24.0, base[4]), (*base[:4], Box(0, 0, 64, 63.5))]
    latents = {latent_key(*parts, "vae") for parts in (base, *changes)}
    latents |= {latent_key(*base, "vae-2"), latent_key(*base, "vae", with_std=True)}
    masks = {mask_key(*parts) for parts in (base, *changes)}
    texts = {text_key("a", "t"), text_key("b", "t"), text_key("a", "u"), text_key("", "t")}
    assert len(latents) == 8 and len(masks) == 6 and len(texts) == 4 and len(latents | masks | texts) == 18
    assert latent_key("clip", 0.5, Bucket(64, 64, 17), 16, Box(0.0, 0.0, 64.0, 64.0), "vae") in latents


@pytest.mark.parametrize("kind", ["latent", "text", "mask"])
def test_entry_comes_back_as_written(cache, kind):
    tensors = {
        kind: torch.randn(3, 4).T, "half": torch.randn(2).bfloat16(), "bytes": torch.tensor([[1]], dtype=torch.uint8),
        "one": torch.tensor(2.5).half(), "none": torch.empty(0, 4),
    }  # fmt: skip
    assert not cache.has(kind, KEY) and cache.read(kind, KEY) is None and cache.record(kind, KEY) is None
    mask = os.umask(0o027)
    try:
        cache.write(kind, KEY, tensors, {"bucket": "64x64x17"})
    finally:
        os.umask(mask)
    back = cache.read(kind, KEY)
    assert cache.has(kind, KEY) and cache.keys(kind) == {KEY} and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in back)
    assert cache.path(kind, KEY).stat().st_mode & 0o777 == 0o640
    assert [p.name for p in cache.path(kind, KEY).parent.iterdir()] == [f"{KEY}.safetensors"]


def test_entry_is_a_safetensors_file_for_everyone(cache):
    tensors = {"latent": torch.randn(16, 3, 8, 8), "std": torch.rand(16, 3, 8, 8)}
    cache.write("latent", KEY, tensors, {})
    theirs = safetensors.torch.load_file(cache.path("latent", KEY))
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors) and theirs.keys() == tensors.keys()


def test_tensors_that_share_memory_are_written_apart(cache):
    whole = torch.randn(2, 3, 4)
    cache.write("latent", KEY, {"latent": whole[0], "std": whole[1], "again": whole[1]}, {})
    back = cache.read("latent", KEY)
    assert torch.equal(back["latent"], whole[0]) and torch.equal(back["std"], back["again"])


def test_record_says_what_the_encoder_saw(cache):
    record = {"caption": 'zxq style, 一个红色的球 “滚” \u200d\n"ok"', "encoder": "umt5-1"}
    written(cache, record=record)
    assert cache.record("text", KEY) == record
    with pytest.raises(ValueError, match="the cache holds F32, F16, BF16, U8"):
        cache.write("text", KEY, {"text": torch.zeros(3, dtype=torch.float64)}, {})


def test_tensor_is_read_straight_into_a_batch(cache):
    latents = torch.randn(2, 16, 3, 8, 8)
    for key, latent in zip((KEY, OTHER), latents, strict=True):
        cache.write("latent", key, {"std": latent.abs(), "latent": latent}, {})
    batch = torch.full((2, 16, 3, 8, 8), math.nan)
    assert cache.read_into("latent", KEY, batch[0]) and cache.read_into("latent", OTHER, batch[1])
    assert torch.equal(batch, latents)
    assert cache.read_into("latent", "ef" * 32, batch[0]) is False and torch.equal(batch, latents)


def test_unfinished_write_leaves_no_entry(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.write("text", KEY, {"text": torch.ones(3)}, {})
    assert not cache.has("text", KEY) and not list(cache.folder.rglob("*.tmp"))
    # What a killed process leaves behind is neither read nor in the way.
    (cache.path("text", KEY).parent / f".{KEY[:12]}.1.dead.tmp").write_bytes(b"half")
    assert cache.read("text", KEY) is None and cache.keys("text") == set()
    cache.write("text", KEY, {"text": torch.ones(3)}, {})
    assert torch.equal(cache.read("text", KEY)["text"], torch.ones(3)) and cache.keys("text") == {KEY}


def test_start_reads_no_entry(cache, monkeypatch):
    keys = {f"{number * 2**248:064x}" for number in range(200)}
    for key in keys:
        written(cache, key=key, size=1)
    written(cache, "latent")

    def never(*_, **__):
        raise AssertionError("an entry was opened")

    monkeypatch.setattr("data.cache.FileIO", never)
    monkeypatch.setattr(Path, "open", never)
    assert cache.keys("text") == keys and cache.keys("latent") == {KEY} and cache.keys("mask") == set()


def aged(path, days):
    stamp = time.time() - days * 86400
    os.utime(path, (stamp, stamp))
    return path


def test_pruning_removes_what_is_not_kept_and_says_how_much(cache):
    kept, young, old = written(cache), aged(written(cache, key=OTHER), 1), aged(written(cache, key="ef" * 32), 40)
    read_lately = written(cache, key="12" * 32)
    stamp = time.time()
    os.utime(read_lately, (stamp - 86400, stamp - 40 * 86400))
    other_kind = aged(written(cache, "latent", key=OTHER), 40)
    remains = (
        aged(old.with_name(".ef.1.dead.tmp"), 0) if old.with_name(".ef.1.dead.tmp").write_bytes(b"12345") else None
    )
    aged(remains, 0.1)
    being_written = old.with_name(".ef.2.live.tmp")
    being_written.write_bytes(b"1")
    unknown = aged(written(cache, key="34" * 32).rename(old.with_name("notes.txt")), 400)

    assert cache.prune("text", {KEY}, older_than_days=30) == (2, 5 + other_kind.stat().st_size)
    assert not old.exists() and not remains.exists()
    assert all(path.exists() for path in (kept, young, read_lately, being_written, unknown, other_kind))
    assert cache.prune("text", {KEY})[0] == 2
    assert cache.keys("text") == {KEY} and being_written.exists() and unknown.exists()
    assert cache.prune("mask", set()) == (0, 0) == cache.prune("text", {KEY})
