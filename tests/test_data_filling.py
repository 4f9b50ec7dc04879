"""Filling the caches: each thing once, by any number of processes, and a bad clip costs that clip alone."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.cache import Cache, text_key
from data.inspection import Inspector
from data.viewing import window_frames
from tests.data_material import Encoders, add_clip, config_for, good_folder, prepare
from wan_finetune.errors import InputError
from wan_finetune.video import VideoFault


@pytest.fixture
def config(tmp_path):
    return config_for(good_folder(tmp_path), cache=tmp_path / "cache")


@pytest.fixture
def report(tmp_path):
    return tmp_path / "data_report.jsonl"


def test_each_item_is_encoded_once_and_never_again(config, report):
    config = config.model_copy(update={"windows_per_clip": 2})
    encoders, told = Encoders(), []
    samples = prepare(config, report, encoders, progress=lambda *event: told.append(event))
    assert len(encoders.clips) == len(samples) == 6 == len({s.latent_keys for s in samples})
    captions = {orders[0] for sample in samples for orders in sample.captions}
    assert sorted(encoders.texts) == sorted(captions | {""}) and len(captions) == 4
    assert told == [("text", n, 5) for n in range(1, 6)] + [("latent", n, 6) for n in range(1, 7)]

    again = Encoders()
    assert prepare(config, report, again).file == samples.file
    assert again.clips == again.texts == []


def test_what_the_text_encoder_saw_is_in_the_entry(config, report):
    config = config.model_copy(update={"trigger": "ACME", "caption": "{caption}, {trigger}"})
    prepare(config, report)
    cache = Cache(config.cache)
    seen = {cache.record("text", key)["caption"] for key in cache.keys("text")}
    assert seen == {
        "",
        "a blue square, ACME",
        "a red ball rolls, ACME",
        "一个红色的球, ACME",
        "a green star & a moon, ACME",
    }
    assert cache.has("text", text_key("a blue square, ACME", "umt5-1"))


def test_only_what_is_missing_or_changed_is_encoded(config, report):
    samples = prepare(config, report)
    Cache(config.cache).path("latent", samples[0].latent_keys[0]).unlink()
    encoders = Encoders()
    prepare(config, report, encoders)
    assert (len(encoders.clips), encoders.texts) == (1, [])
    encoders = Encoders()
    prepare(config, report, encoders, video_fingerprint="vae-2")
    assert (len(encoders.clips), encoders.texts) == (3, [])
    encoders = Encoders()
    prepare(config, report, encoders, text_fingerprint="umt5-2")
    assert (len(encoders.clips), len(encoders.texts)) == (0, 5)


def test_a_renamed_clip_is_not_encoded_again_and_a_changed_one_is(config, report, tmp_path):
    prepare(config, report)
    folder = tmp_path / "clips"
    for suffix in (".mp4", ".txt"):
        (folder / "b").with_suffix(suffix).rename((folder / "renamed").with_suffix(suffix))
    encoders = Encoders()
    prepare(config, report, encoders)
    assert encoders.clips == encoders.texts == []
    add_clip(folder, "a.MOV", "a blue square", seed=9)
    prepare(config, report, encoders)
    assert (len(encoders.clips), encoders.texts) == (1, [])


def test_an_interrupted_run_goes_on_where_it_stopped(config, report):
    first, second = Encoders(), Encoders()
    encode = first.video

    def stop_at_second(frames):
        if len(first.clips) == 1:
            raise KeyboardInterrupt
        return encode(frames)

    first.video = stop_at_second
    with pytest.raises(KeyboardInterrupt):
        prepare(config, report, first)
    prepare(config, report, second)
    assert len(first.clips) == 1 and len(second.clips) == 2 and second.texts == []


def test_processes_begin_apart(config, report):
    config = config.model_copy(update={"windows_per_clip": 2})
    first, second = Encoders(), Encoders()
    prepare(config, report, first, rank=0, world_size=2)
    shutil.rmtree(config.cache / "latent")
    prepare(config, report, second, rank=1, world_size=2)
    assert first.clips[3:] + first.clips[:3] == second.clips


def test_space_is_checked_before_anything_is_encoded(config, report, monkeypatch):
    encoders = Encoders()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="cache of 3 latents needs"):
        prepare(config, report, encoders)
    assert encoders.clips == encoders.texts == []


def test_the_encoder_sees_the_frames_on_display(config, report):
    sample = prepare(config, report)[1]
    with Inspector(config.cache, 60.0) as inspector:
        grey = window_frames(sample, 0.0, 16.0, inspector).mean(axis=(1, 2, 3))
    # Frame n of the 25 fps clip is of grey level 5n + seed, and frame k of the window shows source frame 25k/16.
    np.testing.assert_allclose(grey, [5 * (25 * k // 16) + 1 for k in range(17)], atol=3)


def test_damage_that_only_decoding_finds_costs_that_clip_alone(tmp_path, report):
    folder = tmp_path / "clips"
    for number in range(21):
        path = add_clip(folder, f"{number:02d}.mp4", seed=number)
        os.utime(path, (1.7e9, 1.7e9))  # what changed a moment ago is not remembered
    broken = folder / "07.mp4"

    def config(on_error):
        return config_for(folder, cache=tmp_path / "cache", on_error=on_error)

    original = Inspector.read

    def read(self, info, indices):
        if info.path == broken:
            raise VideoFault(broken, "frame 12 cannot be decoded; export it again")
        return original(self, info, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inspector, "read", read)
        samples = prepare(config("skip"), report)
        assert len(samples) == 20 and "07.mp4" not in {s.clip for s in samples}
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        assert [line["file"] for line in lines if not line["used"]] == ["07.mp4"] and len(lines) == 21
        told = next(line for line in lines if not line["used"])
        assert told["reason"] == "frame 12 cannot be decoded; export it again" and told["bucket"] is None
    with pytest.raises(InputError, match=r"07\.mp4: frame 12 cannot be decoded"):
        prepare(config("fail"), report)  # remembered, without decoding it again


def test_a_mask_becomes_a_weight_for_each_place_of_the_latent(tmp_path, report):
    folder = tmp_path / "clips"
    add_clip(folder, "a.mp4", size=(128, 64))
    white_left = np.zeros((64, 128), np.uint8)
    white_left[:, :56] = 255
    Image.fromarray(white_left).save(folder / "a.mask.png")
    config = config_for(folder, cache=tmp_path / "cache")
    sample = prepare(config, report)[0]
    mask = Cache(config.cache).read("mask", sample.mask_keys[0])["mask"]
    # The bucket shows columns 32-96 of the picture: white up to its 24th, which is three places of the latent.
    assert mask.shape == (5, 8, 8)
    assert torch.equal(mask, torch.tensor([1.0] * 3 + [0.0] * 5).expand(5, 8, 8))


def test_the_deviation_of_latents_is_kept_on_request_under_a_key_of_its_own(config, report):
    plain = prepare(config, report)
    encoders = Encoders()
    encode = encoders.video
    encoders.video = lambda frames: {**(made := encode(frames)), "std": torch.ones_like(made["latent"])}
    kept = prepare(config.model_copy(update={"latent_std": True}), report, encoders)
    assert len(encoders.clips) == 3 and not {s.latent_keys for s in plain} & {s.latent_keys for s in kept}
    assert Cache(config.cache).read("latent", kept[0].latent_keys[0]).keys() == {"latent", "std"}
