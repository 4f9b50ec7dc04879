"""The cache: nothing is encoded twice or stale, and no write is seen half done."""

import errno
import math
import multiprocessing
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.buckets import Bucket
from data.cache import Cache, latent_key, require_space, text_key
from data.clips import find_clips
from data.samples import list_samples, window_frames
from tests.data_material import Encoders, add_clip, config_for, good_folder, run_precompute
from wan_finetune.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return good_folder(tmp_path)


KEY = "ab" * 32


def test_keys_follow_content_and_nothing_else():
    base = ("clip", 0.5, Bucket(64, 64, 17), 16.0, "vae")
    changes = [("other", *base[1:]), ("clip", 0.54, *base[2:]), ("clip", 0.5, Bucket(64, 64, 13), *base[3:])]
    changes += [(*base[:3], 24.0, "vae"), (*base[:4], "vae-2")]
    keys = {latent_key(*parts) for parts in (base, *changes)}
    assert len(keys) == 6 and latent_key(*base) in keys
    assert len({text_key("a", "t"), text_key("b", "t"), text_key("a", "u"), text_key("", "t")}) == 4


def test_renamed_clip_keeps_its_keys_and_changed_one_renews_them(folder):
    def keys():
        clips, _ = find_clips(config_for(folder))
        return sorted(s.latent_key for s in list_samples(clips, fps=16.0, video_fingerprint="v"))

    before = keys()
    (folder / "b.mp4").rename(folder / "z.mp4")
    (folder / "b.txt").rename(folder / "z.txt")
    assert keys() == before
    add_clip(folder, "z.mp4", seed=9)
    assert len(set(keys()) - set(before)) == 1


def test_entry_comes_back_as_written(tmp_path):
    cache = Cache(tmp_path)
    tensors = {"latent": torch.randn(3, 4).T, "half": torch.randn(2).bfloat16()}
    assert not cache.has("latent", KEY) and cache.read("latent", KEY) is None
    mask = os.umask(0o027)
    try:
        cache.write("latent", KEY, tensors, {"bucket": "64x64x17"})
    finally:
        os.umask(mask)
    back = cache.read("latent", KEY)
    assert cache.has("latent", KEY) and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in back)
    assert cache.path("latent", KEY).stat().st_mode & 0o777 == 0o640
    assert [p.name for p in cache.path("latent", KEY).parent.iterdir()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "noise"])
def test_damaged_entry_is_removed_and_counts_as_missing(tmp_path, capsys, damage):
    cache = Cache(tmp_path)
    cache.write("text", KEY, {"text": torch.randn(64)}, {})
    path = cache.path("text", KEY)
    content = path.read_bytes()
    other = "cd" * 32
    cache.write("text", other, {"text": torch.randn(64)}, {})
    path.write_bytes(
        {
            "cut": content[:-9],
            "empty": b"",
            "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "foreign": cache.path("text", other).read_bytes(),
            "noise": b"\xff" * 200,
        }[damage]
    )
    assert cache.read("text", KEY) is None and not path.exists()
    assert "damaged cache entry removed" in capsys.readouterr().err
    assert cache.read("text", other) is not None


