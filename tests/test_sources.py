"""Folders of clips: every file is an item or a fault, and nothing is left out in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import SourceConfig
from data.sources import read_source
from tests.sources_material import ROOT, captions, read, write
from wan_finetune.errors import InputError


def test_a_folder_gives_videos_and_stills_with_all_their_captions(tmp_path):
    folder = write(
        tmp_path / "clips", **{"b.mp4": None, "b.txt": "one\n\n  two\n", "b.2.txt": "four", "b.1.txt": "three"}
    )
    write(folder, **{"a.MOV": None, "a.TXT": b"\xef\xbb\xbfa ball\r\n", "z.JPeG": None, "z.txt": "一只猫"})
    write(folder, **{"sub__c.webm": None, "sub__c.10.txt": "ten", "sub__c.9.txt": "nine", ".hidden.mp4": None})
    write(folder, **{".git__x.mp4": None, "notes.md": "no clip", "v1.2.avi": None, "v1.2.txt": "versions"})
    items, faults = read(folder, tmp_path)
    assert not faults
    assert {name: item.captions for name, item in items.items()} == {
        "a.MOV": ("a ball",),
        "b.mp4": ("one", "  two", "three", "four"),
        "sub/c.webm": ("nine", "ten"),
        "v1.2.avi": ("versions",),
        "z.JPeG": ("一只猫",),
    }
    assert all(item.path == folder / name and item.mask is None for name, item in items.items())


def test_a_folder_is_read_in_the_same_order_each_time_and_lazily(tmp_path):
    names = [f"{stem}.mp4" for stem in ("b", "a-1", "a", "a1", "B", "sub__x", "a__x", "é")]
    folder = write(tmp_path, **dict.fromkeys(names))
    orders = [[one.name for one in read_source(SourceConfig(path=folder), tmp_path)] for _ in range(2)]
    assert orders[0] == orders[1] and len(orders[0]) == len(names)
    rows = read_source(SourceConfig(path=folder), tmp_path)
    next(rows)
    rows.close()


def test_a_clip_and_a_still_of_one_name_share_its_captions_unless_these_say_whose_they_are(tmp_path):
    folder = write(tmp_path / "clips", **{"a.mp4": None, "a.png": None, "a.txt": "both", "a.png.txt": "the still"})
    write(folder, **{"a.1.mp4": None, "a.1.txt": "the take"})
    assert captions(folder, tmp_path) == {
        "a.1.mp4": ("the take",),
        "a.mp4": ("both",),
        "a.png": ("the still", "both"),
    }


def test_masks_lie_beside_their_clips_and_are_no_items(tmp_path):
    folder = write(tmp_path / "clips", **{"a.mp4": None, "a.txt": "x", "a.mask.png": None})
    write(folder, **{"b.mp4": None, "b.txt": "x", "b.MASK.MP4": None, "c.mask.png": None})
    write(folder, **{"d.mp4": None, "d.txt": "x", "d.mask.png": None, "d.mask.mp4": None})
    items, faults = read(folder, tmp_path)
    assert {name: item.mask for name, item in items.items()} == {
        "a.mp4": folder / "a.mask.png",
        "b.mp4": folder / "b.MASK.MP4",
    }
    assert "a mask without a clip; add" in faults["c.mask.png"]
    assert "has 2 masks, d.mask.mp4 and d.mask.png; keep one" in faults["d.mp4"]


def test_what_a_folder_cannot_use_is_named_with_its_remedy(tmp_path):
    folder = write(tmp_path / "clips", **{"good.mp4": None, "good.txt": "x", "orphan.txt": "x", "none.mp4": None})
    write(folder, **{"blank.mp4": None, "blank.txt": " \n\u200b\n", "latin.mp4": None, "latin.txt": b"caf\xe9"})
    write(folder, **{"old.wmv": None, "old.txt": "x", "pipe_caption.mp4": None})
    outside = write(tmp_path / "elsewhere", **{"x.mp4": None, "secret.txt": "x"})
    (folder / "link.mp4").symlink_to(outside / "x.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "gone.mp4")
    (folder / "circle.mp4").symlink_to("circle.mp4")
    (folder / "leak.mp4").write_bytes(b"x")
    (folder / "leak.txt").symlink_to(outside / "secret.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "inner.mp4").symlink_to(folder / "good.mp4")
    (folder / "inner.txt").write_text("a link that stays inside")
    os.mkfifo(folder / "fifo.mp4")
    os.mkfifo(folder / "pipe_caption.txt")
    (folder / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"x")
    items, faults = read(folder, tmp_path)
    assert list(items) == ["good.mp4", "inner.mp4"]
    expected = {
        "orphan.txt": "a caption without a clip; add the clip of the same name or remove the caption",
        "none.mp4": "has no caption; write one into none.txt beside it",
        "blank.mp4": "its caption blank.txt is empty; describe the clip in it",
        "latin.mp4": "its caption latin.txt is not UTF-8; save it as UTF-8",
        "old.wmv": "no video or still of a kind that is read",
        "old.txt": "a caption without a clip",
        "link.mp4": "leads out of the data folder",
        "leak.mp4": "leak.txt is a link, or lies behind one, that leads out of the data folder",
        "linked": "a link to a folder, which is not followed; give that folder as a source",
        "dangling.mp4": "dangling.mp4 does not exist; check",
        "circle.mp4": "circle.mp4 cannot be reached (Too many levels of symbolic links); check",
        "fifo.mp4": "fifo.mp4 is a pipe or a device; put a regular file",
        "pipe_caption.mp4": "pipe_caption.txt is a pipe",
        "bad\ufffd.mp4": "its name is not UTF-8; rename it",
    }
    assert set(faults) == set(expected)
    for name, message in expected.items():
        assert message in faults[name], faults[name]


def test_folders_without_clips_and_paths_that_are_none_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "notes", **{"a.txt": "x"})
    write(tmp_path, **{"file.mp4": None, "x.tar.gz": None})
    for name, message in {
        "absent": "no such folder; point",
        "empty": "the folder is empty; put clips",
        "notes": "holds 1 files and no video; put clips",
        "file.mp4": "is a file, not a folder; point",
        "absent.jsonl": "no such table; point",
        "x.tar.gz": "is compressed; unpack",
        "absent.tar": "no such file; name a .tar",
        "https://host/x": "is a URL; download it",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            read(Path(name) if "://" in name else tmp_path / name, tmp_path)
        assert "data.sources: " in str(caught.value)


def make_clips(folder):
    write(folder, **{"made.mp4": None, "made.txt": "x"})


def make_nothing(folder):
    pass


def make_half(folder):
    make_clips(folder)
    raise KeyboardInterrupt


def test_procedural_folder_is_made_once_and_whole(tmp_path):
    folder = tmp_path / "deep" / "made"

    def made(function):
        return list(read(folder, tmp_path, make=f"{__name__}:{function}")[0])

    with pytest.raises(KeyboardInterrupt):
        made("make_half")
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(InputError, match="without making the folder"):
        made("make_nothing")
    with pytest.raises(InputError, match="cannot be imported"):
        made("make_what")
    assert made("make_clips") == ["made.mp4"]
    assert made("make_half") == ["made.mp4"], "made again"
    assert list(folder.parent.iterdir()) == [folder]


def test_commands_start_without_the_readers_heavy_imports():
    code = "import sys, data.sources; print(*sorted(set(sys.modules) & {'datasets', 'pyarrow', 'torch', 'pandas'}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.split() == [], result.stdout + result.stderr
