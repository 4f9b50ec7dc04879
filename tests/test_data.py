"""From folders to batches: nothing dropped in silence, nothing encoded twice or stale, order by address alone."""

import ast
import errno
import functools
import html
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import ftfy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import TrainingData, choose_caption
from data.buckets import Bucket, choose_bucket, fit_frames
from data.cache import Cache, latent_key, require_space, text_key
from data.clips import find_clips
from data.config import DataConfig, SourceConfig
from data.samples import list_samples, precompute, window_frames
from data.schedule import batch_at, cycle_length
from data.windows import window_starts
from wan_finetune.addressing import numpy_rng
from wan_finetune.captions import clean_caption, with_trigger
from wan_finetune.errors import InputError
from wan_finetune.settings import load_settings
from wan_finetune.video import VideoInfo, write_video

# --- material ---------------------------------------------------------------------------------------------------------


def add_clip(folder, name, captions="a red ball rolls", *, size=(64, 64), num_frames=40, fps=25, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[:] = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 5 + seed
    target = path.with_suffix(".mp4")
    write_video(target, frames, fps)
    target.rename(path)
    if captions is not None:
        path.with_suffix(".txt").write_text(captions, encoding="utf-8")
    return path


def config_for(*folders, **changes):
    return DataConfig(sources=[SourceConfig(path=folder) for folder in folders], **{"buckets": ["64x64x17"], **changes})


def info_of(width=64, height=64, num_frames=40, fps=25.0):
    return VideoInfo(
        path=Path("clip.mp4"),
        width=width,
        height=height,
        pts_seconds=np.arange(num_frames) / fps,
        last_frame_seconds=1 / fps,
        reader="decord",
    )


class Encoders:
    """Stand-ins that count what they are asked."""

    def __init__(self):
        self.clips, self.texts = [], []

    def video(self, frames):
        self.clips.append(frames.tobytes())
        num_frames, height, width, _ = frames.shape
        mean = torch.from_numpy(frames.mean(axis=(1, 2, 3), dtype=np.float64)).float()[::4]
        return mean[None, :, None, None].expand(2, (num_frames + 3) // 4, height // 8, width // 8)

    def text(self, caption):
        self.texts.append(caption)
        return torch.full((len(caption.split()) + 1, 4), float(len(caption)))


def run_precompute(clips, cache, encoders, progress=lambda stage, done, total: None, **changes):
    arguments = {"fps": 16.0, "video_fingerprint": "vae-1", "text_fingerprint": "umt5-1", **changes}
    return precompute(
        clips, cache, encode_video=encoders.video, encode_text=encoders.text, progress=progress, **arguments
    )


@pytest.fixture
def folder(tmp_path):
    """Three good clips, one in a subfolder, with one or two captions."""
    folder = tmp_path / "clips"
    add_clip(folder, "b.mp4", "a red ball rolls\n\n一个红色的球\n", seed=1)
    add_clip(folder, "a.MOV", "\ufeffa blue square", seed=2)
    add_clip(folder, "sub/c.mkv", "a green star &amp; a moon", seed=3)
    return folder


# --- captions and configuration ---------------------------------------------------------------------------------------


@functools.cache
def pipeline_prompt_clean():
    """diffusers' own function, taken from its source: importing the package would cost ten seconds."""
    package = Path(importlib.util.find_spec("diffusers").origin).parent
    tree = ast.parse((package / "pipelines" / "wan" / "pipeline_wan.py").read_text(encoding="utf-8"))
    names = ("basic_clean", "whitespace_clean", "prompt_clean")
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    space = {"ftfy": ftfy, "html": html, "re": re, "is_ftfy_available": lambda: True}
    exec(compile(tree, "pipeline_wan.py", "exec"), space)
    return space["prompt_clean"]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\tcat \n on  a mat ", "a cat on a mat"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("schÃ¶n", "schön"),
        ("一只猫，坐着。", "一只猫,坐着。"),
        ("&lt;b&gt;", "<b>"),
    ],
)
def test_captions_are_cleaned_as_the_pipeline_cleans_prompts(raw, cleaned):
    assert clean_caption(raw) == cleaned == pipeline_prompt_clean()(raw)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_cleaning_equals_the_pipeline_on_any_text(text):
    assert clean_caption(text) == pipeline_prompt_clean()(text)