def test_unfinished_write_leaves_no_entry(tmp_path, monkeypatch):
    cache = Cache(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.write("text", KEY, {"text": torch.ones(3)}, {})
    assert not cache.has("text", KEY) and not list(tmp_path.rglob("*.tmp"))
    # What a killed process leaves behind is neither read nor in the way.
    (cache.path("text", KEY).parent / f".{KEY[:12]}.1.dead.tmp").write_bytes(b"half")
    assert cache.read("text", KEY) is None
    cache.write("text", KEY, {"text": torch.ones(3)}, {})
    assert torch.equal(cache.read("text", KEY)["text"], torch.ones(3))


def test_full_disk_and_bad_numbers_are_refused(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    with pytest.raises(ValueError, match="latent holds NaN or infinity"):
        cache.write("latent", KEY, {"latent": torch.tensor([1.0, math.nan])}, {})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"the disk is full.*data\.cache"):
            cache.write("latent", KEY, {"latent": torch.ones(1)}, {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    require_space(tmp_path / "not" / "yet", 2**30, "the cache")
    with pytest.raises(InputError, match=r"not/yet: the cache needs 1\.50 GiB, 1\.00 GiB are free"):
        require_space(tmp_path / "not" / "yet", 3 * 2**29, "the cache")


def hammer(folder, seed, rounds):
    cache = Cache(folder)
    for number in range(rounds):
        value = torch.full((2000,), float(number))
        cache.write("latent", f"{number % 5:064x}", {"latent": value}, {"writer": str(seed)})
        entry = cache.read("latent", f"{number % 5:064x}")
        if entry is None or len(entry["latent"].unique()) != 1:
            raise SystemExit(1)


def test_concurrent_writers_do_not_disturb_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=hammer, args=(tmp_path, seed, 60)) for seed in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [f"{n:064x}.safetensors" for n in range(5)]


def test_each_item_is_encoded_once_and_never_again(folder, tmp_path):
    clips, _ = find_clips(config_for(folder, windows_per_clip=2))
    cache, encoders, told = Cache(tmp_path / "cache"), Encoders(), []
    samples = run_precompute(clips, cache, encoders, progress=lambda *report: told.append(report))
    assert len(encoders.clips) == len(samples) == 6 == len({s.latent_key for s in samples})
    captions = {caption for clip in clips for caption in clip.captions}
    assert sorted(encoders.texts) == sorted(captions | {""}) and len(captions) == 4
    assert told == [("text", n, 5) for n in range(1, 6)] + [("latent", n, 6) for n in range(1, 7)]
    assert [(s.clip, s.start_seconds) for s in samples] == [(c.name, t) for c in clips for t in c.start_seconds]

    again = Encoders()
    assert run_precompute(clips, cache, again) == samples
    assert again.clips == again.texts == []


def test_only_what_is_missing_changed_or_damaged_is_encoded(folder, tmp_path, capsys):
    clips, _ = find_clips(config_for(folder))
    cache = Cache(tmp_path / "cache")
    samples = run_precompute(clips, cache, Encoders())
    cache.path("latent", samples[0].latent_key).unlink()
    cache.path("latent", samples[1].latent_key).write_bytes(b"damaged")
    encoders = Encoders()
    run_precompute(clips, cache, encoders)
    assert (len(encoders.clips), encoders.texts) == (2, [])
    assert "damaged" in capsys.readouterr().err
    encoders = Encoders()
    run_precompute(clips, cache, encoders, video_fingerprint="vae-2")
    assert (len(encoders.clips), encoders.texts) == (3, [])
    encoders = Encoders()
    run_precompute(clips, cache, encoders, text_fingerprint="umt5-2")
    assert (len(encoders.clips), len(encoders.texts)) == (0, 5)


def test_interrupted_precompute_goes_on_where_it_stopped(folder, tmp_path):
    clips, _ = find_clips(config_for(folder))
    cache, first, second = Cache(tmp_path / "cache"), Encoders(), Encoders()

    def stop_at_second(frames):
        if len(first.clips) == 1:
            raise KeyboardInterrupt
        return Encoders.video(first, frames)

    first.video = stop_at_second
    with pytest.raises(KeyboardInterrupt):
        run_precompute(clips, cache, first)
    run_precompute(clips, cache, second)
    assert len(first.clips) == 1 and len(second.clips) == 2 and second.texts == []


def test_processes_begin_apart_and_pass_over_what_others_wrote(folder, tmp_path):
    clips, _ = find_clips(config_for(folder, windows_per_clip=2))
    cache, first, second = Cache(tmp_path / "cache"), Encoders(), Encoders()
    interleaved = []

    def while_other_runs(frames):
        if not first.clips:
            interleaved.append(run_precompute(clips, cache, second, rank=1, world_size=2))
        return Encoders.video(first, frames)

    first.video = while_other_runs
    samples = run_precompute(clips, cache, first, rank=0, world_size=2)
    assert interleaved == [samples]
    assert len(first.clips) == 1 and len(second.clips) == 6 and second.clips[-1] != second.clips[0]
    assert second.clips.index(first.clips[0]) == 3, "the second process began at its own half"


def test_space_is_checked_before_anything_is_encoded(folder, tmp_path, monkeypatch):
    clips, _ = find_clips(config_for(folder))
    encoders = Encoders()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="cache of 3 latents needs"):
        run_precompute(clips, Cache(tmp_path / "cache"), encoders)
    assert encoders.clips == encoders.texts == []


def test_encoder_sees_the_frames_on_display(folder):
    clips, _ = find_clips(config_for(folder))
    clip = clips[1]
    grey = window_frames(clip, 0.0, 16.0).mean(axis=(1, 2, 3))
    # Frame n of the 25 fps clip is of grey level 5n + seed, and frame k of the window shows source frame 25k/16.
    np.testing.assert_allclose(grey, [5 * (25 * k // 16) + 1 for k in range(17)], atol=3)
