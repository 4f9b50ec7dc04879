"""Frames out of files: the right one at each time, whichever reader serves them."""

from dataclasses import replace
from fractions import Fraction

import av
import decord
import numpy as np
import pytest
from av.video.frame import PictureType

from tests.video_material import (
    HEIGHT,
    WIDTH,
    decoded_by_pyav,
    encode,
    encode_drift,
    long_single_gop,
    numbers_in,
    real_footage,
    trim,
)
from wan_finetune.errors import InputError
from wan_finetune.opening import open_container
from wan_finetune.video import frame_indices, probe, read_frames, write_video

RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60)]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", RATES)
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
        ("open.mpg", {"codec": "mpeg2video", "options": {"bf": "2", "g": "12", "qscale": "2"}}, "pyav"),
        ("open.ts", {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}}, "pyav"),
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


@pytest.mark.parametrize("shift", [0, 3])
def test_decord_reads_only_what_it_shows_as_pyav_does(tmp_path, monkeypatch, shift):
    path = encode(tmp_path / "clip.mp4")

    class Shifted(decord.VideoReader):
        def __getitem__(self, index):
            return decord.nd.array(np.roll(super().__getitem__(index).asnumpy(), shift, axis=0))

    monkeypatch.setattr(decord, "VideoReader", Shifted)
    assert probe(path).reader == ("pyav" if shift else "decord")


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
    # decord applies the container's rotation by itself, so it is the oracle of direction.
    np.testing.assert_array_equal(turned, decord.VideoReader(str(info.path)).get_batch(range(4)).asnumpy())


