"""From folders to clips: each file has its line in the report, and nothing is dropped in silence."""

import ast
import functools
import html
import importlib.util
import json
import re
from pathlib import Path

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clips import find_clips
from data.config import DataConfig, SourceConfig
from tests.data_material import add_clip, config_for, good_folder
from wan_finetune.captions import clean_caption, with_trigger
from wan_finetune.errors import InputError
from wan_finetune.settings import load_settings


@pytest.fixture
def folder(tmp_path):
    return good_folder(tmp_path)


@functools.cache
def pipeline_prompt_clean():
    """diffusers' own function, taken from its source: importing the package would cost ten seconds."""
    package = Path(importlib.util.find_spec("diffusers").origin).parent
    tree = ast.parse((package / "pipelines" / "wan" / "pipeline_wan.py").read_text(encoding="utf-8"))
    names = ("basic_clean", "whitespace_clean", "prompt_clean")
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    space = {"ftfy": ftfy, "html": html, "re": re, "is_ftfy_available": lambda: True}
    exec(compile(tree, "pipeline_wan.py", "exec"), space)
    return space["prompt_clean"]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\tcat \n on  a mat ", "a cat on a mat"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("schÃ¶n", "schön"),
        ("一只猫，坐着。", "一只猫,坐着。"),
        ("&lt;b&gt;", "<b>"),
    ],
)
def test_captions_are_cleaned_as_the_pipeline_cleans_prompts(raw, cleaned):
    assert clean_caption(raw) == cleaned == pipeline_prompt_clean()(raw)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_cleaning_equals_the_pipeline_on_any_text(text):
    assert clean_caption(text) == pipeline_prompt_clean()(text)


def test_trigger_is_put_before_captions_that_lack_it():
    assert with_trigger("a cat", "ACME") == "ACME, a cat"
    assert with_trigger("a cat in ACME style", "ACME") == "a cat in ACME style"
    assert with_trigger("一只猫", "") == "一只猫"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('buckets = ["830x480x81"]', "multiples of 16"),
        ('buckets = ["832x480x80"]', "4n\\+1, such as 77 or 81"),
        ('buckets = ["832x480"]', "not WIDTHxHEIGHTxFRAMES"),
        ('buckets = ["64x64x17", "64x64x17"]', "twice"),
        ("buckets = []", "at least 1"),
        ("fps = 0", "above 0"),
        ("caption_dropout = 1.5", "in 0\\.\\.1"),
        ("windows_per_clip = 0", "1 or more"),
        ('on_error = "ignore"', "'fail' or 'skip'"),
        ("sources = []", "at least 1"),
        ('sources = [{path = "x", make = "no colon"}]', "module:function"),
        ("fsp = 16", "did you mean fps"),
    ],
)
def test_wrong_values_are_named_with_line_and_key(tmp_path, line, message):
    table = {"sources": 'sources = [{path = "x"}]', "buckets": 'buckets = ["64x64x17"]'}
    table[line.split()[0]] = line
    path = tmp_path / "config.toml"
    path.write_text("\n".join(table.values()))
    with pytest.raises(InputError, match=rf"config\.toml:\d+.*{line.split()[0]}.*{message}"):
        load_settings(DataConfig, path, [])


def test_each_clip_has_a_line_in_the_report(folder, tmp_path):
    clips, rows = find_clips(config_for(folder, trigger="ACME", windows_per_clip=2))
    assert [clip.name for clip in clips] == [row.file for row in rows] == ["a.MOV", "b.mp4", "sub/c.mkv"]
    assert [clip.captions for clip in clips] == [
        ("ACME, a blue square",),
        ("ACME, a red ball rolls", "ACME, 一个红色的球"),
        ("ACME, a green star & a moon",),
    ]
    for row in rows:
        line = row.to_json()
        assert str(tmp_path) not in line and "\n" not in line
        told = json.loads(line)
        assert set(told) == {"file", "used", "bucket", "windows", "reader", "captions", "reason"}
        assert told["used"] and told["bucket"] == "64x64x17" and len(told["windows"]) == 2 and told["reason"] is None
    assert "一个红色的球" in rows[1].to_json()


