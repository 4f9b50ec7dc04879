"""The index: what was learnt about a file is believed as long as the file is the same, and no longer."""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data import index as index_module
from data.index import Index, Remembered
from data.inspection import file_sha256
from tests.disk_faults import unprivileged

ROOT = Path(__file__).resolve().parent.parent
RECORD = {"width": 64, "pts_seconds": [0.0, 0.04, 0.08], "reader": "decord"}


def old_file(folder, name="clip.mp4", content=b"frames", days=1.0):
    """A file that was last changed well before the test began."""
    path = folder / name
    path.write_bytes(content)
    stamp = time.time() - days * 86400
    os.utime(path, (stamp, stamp))
    return path


def learn(index, path, **found):
    """What the data room does with a file that it meets: ask, examine, remember."""
    known = index.get(path)
    if known is None:
        index.put(path, file_sha256(path), **(found or {"record": RECORD}))
    return known


@pytest.fixture
def index(tmp_path):
    with Index(tmp_path / "cache", "probe 1") as opened:
        yield opened


def reopened(index, examiner="probe 1"):
    index.close()
    return Index(index.file.parent, examiner)


def test_what_was_put_comes_back_now_and_in_the_next_run(tmp_path, index):
    good, bad = old_file(tmp_path), old_file(tmp_path, "bad.mp4", b"text")
    assert learn(index, good) is None and learn(index, bad, fault="holds no video stream; remove it") is None
    wanted = Remembered(sha256=file_sha256(good), record=RECORD, fault=None)
    assert index.get(good) == wanted
    with reopened(index) as again:
        assert again.get(good) == wanted
        assert again.get(bad) == Remembered(
            sha256=file_sha256(bad), record=None, fault="holds no video stream; remove it"
        )
        assert again.get(tmp_path / "absent.mp4") is None


def test_relative_and_absolute_paths_are_one_file(tmp_path, index, monkeypatch):
    learn(index, old_file(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert index.get(Path("clip.mp4")) == index.get(tmp_path / "clip.mp4") is not None


@pytest.mark.parametrize("name", ["\udcff\udcfe.mp4", "视频.mp4", "a'b\".mp4", "n" * 251 + ".mp4"])
def test_any_name_a_disk_allows_is_remembered(tmp_path, index, name):
    path = old_file(tmp_path, name)
    learn(index, path)
    with reopened(index) as again:
        assert again.get(path).record == RECORD


def test_any_change_of_a_file_is_a_miss(tmp_path, index):
    def grown(path):
        path.write_bytes(b"frames and more")

    def touched(path):
        os.utime(path)

    def other_bytes_of_equal_size_and_time(path):
        before = path.stat()
        path.write_bytes(b"FRAMES")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def replaced_by_an_equal_looking_file(path):
        before = path.stat()
        other = path.with_name("other.mp4")
        other.write_bytes(b"FRAMES")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)

    def removed(path):
        path.unlink()

    changes = (grown, touched, other_bytes_of_equal_size_and_time, replaced_by_an_equal_looking_file, removed)
    for change in changes:
        path = old_file(tmp_path, f"{change.__name__}.mp4")
        learn(index, path)
        assert index.get(path) is not None
        time.sleep(0.02)  # more than the granularity of change times
        change(path)
        assert index.get(path) is None, change.__name__


def test_touched_and_renamed_files_cost_a_hash_and_keep_it(tmp_path, index):
    path = old_file(tmp_path)
    learn(index, path)
    digest = index.get(path).sha256
    stamp = time.time() - 3600
    os.utime(path, (stamp, stamp))
    renamed = path.rename(tmp_path / "renamed.mp4")
    assert learn(index, renamed) is None and index.get(renamed).sha256 == digest


def test_file_that_changed_just_before_it_was_examined_is_not_believed(tmp_path, index):
    # On a disk that counts whole seconds a second change may leave no trace.
    path = old_file(tmp_path, days=1.0 / 86400)
    assert index.get(path) is None and index.put(path, file_sha256(path), RECORD) is False
    assert index.get(path) is None
    ahead = old_file(tmp_path, "ahead.mp4", days=-1.0)
    assert index.get(ahead) is None and index.put(ahead, file_sha256(ahead), RECORD) is False
    settled = old_file(tmp_path, "settled.mp4", days=3.0 / 86400)
    assert index.get(settled) is None and index.put(settled, file_sha256(settled), RECORD) is True


def test_file_that_changes_while_it_is_examined_is_not_remembered(tmp_path, index):
    path = old_file(tmp_path)
    assert index.get(path) is None
    path.write_bytes(b"longer than before")
    assert index.put(path, file_sha256(path), RECORD) is False
    unasked = old_file(tmp_path, "unasked.mp4")
    assert index.put(unasked, file_sha256(unasked), RECORD) is False
    assert index.get(path) is index.get(unasked) is None


def test_another_examiner_keeps_the_hashes_alone(tmp_path, index):
    good, bad = old_file(tmp_path), old_file(tmp_path, "bad.mp4")
    learn(index, good)
    learn(index, bad, fault="not a readable video")
    with reopened(index, "probe 2") as newer:
        for path in (good, bad):
            assert newer.get(path) == Remembered(sha256=file_sha256(path), record=None, fault=None)
        assert newer.put(bad, file_sha256(bad), record=RECORD) is True
        assert newer.get(bad).record == RECORD


def test_record_and_fault_exclude_each_other(tmp_path, index):
    path = old_file(tmp_path)
    index.get(path)
    for found in ({}, {"record": RECORD, "fault": "both"}):
        with pytest.raises(ValueError, match="either a record or a fault"):
            index.put(path, "0" * 64, **found)


def test_little_is_lost_when_a_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "ROWS_AT_ONCE", 4)
    killed = Index(tmp_path / "cache", "probe 1")
    paths = [old_file(tmp_path, f"{number}.mp4") for number in range(10)]
    for path in paths:
        learn(killed, path)
    with Index(tmp_path / "cache", "probe 1") as next_run:
        assert [next_run.get(path) is not None for path in paths] == [True] * 8 + [False] * 2
    killed.close()


