"""Every example of docs/data.md, run on data of the kind that it describes."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.samples import SampleTable
from tests.data_material import add_clip, survey_of
from wan_finetune.video import write_video

DOC = Path(__file__).resolve().parent.parent / "docs" / "data.md"
EXAMPLES = re.findall(r"```toml\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
FOUND = [1, 2, 1, 2, 1, 1, 2, 1, 2, 2, 1]
"""Clips in each example's data."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with the data of every example."""
    root = tmp_path_factory.mktemp("docs")
    clip = add_clip(root / "clips", "a.mp4", "a red ball\nein roter Ball")
    for name in ("table", "masked", "stock"):
        (root / name).mkdir()
        shutil.copy(clip, root / name / "a.mp4")
    shutil.copy(clip, root / "table" / "b.mp4")
    (root / "mixed").mkdir()
    shutil.copy(clip, root / "mixed" / "a.mp4")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(root / "mixed" / "b.png")
    for name in ("a", "b"):
        (root / "mixed" / f"{name}.txt").write_text(f"picture {name}")
    (root / "table" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "caption": "a ball"}) + "\n")
    with (root / "table" / "shots.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Filmdatei", "Beschreibung"], ["a.mp4", "ein Ball"], ["b.mp4", "noch einer"]])
    for name in ("masked", "stock"):
        (root / name / "a.txt").write_text("a ball rolls by")
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(root / "masked" / "a.mask.png")
    save_dataset(root / "saved", clip)
    (root / "shards").mkdir()
    for number in range(2):
        with tarfile.open(root / "shards" / f"{number:03d}.tar", "w") as archive:
            for name, content in (("a.mp4", clip.read_bytes()), ("a.txt", b"a ball")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (root / "footage").mkdir()
    rng = np.random.default_rng(0)
    scenes = [rng.integers(60, 255, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(2)]
    moving = [np.roll(scene, frame, axis=1) for scene in scenes for frame in range(30)]
    write_video(root / "footage" / "a.mp4", np.stack(moving), 25)
    (root / "footage" / "a.txt").write_text("patches of colour")
    return root


def save_dataset(folder, clip):
    import datasets

    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    row = {"video": [{"bytes": clip.read_bytes(), "path": "a.mp4"}], "caption": ["a ball"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(row, features=features)}).save_to_disk(folder)


def test_the_first_command_is_what_a_stranger_can_type(tmp_path):
    (command,) = re.findall(r"```sh\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "configs").symlink_to(DOC.parent.parent / "configs")
    add_clip(tmp_path / "clips", "a.mp4", "A grey wall in slow light.", size=(832, 480), num_frames=90)
    program, *arguments = shlex.split(command)
    done = subprocess.run(
        [{"python": sys.executable}[program], *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(DOC.parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 clips can be used, 0 cannot" in done.stdout and "832x480x" in done.stdout
    # Without the Hub no tokenizer: said, and everything else is done.
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("warning: captions are not counted in tokens: ")
    written = {path.name for path in (tmp_path / "data_check").iterdir()}
    assert written == {"report.html", "data_report.jsonl", "findings.json", "clips", "sheets"}


def test_the_page_has_an_example_for_each_expectation():
    assert len(EXAMPLES) == len(FOUND)


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_an_example_finds_its_clips(material, tmp_path, monkeypatch, number):
    import datasets

    def load(address, subset, *, split, revision, streaming):
        assert (address, subset, revision, streaming) == ("hf://datasets/user/name", None, "main", True)
        return datasets.load_from_disk(str(material / "saved"))[split].to_iterable_dataset()

    monkeypatch.chdir(material)
    monkeypatch.setattr(datasets, "load_dataset", load)  # the Hub is out of reach of tests
    table = tomllib.loads(EXAMPLES[number])["data"]
    config = DataConfig(**{"buckets": ["64x64x9"], "cache": tmp_path / "cache", **table})
    survey = survey_of(config, tmp_path / "data_report.jsonl")
    assert (survey.used, survey.faults) == (FOUND[number], [])
    samples = list(SampleTable(survey.samples))
    if "mask" in EXAMPLES[number]:
        assert all(sample.mask_keys for sample in samples)
    if "shots" in EXAMPLES[number] and "footage" in EXAMPLES[number]:
        assert {sample.clip for sample in samples} == {"a.mp4#1", "a.mp4#2"}