def add_faults(folder):
    """One file of each sort that cannot be used: name -> what must be said of it."""
    add_clip(folder, "no_caption.mp4", None)
    add_clip(folder, "empty_caption.mp4", " \n\n")
    add_clip(folder, "latin1.mp4").with_suffix(".txt").write_bytes(b"caf\xe9")
    add_clip(folder, "short.mp4", num_frames=10)
    add_clip(folder, "small.mp4", size=(48, 64))
    whole = add_clip(folder, "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name, content in {"zero.webm": b"", "text.avi": b"words " * 99}.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "orphan.txt").write_text("a caption")
    return {
        "no_caption.mp4": "has no caption; write one into no_caption.txt",
        "empty_caption.mp4": "empty_caption.txt is empty; describe",
        "latin1.mp4": "not UTF-8; save",
        "short.mp4": "too short: lasts 0.40 s",
        "small.mp4": "too small: 48x64 is below every bucket",
        "cut.mp4": "cut off",
        "zero.webm": "is empty (0 bytes); copy",
        "text.avi": "not a readable video",
        "orphan.txt": "without a clip; add",
    }


def test_faults_are_all_listed_at_once(folder):
    faults = add_faults(folder)
    with pytest.raises(InputError) as caught:
        find_clips(config_for(folder))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("9 of 12 files") and 'data.on_error = "skip"' in lines[-1]
    for name, message in faults.items():
        assert [line for line in lines if f"{folder / name}: " in line and message in line], name


def test_skipped_faults_are_reported_with_their_reason(folder, tmp_path):
    faults = add_faults(folder)
    clips, rows = find_clips(config_for(folder, on_error="skip"))
    assert [clip.name for clip in clips] == ["a.MOV", "b.mp4", "sub/c.mkv"]
    reasons = {row.file: row.reason for row in rows if not row.used}
    assert set(reasons) == set(faults) and len(rows) == 12
    for name, message in faults.items():
        assert message in reasons[name]
        assert str(tmp_path) not in reasons[name]


def test_nothing_left_is_an_error_even_when_faults_are_skipped(tmp_path):
    add_clip(tmp_path / "clips", "a.mp4", None)
    with pytest.raises(InputError, match=r"no clip is left of 1 files(?s:.*)a\.mp4: has no caption"):
        find_clips(config_for(tmp_path / "clips", on_error="skip"))


def test_folders_without_clips_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in {
        "absent": "no such folder; point",
        "empty": "the folder is empty; put clips",
        "notes": "holds 1 files and no video; put clips",
        "file": "is a file, not a folder; point",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            find_clips(config_for(tmp_path / name, on_error="skip"))
        assert str(tmp_path / name) in str(caught.value)


def make_clips(folder):
    add_clip(folder, "made.mp4")


def make_nothing(folder):
    pass


def make_half(folder):
    add_clip(folder, "made.mp4")
    raise KeyboardInterrupt


def test_procedural_folder_is_made_once_and_whole(tmp_path):
    folder = tmp_path / "deep" / "made"

    def source(function):
        return DataConfig(sources=[SourceConfig(path=folder, make=f"{__name__}:{function}")], buckets=["64x64x17"])

    with pytest.raises(KeyboardInterrupt):
        find_clips(source("make_half"))
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(InputError, match="without making the folder"):
        find_clips(source("make_nothing"))
    with pytest.raises(InputError, match="cannot be imported"):
        find_clips(source("make_what"))
    assert [clip.name for clip in find_clips(source("make_clips"))[0]] == ["made.mp4"]
    assert [clip.name for clip in find_clips(source("make_half"))[0]] == ["made.mp4"], "made again"
    assert list(folder.parent.iterdir()) == [folder]