def test_trigger_is_put_before_captions_that_lack_it():
    assert with_trigger("a cat", "ACME") == "ACME, a cat"
    assert with_trigger("a cat in ACME style", "ACME") == "a cat in ACME style"
    assert with_trigger("一只猫", "") == "一只猫"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('buckets = ["830x480x81"]', "multiples of 16"),
        ('buckets = ["832x480x80"]', "4n\\+1, such as 77 or 81"),
        ('buckets = ["832x480"]', "not WIDTHxHEIGHTxFRAMES"),
        ('buckets = ["64x64x17", "64x64x17"]', "twice"),
        ("buckets = []", "at least 1"),
        ("fps = 0", "above 0"),
        ("caption_dropout = 1.5", "in 0\\.\\.1"),
        ("windows_per_clip = 0", "1 or more"),
        ('on_error = "ignore"', "'fail' or 'skip'"),
        ("sources = []", "at least 1"),
        ('sources = [{path = "x", make = "no colon"}]', "module:function"),
        ("fsp = 16", "did you mean fps"),
    ],
)
def test_wrong_values_are_named_with_line_and_key(tmp_path, line, message):
    table = {"sources": 'sources = [{path = "x"}]', "buckets": 'buckets = ["64x64x17"]'}
    table[line.split()[0]] = line
    path = tmp_path / "config.toml"
    path.write_text("\n".join(table.values()))
    with pytest.raises(InputError, match=rf"config\.toml:\d+.*{line.split()[0]}.*{message}"):
        load_settings(DataConfig, path, [])


# --- clips and the report ---------------------------------------------------------------------------------------------


def test_each_clip_has_a_line_in_the_report(folder, tmp_path):
    clips, rows = find_clips(config_for(folder, trigger="ACME", windows_per_clip=2))
    assert [clip.name for clip in clips] == [row.file for row in rows] == ["a.MOV", "b.mp4", "sub/c.mkv"]
    assert [clip.captions for clip in clips] == [
        ("ACME, a blue square",),
        ("ACME, a red ball rolls", "ACME, 一个红色的球"),
        ("ACME, a green star & a moon",),
    ]
    for row in rows:
        line = row.to_json()
        assert str(tmp_path) not in line and "\n" not in line
        told = json.loads(line)
        assert set(told) == {"file", "used", "bucket", "windows", "reader", "captions", "reason"}
        assert told["used"] and told["bucket"] == "64x64x17" and len(told["windows"]) == 2 and told["reason"] is None
    assert "一个红色的球" in rows[1].to_json()


