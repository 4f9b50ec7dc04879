"""Frames into files: equal bytes for equal frames, and nothing half written."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from wan_finetune.errors import InputError
from wan_finetune.video import read_video, write_video


def test_frames_survive_the_round_trip(tmp_path):
    ramp = np.linspace(16, 240, 96).astype(np.uint8)
    frames = np.stack([np.stack([np.tile(np.roll(ramp, 3 * k), (64, 1))] * 3, axis=-1) for k in range(9)])
    frames[:, 20:44, 30:66] = (200, 40, 60)
    write_video(tmp_path / "clip.mp4", frames, 16, crf=4)
    back, fps = read_video(tmp_path / "clip.mp4")
    assert back.shape == frames.shape and fps == 16
    # Inside the flat patch chroma subsampling does nothing: what is left is the colour matrix.
    assert np.abs(back[:, 24:40, 34:62].astype(int) - (200, 40, 60)).max() <= 4
    assert np.abs(back.astype(int) - frames).mean() < 2


def test_written_file_is_deterministic_tagged_and_streams(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 30000 / 1001)
    script = (
        "import sys, numpy as np; from pathlib import Path; from wan_finetune.video import write_video;"
        "f = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), dtype=np.uint8);"
        "write_video(Path(sys.argv[1]), f, 30000 / 1001)"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "b.mp4")], check=True, env=environment)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content == (tmp_path / "b.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001) and stream.codec_context.pix_fmt == "yuv420p"
        assert int(stream.codec_context.colorspace) == 1


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    frames = np.zeros((3, 64, 64, 3), np.uint8)

    def fails(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        write_video(path, frames, 16)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((3, 63, 64, 3), np.uint8), 16, "even width and height, got 64x63"),
        (np.zeros((3, 64, 64, 3), np.float32), 16, "must be uint8"),
        (np.zeros((0, 64, 64, 3), np.uint8), 16, "F >= 1"),
        (np.zeros((3, 64, 64, 3), np.uint8), 0, "fps must be positive"),
    ],
)
def test_unwritable_frames_are_refused(tmp_path, frames, fps, message):
    with pytest.raises(InputError, match=message):
        write_video(tmp_path / "clip.mp4", frames, fps)