def test_forgets_what_is_gone_and_only_that(tmp_path, index):
    kept, gone = old_file(tmp_path), old_file(tmp_path, "gone.mp4")
    learn(index, kept)
    learn(index, gone)
    gone.unlink()
    assert index.forget_missing() == 1 and index.forget_missing() == 0
    assert index.get(kept).record == RECORD


def damaged(file, how):
    content = file.read_bytes()
    with sqlite3.connect(file) as database:
        if how == "of another version":
            database.execute("PRAGMA user_version = 99")
    database.close()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "text":
        file.write_bytes(b"no database" * 1000)
    elif how == "overwritten":
        file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


@pytest.mark.parametrize("how", ["cut", "text", "overwritten", "of another version"])
def test_unusable_database_is_set_aside_with_a_message_and_begun_anew(tmp_path, capsys, how):
    paths = [old_file(tmp_path, f"{number}.mp4") for number in range(40)]
    with Index(tmp_path / "cache", "probe 1") as index:
        for path in paths:
            learn(index, path)
        assert len([path for path in paths if index.get(path)]) == 40
    damaged(index.file, how)
    content = index.file.read_bytes()
    with Index(tmp_path / "cache", "probe 1") as again:
        for path in paths:
            learn(again, path)
        assert all(again.get(path).record == RECORD for path in paths)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "the index of known files is unusable" in message
    assert "kept as index.sqlite3.damaged, and begun anew" in message
    assert ("version 99, this program knows 1" in message) == (how == "of another version")
    assert index.file.with_name("index.sqlite3.damaged").read_bytes() == content
    with Index(tmp_path / "cache", "probe 1") as third:
        assert all(third.get(path).record == RECORD for path in paths)
    assert capsys.readouterr().err == ""


def test_flipped_bit_in_a_value_is_a_miss(tmp_path, index):
    path = old_file(tmp_path)
    learn(index, path)
    index.close()
    content = index.file.read_bytes()
    assert content.count(b'"width": 64') == 1
    index.file.write_bytes(content.replace(b'"width": 64', b'"width": 65'))
    with Index(index.file.parent, "probe 1") as again:
        assert again.get(path) is None


def test_database_set_aside_by_another_process_is_left_and_the_new_one_used(tmp_path, capsys):
    path, other = old_file(tmp_path), old_file(tmp_path, "other.mp4")
    with Index(tmp_path / "cache", "probe 1") as first, Index(tmp_path / "cache", "probe 1") as second:
        learn(first, path)
        os.replace(first.file, first.file.with_name("index.sqlite3.damaged"))
        with Index(tmp_path / "cache", "probe 1") as third:
            learn(third, other)
        learn(second, path)
    with Index(tmp_path / "cache", "probe 1") as last:
        assert last.get(path).record == last.get(other).record == RECORD
    assert capsys.readouterr().err == ""


def test_folder_that_cannot_be_written_is_read(tmp_path, capsys):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = old_file(folder)
        with Index(folder / "cache", "probe 1") as index:
            learn(index, path)
        new = old_file(folder, "new.mp4")
        for entry in (folder, folder / "cache", folder / "cache" / "index.sqlite3"):
            entry.chmod(0o555 if entry.is_dir() else 0o444)
        with unprivileged():
            with Index(folder / "cache", "probe 1") as index:
                assert index.get(path).record == RECORD
                assert learn(index, new) is None
            assert "cannot be used (attempt to write a readonly database)" in capsys.readouterr().err
            with Index(folder / "cache" / "deeper", "probe 1") as index:
                assert learn(index, path) is None
            assert "cannot be opened" in capsys.readouterr().err
        for entry in (folder, folder / "cache"):
            entry.chmod(0o755)


LEARN_ALL = """
import sys
from pathlib import Path
from data.index import Index

folder, clips, offset = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), int(sys.argv[3])
with Index(folder, "probe 1") as index:
    for path in clips[offset:] + clips[:offset]:
        if index.get(path) is None:
            index.put(path, "0" * 64, record={"name": path.name})
"""


def test_processes_share_one_index(tmp_path):
    clips, folder = tmp_path / "clips", tmp_path / "cache"
    clips.mkdir()
    folder.mkdir()
    files = [old_file(clips, f"{number}.mp4") for number in range(300)]
    (folder / "index.sqlite3").write_bytes(b"damaged" * 100)
    writers = [
        subprocess.Popen([sys.executable, "-c", LEARN_ALL, folder, clips, str(75 * rank)], cwd=ROOT)
        for rank in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    with Index(folder, "probe 1") as index:
        assert [index.get(path).record for path in files] == [{"name": path.name} for path in files]


def test_ten_thousand_lookups_stay_well_below_a_second(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    files = [old_file(folder, f"{number}.mp4") for number in range(500)]
    record = {**RECORD, "pts_seconds": [number / 25 for number in range(132)]}
    with Index(tmp_path / "cache", "probe 1") as index:
        for path in files:
            learn(index, path, record=record)
    with Index(tmp_path / "cache", "probe 1") as index:
        begun = time.process_time()
        assert all(json.dumps(index.get(path).record) for path in files)
        # Ten thousand take twenty times as long; processor time, as the machine may be busy.
        assert (time.process_time() - begun) * 20 < 2.0