def add_faults(folder):
    """One file of each sort that cannot be used: name -> what must be said of it."""
    add_clip(folder, "no_caption.mp4", None)
    add_clip(folder, "empty_caption.mp4", " \n\n")
    add_clip(folder, "latin1.mp4").with_suffix(".txt").write_bytes(b"caf\xe9")
    add_clip(folder, "short.mp4", num_frames=10)
    add_clip(folder, "small.mp4", size=(48, 64))
    whole = add_clip(folder, "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name, content in {"zero.webm": b"", "text.avi": b"words " * 99}.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "orphan.txt").write_text("a caption")
    return {
        "no_caption.mp4": "has no caption; write one into no_caption.txt",
        "empty_caption.mp4": "empty_caption.txt is empty; describe",
        "latin1.mp4": "not UTF-8; save",
        "short.mp4": "too short: lasts 0.40 s",
        "small.mp4": "too small: 48x64 is below every bucket",
        "cut.mp4": "cut off",
        "zero.webm": "is empty (0 bytes); copy",
        "text.avi": "not a readable video",
        "orphan.txt": "without a clip; add",
    }


def test_faults_are_all_listed_at_once(folder):
    faults = add_faults(folder)
    with pytest.raises(InputError) as caught:
        find_clips(config_for(folder))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("9 of 12 files") and 'data.on_error = "skip"' in lines[-1]
    for name, message in faults.items():
        assert [line for line in lines if f"{folder / name}: " in line and message in line], name


def test_skipped_faults_are_reported_with_their_reason(folder, tmp_path):
    faults = add_faults(folder)
    clips, rows = find_clips(config_for(folder, on_error="skip"))
    assert [clip.name for clip in clips] == ["a.MOV", "b.mp4", "sub/c.mkv"]
    reasons = {row.file: row.reason for row in rows if not row.used}
    assert set(reasons) == set(faults) and len(rows) == 12
    for name, message in faults.items():
        assert message in reasons[name]
        assert str(tmp_path) not in reasons[name]


def test_nothing_left_is_an_error_even_when_faults_are_skipped(tmp_path):
    add_clip(tmp_path / "clips", "a.mp4", None)
    with pytest.raises(InputError, match=r"no clip is left of 1 files(?s:.*)a\.mp4: has no caption"):
        find_clips(config_for(tmp_path / "clips", on_error="skip"))


def test_folders_without_clips_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in {
        "absent": "no such folder; point",
        "empty": "the folder is empty; put clips",
        "notes": "holds 1 files and no video; put clips",
        "file": "is a file, not a folder; point",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            find_clips(config_for(tmp_path / name, on_error="skip"))
        assert str(tmp_path / name) in str(caught.value)


def make_clips(folder):
    add_clip(folder, "made.mp4")


def make_nothing(folder):
    pass


def make_half(folder):
    add_clip(folder, "made.mp4")
    raise KeyboardInterrupt


def test_procedural_folder_is_made_once_and_whole(tmp_path):
    folder = tmp_path / "deep" / "made"

    def source(function):
        return DataConfig(sources=[SourceConfig(path=folder, make=f"{__name__}:{function}")], buckets=["64x64x17"])

    with pytest.raises(KeyboardInterrupt):
        find_clips(source("make_half"))
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(InputError, match="without making the folder"):
        find_clips(source("make_nothing"))
    with pytest.raises(InputError, match="cannot be imported"):
        find_clips(source("make_what"))
    assert [clip.name for clip in find_clips(source("make_clips"))[0]] == ["made.mp4"]
    assert [clip.name for clip in find_clips(source("make_half"))[0]] == ["made.mp4"], "made again"
    assert list(folder.parent.iterdir()) == [folder]


# --- buckets and windows ----------------------------------------------------------------------------------------------


def test_bucket_is_the_nearest_in_shape_then_the_largest_that_fits():
    buckets = [Bucket.parse(t) for t in ("832x480x81", "832x480x17", "480x832x81", "640x640x81", "1280x720x81")]

    def choose(**clip):
        return str(choose_bucket(info_of(**clip), buckets, 16.0, False))

    assert choose(width=1920, height=1080, num_frames=200) == "1280x720x81"
    assert choose(width=1000, height=576, num_frames=200) == "832x480x81"
    assert choose(width=1000, height=576, num_frames=40) == "832x480x17"
    assert choose(width=1080, height=1920, num_frames=200) == "480x832x81"
    assert choose(width=900, height=1000, num_frames=200) == "640x640x81"
    assert "too short" in choose(width=1000, height=576, num_frames=25)
    assert "too small" in choose(width=400, height=400, num_frames=200)
    small = info_of(width=400, height=400, num_frames=200)
    assert str(choose_bucket(small, buckets, 16.0, True)) == "640x640x81"


@given(
    st.integers(16, 2000), st.integers(16, 2000), st.integers(1, 300), st.sampled_from([12.0, 25.0, 29.97]), st.data()
)
@settings(max_examples=150, deadline=None)
def test_chosen_bucket_always_fits_and_windows_lie_inside(width, height, num_frames, rate, data):
    sizes = st.builds(
        Bucket, *[st.integers(1, 60).map(lambda n: 16 * n)] * 2, st.integers(0, 20).map(lambda n: 4 * n + 1)
    )
    buckets = data.draw(st.lists(sizes, min_size=1, max_size=5))
    windows = data.draw(st.integers(1, 6))
    info = info_of(width, height, num_frames, rate)
    chosen = choose_bucket(info, buckets, 16.0, False)

    def fits(bucket):
        long_enough = (bucket.num_frames - 1) / 16 < info.duration_seconds - 1e-4
        return bucket.width <= width and bucket.height <= height and long_enough

    if isinstance(chosen, str):
        assert not any(fits(bucket) for bucket in buckets)
        return
    assert chosen in buckets and fits(chosen)
    distance = abs(math.log(chosen.width / chosen.height * height / width))
    for bucket in filter(fits, buckets):
        assert distance <= abs(math.log(bucket.width / bucket.height * height / width)) + 1e-6
    starts = window_starts(info, chosen, 16.0, windows)
    assert 1 <= len(starts) <= windows and list(starts) == sorted(set(starts)) and starts[0] == 0
    assert starts[-1] + (chosen.num_frames - 1) / 16 < info.duration_seconds


def test_windows_are_evenly_spaced_and_reach_the_end():
    starts = window_starts(info_of(num_frames=100), Bucket(64, 64, 17), 16.0, 4)
    # 100 frames last 4 s; the last of 17 frames at 16 fps shows 1 s after the start, so the last start is 2.96 s.
    np.testing.assert_allclose(starts, np.linspace(0, 2.96, 4), atol=1 / 25)
    assert starts[-1] == pytest.approx(2.96)
    assert window_starts(info_of(num_frames=20), Bucket(64, 64, 17), 16.0, 1) == ()


def test_fitting_is_the_identity_at_equal_size_and_keeps_the_centre():
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), dtype=np.uint8)
    assert np.array_equal(fit_frames(frames, Bucket(96, 64, 5)), frames)
    # Cropping alone: no pixel changes.
    assert np.array_equal(fit_frames(frames, Bucket(64, 64, 5)), frames[:, :, 16:80])
    upright = frames.transpose(0, 2, 1, 3).copy()
    assert np.array_equal(fit_frames(upright, Bucket(64, 64, 5)), upright[:, 16:80])
    # A horizontal ramp from 0 to 255 over 160 pixels: the square crop of its middle keeps its slope and its mean.
    ramp = np.tile(np.linspace(0, 255, 160).round().astype(np.uint8)[None, None, :, None], (1, 80, 1, 3))
    fitted = fit_frames(ramp, Bucket(32, 32, 1))[0, 16, :, 0].astype(float)
    assert np.diff(fitted)[4:-4].mean() == pytest.approx(255 / 159 * 80 / 32, rel=0.05)
    assert fitted.mean() == pytest.approx(127.5, abs=1)
    with pytest.raises(ValueError, match="needs frames"):
        fit_frames(frames, Bucket(64, 64, 9))


def test_shrinking_is_antialiased():
    noise = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), dtype=np.uint8)
    # Mean of 8x8 pixels would leave an eighth of the deviation, picked pixels all of it.
    assert fit_frames(noise, Bucket(32, 32, 1)).std() < noise.std() / 4


# --- cache ------------------------------------------------------------------------------------------------------------

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


# --- precompute -------------------------------------------------------------------------------------------------------


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


# --- schedule ---------------------------------------------------------------------------------------------------------

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


# --- batches ----------------------------------------------------------------------------------------------------------


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
