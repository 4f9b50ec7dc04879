"""From folders to clips: each file has its line in the report, and nothing is dropped in silence."""

import ast
import functools
import html
import importlib.util
import json
import os
import re
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.samples import SampleTable
from tests.data_material import add_clip, config_for, good_folder, prepare, survey_of
from wan_finetune.captions import clean_caption
from wan_finetune.errors import InputError
from wan_finetune.settings import load_settings
from wan_finetune.video import write_video


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('buckets = ["830x480x81"]', "multiples of 16"),
        ('buckets = ["832x480x80"]', "4n\\+1, such as 77 or 81"),
        ('buckets = ["832x480"]', "not WIDTHxHEIGHTxFRAMES"),
        ('buckets = ["64x64x17", "64x64x17"]', "twice"),
        ("buckets = []", "at least 1"),
        ('buckets = ["auto:832x480"]', "not WIDTHxHEIGHTxFRAMES"),
        ("fps = 0", "greater than 0"),
        ("caption_dropout = 1.5", "less than or equal to 1"),
        ("windows_per_clip = 0", "greater than or equal to 1"),
        ('windows = "tail"', "'head', 'centre', 'uniform'"),
        ('caption = "{trigger}"', "must hold {caption} once"),
        ('on_error = "ignore"', "'fail' or 'skip'"),
        ("sources = []", "at least 1"),
        ('sources = [{path = "x", make = "no colon"}]', "module:function"),
        ('sources = [{path = "x", dataset = "a/b"}]', "either path or dataset"),
        ('sources = [{path = "x", repeats = 2, weight = 1.0}]', "repeats or weight, not both"),
        ('sources = [{path = "x", streaming = true}]', "for a dataset of the Hub"),
        ('sources = [{path = "x", focus = [0.5, 1.5]}]', "two numbers in 0..1"),
        ('sources = [{path = "x", experts = ["high", "high"]}]', "must be"),
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


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            'sources = [{path = "x"}]\nbuckets = ["832x480x81"]\nmax_tokens = 1000',
            "bucket 832x480x81 has 32760 tokens, more than max_tokens = 1000",
        ),
        (
            'sources = [{path = "x", regularisation = true}]\nbuckets = ["64x64x1"]',
            "every source is a regularisation set; one must show the look that is to be learnt",
        ),
        (
            'sources = [{path = "x", windows_per_clip = 3}, {path = "y", windows_per_clip = 1}]\n'
            'buckets = ["64x64x1"]\nwindows = "random"',
            'windows = "random" draws among windows_per_clip windows, and of y there is only 1; set '
            "windows_per_clip to 2 or more, or leave it out",
        ),
    ],
)
def test_what_is_wrong_with_the_table_as_a_whole_is_one_line(tmp_path, lines, message):
    (tmp_path / "config.toml").write_text(lines)
    with pytest.raises(InputError) as caught:
        load_settings(DataConfig, tmp_path / "config.toml", [])
    assert str(caught.value) == f"{tmp_path / 'config.toml'}: {message}"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def report(tmp_path):
    return tmp_path / "report" / "data_report.jsonl"


@pytest.fixture(autouse=True)
def report_folder(report):
    report.parent.mkdir()


def lines_of(report):
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]


def test_each_clip_has_a_line_in_the_report(folder, cache, report, tmp_path, monkeypatch):
    monkeypatch.setattr("data.samples.ROWS_AT_ONCE", 4)  # so that the table has several parts
    survey = survey_of(config_for(folder, cache=cache, trigger="ACME", windows_per_clip=2), report)
    samples = SampleTable(survey.samples)
    assert list(samples) == [samples[index] for index in range(6)] == samples[:6]
    assert survey.used == 3 and [s.clip for s in samples][::2] == ["a.MOV", "b.mp4", "sub/c.mkv"]
    text = report.read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "一个红色的球" in text
    told = lines_of(report)
    assert [line["captions"] for line in told] == [
        ["ACME, a blue square"],
        ["ACME, a red ball rolls", "ACME, 一个红色的球"],
        ["ACME, a green star & a moon"],
    ]
    for line in told:
        assert set(line) == {
            "file", "source", "used", "bucket", "windows", "reader", "captions", "lost_area", "reason", "fault"
        }  # fmt: skip
        assert line["used"] and line["bucket"] == "64x64x17" and len(line["windows"]) == 2 and line["reason"] is None


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


def test_faults_are_all_listed_at_once_and_each_has_its_line(folder, cache, report, tmp_path):
    faults = add_faults(folder)
    with pytest.raises(InputError) as caught:
        survey_of(config_for(folder, cache=cache), report)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("9 of 12 clips") and 'data.on_error = "skip"' in lines[-1]
    reasons = {line["file"]: line["reason"] for line in lines_of(report) if not line["used"]}
    assert reasons.keys() == faults.keys() and len(lines_of(report)) == 12
    for name, message in faults.items():
        assert [line for line in lines if f"{folder / name}: " in line and message in line], name
        assert message in reasons[name] and str(tmp_path) not in reasons[name]


