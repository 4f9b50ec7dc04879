"""Pixels as they were meant: matrices, ranges, bit depths, odd sizes, oblong pixels, transparency."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from tests.video_material import HEIGHT, WIDTH, encode, encode_planes, real_footage
from wan_finetune.video import VideoFault, probe, read_frames

MATRICES = {"bt709": (1, Colorspace.ITU709, 0.2126, 0.0722), "bt601": (6, Colorspace.ITU601, 0.299, 0.114)}
"""Number in ITU-T H.273, swscale's name, and the weights of red and blue (H.273, table 4)."""

RANGES = {"limited": ColorRange.MPEG, "full": ColorRange.JPEG}

PATCH = 16
"""Side of a one-coloured patch, in pixels; its inner half is out of reach of chroma subsampling and filters."""


def patches():
    """Patches [96, 160, 3] of saturated and of random colours."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 10, 3))
    colours[0, :8] = [[255 * (corner >> bit & 1) for bit in range(3)] for corner in range(8)]
    return colours.repeat(PATCH, 0).repeat(PATCH, 1)


def stored_planes(rgb, matrix, value_range, pixel_format):
    """Y, Cb and Cr of an RGB picture as H.273 defines them (equations 34 to 51)."""
    _, _, red, blue = MATRICES[matrix]
    bits = 10 if "10" in pixel_format else 8
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))]
    unit = 2 ** (bits - 8)
    if value_range == "full":
        top = 2**bits - 1
        planes = [y * top, *[np.minimum(c * top + 128 * unit, top) for c in chroma]]
    else:
        planes = [(219 * y + 16) * unit, *[(224 * c + 128) * unit for c in chroma]]
    rows, columns = {"420": (2, 2), "422": (1, 2), "444": (1, 1)}[pixel_format[3:6]]
    planes[1:] = [plane[::rows, ::columns] for plane in planes[1:]]
    return [np.rint(plane).astype(np.uint16 if bits > 8 else np.uint8) for plane in planes]


def inside_patches(picture):
    """Pixels [N, 3] away from the patches' edges."""
    inner = np.zeros(PATCH, bool)
    inner[PATCH // 4 : -PATCH // 4] = True
    rows, columns = np.tile(inner, picture.shape[0] // PATCH), np.tile(inner, picture.shape[1] // PATCH)
    return picture[rows][:, columns].reshape(-1, 3).astype(float)


KINDS = {
    "h264 mp4": ("clip.mp4", "libx264", "yuv420p", {"crf": "0"}, "decord"),
    "h264 mkv": ("clip.mkv", "libx264", "yuv420p", {"crf": "0"}, "decord"),
    "vp9 webm": ("clip.webm", "libvpx-vp9", "yuv420p", {"lossless": "1"}, "decord"),
    "h265 mp4": ("clip.mp4", "libx265", "yuv420p", {"x265-params": "lossless=1:log-level=none"}, None),
    "4:4:4": ("clip.mp4", "libx264", "yuv444p", {"crf": "0"}, "pyav"),
    "4:2:2": ("clip.mp4", "libx264", "yuv422p", {"crf": "0"}, "pyav"),
    "10 bit 4:2:0": ("clip.mp4", "libx264", "yuv420p10le", {"crf": "0"}, "pyav"),
    "10 bit 4:2:2": ("clip.mov", "libx264", "yuv422p10le", {"crf": "0"}, "pyav"),
    "10 bit 4:4:4": ("clip.mkv", "libx264", "yuv444p10le", {"crf": "0"}, "pyav"),
}


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_those_that_the_tags_mean(tmp_path, kind, matrix, value_range):
    name, codec, pixel_format, options, reader = KINDS[kind]
    number, colorspace, _, _ = MATRICES[matrix]
    planes = stored_planes(patches(), matrix, value_range, pixel_format)
    tags = {"colorspace": number, "color_range": RANGES[value_range]}
    encode_planes(tmp_path / name, planes, codec=codec, pixel_format=pixel_format, options=options, tags=tags)
    info = probe(tmp_path / name)
    shown = read_frames(info, np.array([2]))[0]
    assert info.reader == (reader or info.reader)
    with av.open(str(tmp_path / name)) as container:
        frame = next(container.decode(video=0))
    explicit = frame.reformat(
        format="rgb24",
        src_colorspace=colorspace,
        dst_colorspace=colorspace,
        src_color_range=RANGES[value_range],
        dst_color_range=ColorRange.JPEG,
    ).to_ndarray()
    assert np.abs(shown.astype(float) - explicit).mean() <= 1
    # FFmpeg's conversion rounds down in places. The other matrix or range would be 6 and more away, on average.
    error = inside_patches(shown) - inside_patches(patches())
    assert np.abs(error).mean() < 2 and np.abs(error).max() <= 4


@pytest.mark.parametrize(("name", "reader"), [("clip.mp4", "decord"), ("clip.avi", "pyav")])
def test_where_no_tag_is_the_colours_are_those_of_ffmpeg(tmp_path, name, reader):
    """BT.601, limited: what FFmpeg, decord and PyAV take, and what OpenCV and imageio mean when they write no tag."""
    planes = stored_planes(patches(), "bt601", "limited", "yuv420p")
    info = probe(encode_planes(tmp_path / name, planes, options={"crf": "0"}))
    shown = read_frames(info, np.array([1]))[0]
    assert info.reader == reader
    assert np.abs(inside_patches(shown) - inside_patches(patches())).mean() < 2


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"color_trc": 16, "colorspace": 9, "color_primaries": 9}, r"is HDR \(PQ\); convert it with ffmpeg.*tonemap"),
        ({"color_trc": 18, "colorspace": 9, "color_primaries": 9}, r"is HDR \(HLG\); convert it with ffmpeg.*tonemap"),
        ({"color_trc": 14, "colorspace": 9, "color_primaries": 9}, r"wide colours of BT.2020; convert.*zscale=p=bt709"),
        ({"colorspace": 8}, r"its colour matrix \(number 8\) is not read here; export it as BT.709"),
    ],
)
def test_colours_that_rgb_cannot_show_are_refused(tmp_path, tags, message):
    planes = stored_planes(patches(), "bt709", "limited", "yuv420p10le")
    path = tmp_path / "clip.mkv"
    encode_planes(path, planes, codec="ffv1", pixel_format="yuv420p10le", tags=tags)
    with pytest.raises(VideoFault, match=message):
        probe(path)


