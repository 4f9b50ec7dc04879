"""What is known of a file, kept as a plain record and brought back."""

import json
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest

from tests.video_material import encode, real_footage
from wan_finetune.video import VideoInfo, probe


def test_a_record_brings_back_all_that_was_known(tmp_path):
    stamps = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(11, 90, 39))])
    turned = encode(tmp_path / "turned.mp4", rotation=90, stamps=stamps)
    counted = encode(tmp_path / "counted.avi", codec="mpeg4", options={"bf": "2"}, rate=Fraction(30000, 1001))
    for path in (turned, counted, real_footage(), real_footage("carphone_pristine.mp4")):
        info = probe(path)
        kept = json.loads(json.dumps(info.to_record()))
        back = VideoInfo.from_record(path, kept)
        for field in fields(VideoInfo):
            np.testing.assert_array_equal(getattr(back, field.name), getattr(info, field.name), field.name)
            assert type(getattr(back, field.name)) is type(getattr(info, field.name)), field.name
        assert str(path.parent) not in json.dumps(kept)
    assert len(json.dumps(probe(real_footage()).to_record())) < 400  # 132 frames at one rate


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"times": "eJwDAAAAAAE="},
        {"times": "no base64"},
        {"width": 0},
        {"reader": "ffmpeg"},
        {"key_frames": 7},
        {"stored_size": [1]},
    ],
)
def test_a_damaged_or_older_record_is_refused(tmp_path, change):
    record = probe(encode(tmp_path / "clip.mp4", num_frames=4)).to_record()
    VideoInfo.from_record(tmp_path / "clip.mp4", record)
    with pytest.raises(ValueError, match=r"not a record of a video.*look at the file again"):
        VideoInfo.from_record(tmp_path / "clip.mp4", {**record, **change})
