"""WebDataset shards: grouped by key, never unpacked by name, and whole or said to be cut off."""

import errno
import hashlib
import os
import subprocess
import tarfile

import pytest

from data.sources.shards import expand_braces
from tests.sources_material import MP4, PNG, captions, read, spooled, write, write_tar
from wan_finetune.errors import InputError


def test_members_of_a_shard_are_grouped_by_their_key(tmp_path):
    members = {"k/a.mp4": MP4, "k/a.txt": b"one\ntwo", "k/a.json": '{"caption": "三"}'.encode(), "k/a.mask.png": PNG}
    members |= {"k/a.npy": b"0", "b.PNG": PNG, "b.TXT": b"b", "._b.png": b"x", "README": b"x"}
    shard = write_tar(tmp_path / "0.tar", members)
    items, faults = read(shard, tmp_path)
    assert not faults
    assert {name: item.captions for name, item in items.items()} == {
        "0.tar/k/a.mp4": ("one", "two", "三"),
        "0.tar/b.PNG": ("b",),
    }
    assert items["0.tar/k/a.mp4"].path.name == f"{hashlib.sha256(MP4).hexdigest()}.mp4"
    assert items["0.tar/k/a.mp4"].mask.read_bytes() == items["0.tar/b.PNG"].path.read_bytes() == PNG
    before = spooled(tmp_path)
    assert set(before) == {items["0.tar/k/a.mp4"].path.name, f"{hashlib.sha256(PNG).hexdigest()}.png"}
    assert read(shard, tmp_path)[0] == items and spooled(tmp_path) == before
    assert captions(shard, tmp_path, caption_column="caption", video_column="mp4") == {"0.tar/k/a.mp4": ("三",)}


def test_patterns_stand_for_shards_in_order(tmp_path):
    for index in range(12):
        write_tar(tmp_path / "s" / f"{index:03d}.tar", {"a.mp4": MP4 + bytes([index]), "a.txt": b"x"})
    every = [f"{index:03d}.tar/a.mp4" for index in range(12)]
    assert list(captions(tmp_path / "s/*.tar", tmp_path)) == every
    assert list(captions(tmp_path / "s/{000..011}.tar", tmp_path)) == every
    assert list(captions(tmp_path / "s/{003,001}.tar", tmp_path)) == ["003.tar/a.mp4", "001.tar/a.mp4"]
    assert list(captions(tmp_path / "s/00[12].tar", tmp_path)) == every[1:3]
    items, faults = read(tmp_path / "s/{010..013}.tar", tmp_path)
    assert list(items) == every[10:]
    assert all("the shard does not exist" in faults[name] for name in ("012.tar", "013.tar"))
    with pytest.raises(InputError, match="no such file; name a"):
        read(tmp_path / "none*.tar", tmp_path)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{1..010}", [f"{number:03d}" for number in range(1, 11)]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a}{}", ["{a}{}"]),
    ],
)
def test_braces_are_written_out_as_a_shell_does(text, texts):
    assert expand_braces(text) == texts
    shell = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True, check=True)
    assert shell.stdout.split() == texts


def test_patterns_for_too_many_shards_are_refused():
    for text in ("{0..999999999}", "{0..999}{0..999}"):
        with pytest.raises(InputError, match="more than 100,000 shards"):
            expand_braces(text)


def test_names_in_an_archive_lead_nowhere(tmp_path):
    members = {"../../evil.mp4": MP4, "../../evil.txt": b"x", "/etc/abs.png": PNG, "/etc/abs.txt": b"y"}
    shard = write_tar(tmp_path / "in" / "0.tar", members)
    items, faults = read(shard, tmp_path)
    assert list(items) == ["0.tar/evil.mp4", "0.tar/etc/abs.png"] and not faults
    assert all(item.path.parent == tmp_path / "spool" for item in items.values())
    assert sorted(
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path / "spool"
    ) == ["0.tar"]


