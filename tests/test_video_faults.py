"""Files that cannot be used, each named with its fault and its remedy, and odd names that are no fault."""

import os
import socket
from pathlib import Path

import av
import numpy as np
import pytest

from tests.video_material import (
    HEIGHT,
    WIDTH,
    audio_only,
    encode,
    encode_planes,
    numbered_frame,
    numbers_in,
    patched,
    real_footage,
    without_samples,
)
from wan_finetune.errors import InputError
from wan_finetune.video import VideoFault, probe, read_frames, write_video


def cut_files(folder):
    """Clips that end too early, and the message each must get."""
    messages = {}
    for name, options in {
        "moov_last.mp4": {},
        "moov_first.mp4": {},
        "cut.mkv": {},
        "cut.avi": {},
        "cut.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    }.items():
        path = folder / name
        encode(path, noise=True, **options)  # noise, so that most of the file is frames, not headers
        if name == "moov_first.mp4":
            write_video(path, np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8), 25)
        content = path.read_bytes()
        for percent in (50, 90):
            cut = path.with_stem(f"{path.stem}_{percent}")
            cut.write_bytes(content[: len(content) * percent // 100])
            messages[cut.name] = "cut off.*export" if "moov_last" in name else "cut off before its end; copy"
        path.unlink()
    return messages


def bad_files(folder):
    """One of each sort: name -> what its message must say."""
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film at all\n" * 99)
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(100_000))
    (folder / "other.mp4").write_bytes(real_footage("bikes.mp4").read_bytes())
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    (folder / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nother.mp4\n#EXT-X-ENDLIST\n")
    (folder / "dash.mp4").write_text('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>')
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket.mp4"))
    audio_only(folder / "audio.mp4")
    audio_only(folder / "cover.mp4", cover=True)
    without_samples(folder / "header.mp4")
    grey = [np.full((64, 64), 128, np.uint8), *[np.full((32, 32), 128, np.uint8)] * 2]
    encode_planes(folder / "exotic.mkv", grey, codec="snow", options={"strict": "-2"})
    rgb = np.full((64, 64, 3), 99, np.uint8)
    small = encode_planes(folder / "small.mov", [rgb], codec="qtrle", pixel_format="rgb24", copies=1)
    patched(small, folder / "huge.mov", b"rle ", 28, [8192, 8192])
    small.unlink()
    return {
        "missing.mp4": "no such file; check",
        "zero.mp4": "is empty.*copy or export",
        "text.mp4": "not a readable video.*export",
        "random.mp4": "not a readable video.*export",
        "concat.mp4": "is a list of other files, not a video; put",
        "hls.mp4": "is a list of other files, not a video; put",
        "dash.mp4": "is a list of other files, not a video; put",
        "folder.mp4": "is a folder, not a file; put",
        "fifo.mp4": "is a FIFO, not a file; put",
        "device.mp4": "is a device, not a file; put",
        "socket.mp4": "is a socket, not a file; put",
        "audio.mp4": "no video stream; replace",
        "cover.mp4": "no video stream; replace",
        "header.mp4": "no frame that can be decoded; export",
        "exotic.mkv": r"its codec \(snow\) is not one that is read here; export it as H.264",
        "huge.mov": "frames are 8192x8192, 35,389,440 pixels .* are the limit; scale it down",
        **cut_files(folder),
    }


def test_each_bad_file_is_named_with_fault_and_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes at most
    messages = bad_files(tmp_path)
    assert probe(tmp_path / "other.mp4").num_frames == 250  # what the lists of files point to is a good clip
    assert set(messages) ^ {path.name for path in tmp_path.iterdir()} == {"missing.mp4", "other.mp4"}
    for name, message in messages.items():
        with pytest.raises(VideoFault, match=message) as caught:
            probe(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}", name
        assert str(tmp_path) not in caught.value.reason, name


def test_a_file_that_turns_into_a_fifo_is_refused_before_it_is_opened(tmp_path):
    path = encode(tmp_path / "clip.mp4", num_frames=4)
    info = probe(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(VideoFault, match="is a FIFO, not a file"):
        read_frames(info, np.array([0]))


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", num_frames=4)
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser may read everything
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(VideoFault, match=r"no permission to read it.*check name and rights") as caught:
        probe(path)
    assert not caught.value.lasting


@pytest.mark.parametrize(
    "name",
    ["CLIP.MP4", "片段 — ñandú 🎬.mp4", "ü" * 125 + "a.mp4", "concat:a|b.mp4", "-i %03d.mp4", "http:x.mkv", "a\nb.mp4"],
)
def test_names_that_people_give_files_are_read(tmp_path, name):
    assert len(name.encode()) <= 255
    path = encode(tmp_path / "clip.mkv", num_frames=4).rename(tmp_path / name)
    info = probe(path)
    assert (info.reader, info.path.name) == ("decord", name)
    assert numbers_in(read_frames(info, np.arange(4))).tolist() == [0, 1, 2, 3]


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    path.write_bytes(b"x")
    with pytest.raises(VideoFault, match="its name is not UTF-8; rename it"):
        probe(path)


def test_a_title_in_an_old_encoding_is_no_fault(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Qxxxxxx"
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(5))))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Qxxxxxx", b"Qu\xe9bec!"))
    assert numbers_in(read_frames(probe(path), np.array([0]))).tolist() == [5]


@pytest.mark.parametrize("container", ["mp4", "avi"])
def test_damage_after_the_probe_is_named(tmp_path, container):
    """Both readers: a file that changes under them is a fault of the file, not a traceback or fewer frames."""
    path = encode(tmp_path / f"clip.{container}", num_frames=60)
    info = probe(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"clip\.{container}: .*export it again"):
        read_frames(info, np.arange(60))