@pytest.mark.parametrize("size", [(161, 97), (160, 97), (161, 96), (33, 721), (721, 33), (3, 2)])
@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "options"),
    [
        ("clip.webm", "libvpx-vp9", "yuv420p", {"lossless": "1"}),
        ("clip.mkv", "ffv1", "yuv420p", {}),
        ("clip.mp4", "libx264", "yuv444p", {"crf": "0"}),
        ("clip.mov", "libx264", "yuv444p10le", {"crf": "0"}),
    ],
)
def test_odd_sizes_are_right_to_the_last_row_and_column(tmp_path, name, codec, pixel_format, options, size):
    width, height = size
    colours = np.random.default_rng(0).integers(0, 256, (height // PATCH + 1, width // PATCH + 1, 3))
    # Patches of their own in the last row and column: what is taken from beside them shows.
    meant = colours.repeat(PATCH, 0).repeat(PATCH, 1)[:height, :width]
    planes = stored_planes(meant, "bt601", "limited", pixel_format)
    encode_planes(tmp_path / name, planes, codec=codec, pixel_format=pixel_format, options=options)
    info = probe(tmp_path / name)
    assert (info.width, info.height) == size
    error = np.abs(read_frames(info, np.array([0]))[0] - meant)
    middles = slice(PATCH // 2 if min(size) > PATCH else 0, None, PATCH)
    for part in (error[middles, middles], error[-1, middles], error[middles, -1]):
        assert part.size and part.max() <= 4


def test_an_odd_height_is_never_left_to_decord(tmp_path):
    """One colour all over does not show that decord takes its last row's from elsewhere; the frames after it would."""
    planes = [np.full((97, 64), 80, np.uint8), *[np.full((49, 32), 90, np.uint8)] * 2]
    assert probe(encode_planes(tmp_path / "odd.mkv", planes, codec="ffv1")).reader == "pyav"
    even = [planes[0][:96], *[plane[:48] for plane in planes[1:]]]
    assert probe(encode_planes(tmp_path / "even.mkv", even, codec="ffv1")).reader == "decord"


@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(16, 11), Fraction(8, 9)])
def test_oblong_pixels_are_resampled_to_square_ones(tmp_path, aspect, rotation):
    """A disc that the file stores as an ellipse is a disc again."""
    shown_width = round(WIDTH * aspect)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot((x + 0.5) * float(aspect) - shown_width / 2, y + 0.5 - HEIGHT / 2)
    luma = np.clip((24 - distance) * 40 + 128, 16, 235)
    planes = [luma.astype(np.uint8), *[np.full((HEIGHT // 2, WIDTH // 2), 128, np.uint8)] * 2]
    path = tmp_path / "clip.mp4"
    encode_planes(path, planes, options={"crf": "1"}, sample_aspect_ratio=aspect)
    if rotation:
        with av.open(str(path)) as source, av.open(str(tmp_path / "turned.mp4"), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            stream.set_display_rotation(rotation)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        path = tmp_path / "turned.mp4"
    info = probe(path)
    expected_size = (shown_width, HEIGHT)
    assert (info.width, info.height) == (expected_size[::-1] if rotation else expected_size)
    shown = read_frames(info, np.array([1]))[0]
    assert shown.shape == (info.height, info.width, 3)
    inside = shown[..., 0] > 128
    assert inside.any(axis=0).sum() == pytest.approx(48, abs=1.01)
    assert inside.any(axis=1).sum() == pytest.approx(48, abs=1.01)
    assert inside.sum() == pytest.approx(np.pi * 24**2, rel=0.01)


def test_real_oblong_footage_equals_pillows_resampling():
    path = real_footage("carphone_pristine.mp4")
    info = probe(path)
    assert (info.width, info.height, info.stored_size, info.reader) == (193, 144, (176, 144), "pyav")
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_image()
    expected = np.asarray(stored.resize((193, 144), Image.Resampling.BICUBIC)).astype(float)
    difference = read_frames(info, np.array([0]))[0] - expected
    # Both resample; FFmpeg's unscaled conversion, which Pillow's picture comes from, is one level darker.
    assert np.abs(difference - difference.mean()).mean() < 1.5 and abs(difference.mean()) < 1.5


def test_an_aspect_ratio_that_only_rounds_is_left_alone(tmp_path):
    info = probe(encode(tmp_path / "clip.mp4", num_frames=4, aspect=Fraction(404, 405)))
    assert (info.width, info.reader, info.stored_size) == (WIDTH, "decord", None)


def test_an_aspect_ratio_that_no_camera_has_is_refused(tmp_path):
    with pytest.raises(VideoFault, match="states pixels of 20, which no camera has; re-encode with ffmpeg"):
        probe(encode(tmp_path / "clip.mp4", num_frames=4, aspect=Fraction(20)))


def test_what_is_transparent_is_white(tmp_path):
    alpha, red, green, blue = np.random.default_rng(0).integers(0, 256, (4, 64, 64))
    packed = np.stack([alpha, red, green, blue], axis=-1).astype(np.uint8)
    info = probe(encode_planes(tmp_path / "clip.mov", [packed], codec="qtrle", pixel_format="argb"))
    shown = read_frames(info, np.array([0]))[0]
    share = alpha[..., None] / 255
    expected = share * np.stack([red, green, blue], axis=-1) + (1 - share) * 255
    assert np.abs(shown - expected).max() <= 0.51