def test_what_a_shard_cannot_use_is_named(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, {"a.mp4": MP4, "b.txt": b"x", "c.mp4": MP4, "c.json": b"{", "d.mp4": MP4, "d.txt": b"\xff"})
    write_tar(path, {"e.mp4": MP4, "e.txt": b"e", "f.gif": b"GIF", "g.mp4": b"", "g.txt": b"x"}, mode="a")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("h.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        twice = tarfile.TarInfo("i.mp4")
        archive.addfile(twice)
        archive.addfile(twice)
    items, faults = read(path, tmp_path)
    assert list(items) == ["0.tar/e.mp4"]
    for name, message in {
        "a.mp4": "has no caption; pack a.txt, or a.json with a caption, right beside it",
        "b.txt": "a caption without a clip",
        "c.mp4": "its c.json is not valid JSON",
        "d.mp4": "its caption d.txt is not UTF-8",
        "f.gif": "no video or still of a kind that is read",
        "g.mp4": "is empty (0 bytes)",
        "h.mp4": "is a link",
    }.items():
        assert message in faults[f"0.tar/{name}"]
    assert "twice" in faults["0.tar/i.mp4"] or "no caption" in faults["0.tar/i.mp4"]


def test_a_shard_that_is_cut_off_anywhere_says_so_and_gives_what_came_before(tmp_path):
    members = {}
    for index in range(3):
        members |= {f"{index}.mp4": MP4 + bytes([index]) * 1500, f"{index}.txt": b"x"}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = whole.rindex(b"x") // 512 * 512 + 512
    for size in range(0, end, 256):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        items, faults = read(tmp_path / "0.tar", tmp_path)
        assert "0.tar" in faults, size
        assert ("cut off or damaged" if size >= 512 else "is no tar archive") in faults["0.tar"], size
        assert len(items) < 3 or size > end - 512
    broken = bytearray(whole)
    broken[whole.index(b"1.mp4")] ^= 1
    (tmp_path / "0.tar").write_bytes(broken)
    items, faults = read(tmp_path / "0.tar", tmp_path)
    assert list(items) == ["0.tar/0.mp4"] and "after 0; what lies beyond is not read" in faults["0.tar"]
    assert len(read(tmp_path / "whole.tar", tmp_path)[0]) == 3


def test_an_archive_without_clips_and_one_that_is_none_are_named(tmp_path):
    with pytest.raises(InputError, match="1 shards and no clip in them"):
        read(write_tar(tmp_path / "empty.tar", {}), tmp_path)
    write(tmp_path, **{"text.tar": "words " * 200})
    _, faults = read(tmp_path / "text.tar", tmp_path)
    assert "is no tar archive" in faults["text.tar"]
    with pytest.raises(InputError, match=r"holds 2 \.tar files and no video; set path to .*/\*\.tar for"):
        read(tmp_path, tmp_path)
    with tarfile.open(tmp_path / "gzip.tar", "w:gz"):
        pass
    assert "pack it again, without compression" in read(tmp_path / "gzip.tar", tmp_path)[1]["gzip.tar"]


def test_a_full_disk_under_the_spool_is_an_input_error_that_leaves_nothing(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", {"a.mp4": MP4, "a.txt": b"x"})

    def copy(stream, file, size):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"write 12 bytes of a clip .No space.*free space"),
    ):
        patch.setattr("shutil.copyfileobj", copy)
        read(shard, tmp_path)
    assert spooled(tmp_path) == {}
    (tmp_path / "spool").rmdir()
    write(tmp_path, spool="a file where the folder should be")
    with pytest.raises(InputError, match="cannot write"):
        read(shard, tmp_path)


def test_a_torn_file_in_the_spool_is_written_again(tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"a.mp4": MP4, "a.txt": b"x"})
    (item,) = read(shard, tmp_path)[0].values()
    item.path.write_bytes(MP4[:5])
    read(shard, tmp_path)
    assert item.path.read_bytes() == MP4