@pytest.mark.parametrize("flips", [{"hflip": True}, {"vflip": True}, {}], ids=["hflip", "vflip", "no flip"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_display_matrix_moves_each_pixel_where_it_says(tmp_path, degrees, flips):
    corners = np.full((HEIGHT, WIDTH), 128, np.uint8)
    corners[:32, :64], corners[:32, 64:], corners[32:, :64] = 30, 90, 200
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "gray"
        stream.set_display_rotation(degrees, **flips)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(corners, format="gray")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        stored = frame.to_ndarray(format="gray")
        side_data = frame.side_data.get("DISPLAYMATRIX")
    # A pixel goes from (x, y) to (a x + c y + tx, b x + d y + ty), the translation being what makes all positive.
    a, b, _, c, d = (1, 0, 0, 0, 1) if side_data is None else np.frombuffer(bytes(side_data), np.int32)[:5] // 65536
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = np.zeros((np.ptp(to_y) + 1, np.ptp(to_x) + 1), np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = stored
    info = probe(path)
    shown = read_frames(info, np.array([0]))[0]
    assert (info.height, info.width) == expected.shape
    # Gray is stored in full or limited range; where each corner went is what counts.
    for row, column in ((5, 5), (5, -5), (-5, 5), (-5, -5)):
        order = np.argmin(np.abs(shown[..., 0].astype(int)[row, column] - [30, 90, 200, 128]))
        assert order == np.argmin(np.abs(int(expected[row, column]) - np.array([30, 90, 200, 128])))


class CountedContainer:
    """A container of PyAV that counts the frames it decodes."""

    def __init__(self, path):
        self.container = open_container(path)
        self.streams, self.seek, self.decoded = self.container.streams, self.container.seek, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("open.mkv", {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}),
        ("closed.mp4", {"bf": "3", "g": "12"}),
    ],
)
@pytest.mark.parametrize(
    ("wanted", "most"),
    [([0, 100, 101, 102, 240], 60), ([249, 3, 77, 180], 64), (list(range(0, 250, 13)), 260), (list(range(250)), 250)],
)
def test_frames_far_apart_are_found_from_their_own_key_frames(tmp_path, monkeypatch, name, options, wanted, most):
    opened = []

    def open_counted(path):
        opened.append(CountedContainer(path))
        return opened[-1]

    monkeypatch.setattr("wan_finetune.readers.open_container", open_counted)
    info = replace(probe(encode(tmp_path / name, num_frames=250, options=options)), reader="pyav")
    assert numbers_in(read_frames(info, np.array(wanted))).tolist() == wanted
    if name == "closed.mp4":
        assert sum(container.decoded for container in opened) <= most
    else:
        # Pictures that lead a key frame may need a second reading, from the start.
        assert len(opened) <= 2


FOOTAGE = {"bigbuckbunny.mp4": "decord", "bikes.mp4": "decord", "carphone_pristine.mp4": "pyav"}


def frames_by_pyav(path, info):
    """Each frame as PyAV decodes it from the start, one at a time, at the size on display."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            size = {} if info.stored_size is None else {"width": info.width, "height": info.height}
            yield frame.reformat(format="rgb24", interpolation="BICUBIC" if size else "BILINEAR", **size).to_ndarray()


@pytest.mark.parametrize("name", FOOTAGE)
def test_every_frame_of_real_footage_is_pyavs(name):
    """B-frames included, in order and alone; the readers' pixels may differ by 1 of 255 on average, and do not."""
    path = real_footage(name)
    info = probe(path)
    with av.open(str(path)) as container:
        pictures = [(frame.time, PictureType(frame.pict_type).name) for frame in container.decode(video=0)]
    times, types = zip(*pictures, strict=True)
    assert info.reader == FOOTAGE[name] and info.num_frames == len(pictures) and {"I", "P"} <= set(types)
    assert ("B" in types) == (name != "bigbuckbunny.mp4")
    np.testing.assert_allclose(info.pts_seconds, np.array(times) - times[0], atol=1e-9)
    expected = frames_by_pyav(path, info)
    kept = {}
    for first in range(0, info.num_frames, 25):
        part = np.arange(first, min(first + 25, info.num_frames))
        for index, frame in zip(part.tolist(), read_frames(info, part), strict=True):
            wanted = next(expected)
            np.testing.assert_array_equal(frame, wanted, f"frame {index}, a {types[index]}")
            if index % 41 == 3:
                kept[index] = wanted
    for index, wanted in kept.items():
        np.testing.assert_array_equal(read_frames(info, np.array([index]))[0], wanted)


def test_a_window_of_real_footage_holds_what_pyav_shows_at_those_times():
    path = real_footage("bikes.mp4")
    times, frames = decoded_by_pyav(path)
    info = probe(path)
    indices = frame_indices(info, start_seconds=3.3, num_frames=33, fps=16)
    asked = [Fraction(33, 10) + Fraction(k, 16) for k in range(33)]
    shown = [max(index for index, time in enumerate(times) if time <= moment) for moment in asked]
    assert indices.tolist() == shown
    np.testing.assert_array_equal(read_frames(info, indices), frames[shown])
    last = np.array([info.num_frames - 1, info.num_frames - 20])
    np.testing.assert_array_equal(read_frames(replace(info, reader="pyav"), last), frames[last])


def drawn_dot(centre):
    """A frame with a soft dot, whose middle falls between pixels where it should."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    value = 235 * np.exp(-((x - centre) ** 2 + (y - HEIGHT / 2) ** 2) / 50) + 16
    return np.repeat(value[..., None], 3, axis=-1).astype(np.uint8)


def dot_speed(info):
    """Pixels a frame at which the dot moves once the clip is sampled at 16 frames a second, by least squares."""
    num_frames = int(info.duration_seconds * 16) // 4 * 4 - 3
    sampled = read_frames(info, frame_indices(info, start_seconds=0, num_frames=num_frames, fps=16))
    weight = np.clip(sampled[..., 1].astype(float) - 24, 0, None).sum(axis=1)
    centres = (weight * np.arange(WIDTH)).sum(axis=1) / weight.sum(axis=1)
    return np.polyfit(np.arange(num_frames), centres, 1)[0]


@pytest.mark.parametrize("rate", RATES)
def test_a_moving_dot_keeps_its_speed_at_every_rate(tmp_path, rate):
    seconds, pixels_per_second = 4, 24
    times = [number / rate for number in range(int(seconds * rate))]
    frames = np.stack([drawn_dot(16 + pixels_per_second * float(time)) for time in times])
    write_video(tmp_path / "dot.mp4", frames, float(rate))
    assert dot_speed(probe(tmp_path / "dot.mp4")) == pytest.approx(pixels_per_second / 16, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_a_moving_dot_keeps_its_speed_at_a_variable_rate(tmp_path, seed):
    """Frames 10 to 80 ms apart: by index the speed would be off by the difference of their mean from 1/16 s."""
    gaps = np.random.default_rng(seed).integers(10, 80, 88)
    stamps = np.concatenate([[0], np.cumsum(gaps)])
    pixels_per_second = 96 / (stamps[-1] / 1000)
    path = tmp_path / "dot.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp in stamps.tolist():
            frame = av.VideoFrame.from_ndarray(drawn_dot(16 + pixels_per_second * stamp / 1000))
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert dot_speed(probe(path)) == pytest.approx(pixels_per_second / 16, rel=0.01)


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


def test_av1_is_read_by_pyav(tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")  # errors only
    path = encode_drift(tmp_path / "clip.mp4", codec="libsvtav1", options={"preset": "12"})
    info = probe(path)
    wanted = np.arange(1, 40, 3)
    assert (info.reader, info.num_frames) == ("pyav", 40)
    np.testing.assert_array_equal(read_frames(info, wanted), decoded_by_pyav(path)[1][wanted])


def test_a_single_group_of_18000_frames_is_read_to_its_end(tmp_path):
    info = probe(long_single_gop(tmp_path / "long.mp4"))
    wanted = np.array([0, 9000, 17_999])
    shown = read_frames(info, wanted)[:, 32, 32, 0]
    assert (info.num_frames, info.key_frames.tolist()) == (18_000, [0])
    np.testing.assert_allclose(shown, wanted % 200 * 255 / 219, atol=2)