def test_skipping_leaves_out_one_in_twenty_and_no_more(cache, report, tmp_path):
    folder = tmp_path / "many"
    for number in range(19):
        add_clip(folder, f"{number:02d}.mp4", seed=number)
    add_clip(folder, "short.mp4", num_frames=10)
    survey = survey_of(config_for(folder, cache=cache, on_error="skip"), report)
    assert survey.used == 19 and len(survey.faults) == 1 and "short.mp4: too short" in survey.faults[0]
    add_clip(folder, "short too.mp4", num_frames=10)
    with pytest.raises(InputError, match=r"2 of 21 clips cannot be used, more than the 5%(?s:.*)short\.mp4: too short"):
        survey_of(config_for(folder, cache=cache, on_error="skip"), report)


def test_nothing_left_is_an_error_even_when_faults_are_skipped(cache, report, tmp_path):
    add_clip(tmp_path / "clips", "a.mp4", None)
    with pytest.raises(InputError, match=r"no clip is left of 1(?s:.*)a\.mp4: has no caption"):
        survey_of(config_for(tmp_path / "clips", cache=cache, on_error="skip"), report)


def test_sources_have_their_own_trigger_buckets_and_windows(folder, cache, report, tmp_path):
    add_clip(tmp_path / "real", "x.mp4", "a dog, brown", size=(128, 64))
    own = {
        "path": tmp_path / "real",
        "regularisation": True,
        "buckets": ["128x64x13"],
        "windows": "all",
        "caption": "stock footage. {caption}",
    }
    config = config_for(folder, own, cache=cache, trigger="ACME")
    samples = list(prepare(config, report))
    assert [s.source for s in samples] == [0, 0, 0, 1, 1]
    assert all(orders[0].startswith("ACME, ") for s in samples[:3] for orders in s.captions)
    assert samples[3].captions == (("stock footage. a dog, brown",),) and str(samples[3].bucket) == "128x64x13"


def test_random_windows_are_one_sample_and_shuffled_tags_are_orders_of_one_caption(cache, report, tmp_path):
    add_clip(tmp_path / "clips", "a.mp4", "red, green, blue", num_frames=100)
    changes = {"windows": "random", "windows_per_clip": 3, "shuffle_tags": True, "trigger": "ACME"}
    samples = prepare(config_for(tmp_path / "clips", cache=cache, **changes), report)
    assert len(samples) == 1 and len(samples[0].latent_keys) == len(set(samples[0].latent_keys)) == 3
    (orders,) = samples[0].captions
    assert orders[0] == "ACME, red, green, blue" and len(set(orders)) == 4
    assert {tuple(sorted(order.split(", "))) for order in orders} == {("ACME", "blue", "green", "red")}
    assert all(order.startswith("ACME, ") for order in orders)
    del changes["windows_per_clip"]
    samples = prepare(config_for(tmp_path / "clips", cache=cache, **changes), report)
    assert len(samples[0].latent_keys) == 4, "random windows are several where nothing is said"


def test_long_footage_is_split_at_its_cuts(cache, report, tmp_path):
    folder = tmp_path / "footage"
    folder.mkdir()
    rng = np.random.default_rng(0)
    scenes = [np.repeat(rng.integers(0, 255, (1, 8, 8, 3), dtype=np.uint8), 30, axis=0) for _ in range(3)]
    frames = np.concatenate(scenes).repeat(8, axis=1).repeat(8, axis=2)
    write_video(folder / "a.mp4", frames, 25)
    (folder / "a.txt").write_text("a patchwork")
    samples = prepare(config_for({"path": folder, "shots": True}, cache=cache), report)
    assert [(s.clip, s.start_seconds) for s in samples] == [
        ("a.mp4#1", (0.0,)), ("a.mp4#2", (pytest.approx(1.2),)), ("a.mp4#3", (pytest.approx(2.4),))
    ]  # fmt: skip


def test_a_start_with_known_files_opens_and_hashes_none(folder, cache, report, monkeypatch):
    for path in folder.rglob("*.*"):
        os.utime(path, (1.7e9, 1.7e9))
    config = config_for(folder, cache=cache)
    first = survey_of(config, report)
    monkeypatch.setattr("data.inspection.file_sha256", lambda path: pytest.fail(f"hashed {path}"))
    monkeypatch.setattr("wan_finetune.decoding.Decoder.inspect", lambda self, path: pytest.fail(f"opened {path}"))
    assert survey_of(config, report).samples == first.samples


def make_clips(folder):
    add_clip(folder, "made.mp4")


def test_a_procedural_folder_is_made_on_first_use(cache, report, tmp_path):
    source = {"path": tmp_path / "deep" / "made", "make": f"{__name__}:make_clips"}
    assert survey_of(config_for(source, cache=cache), report).used == 1
    made = (tmp_path / "deep" / "made" / "made.mp4").stat().st_mtime_ns
    assert survey_of(config_for(source, cache=cache), report).used == 1
    assert (tmp_path / "deep" / "made" / "made.mp4").stat().st_mtime_ns == made
