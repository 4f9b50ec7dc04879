"""docs/training.md: its figures are the planner's, its examples parse, and what it names is there."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from train.config import Config
from train.plan import main
from wan_finetune.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) GiB \| (.*?) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)
BUCKETS = ("832x480x33", "832x480x81")


def planned(capsys, card: str, settings: str, *overrides: str) -> dict[str, tuple[float, bool]]:
    changes = [f"memory.{part}" for part in re.findall(r"`([^`]+)`", settings)]
    path = str(ROOT / "configs" / "a14b.toml")
    overrides = overrides or (f"data.buckets={list(BUCKETS)}",)
    main(["--config", path, "--gpu", f"{card}GiB", "--json", *overrides, *changes])
    steps = json.loads(capsys.readouterr().out)["steps"]
    return {step["bucket"]: (round(step["peak_bytes"] / 2**30, 1), step["fits"]) for step in steps}


def test_the_page_has_a_row_for_every_usual_card():
    assert {card for card, *_ in ROWS} == {"16", "24", "48", "80"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_memory_of_each_recipe_is_what_the_planner_says(row, capsys):
    card, settings, short, long = row
    found = planned(capsys, card, settings)
    assert [found[bucket][0] for bucket in BUCKETS] == [float(short), float(long)]
    assert found[BUCKETS[0]][1], "a recipe that does not fit its card"


def test_the_memory_of_720p_and_of_the_shipped_configuration_is_what_the_planner_says(capsys):
    streamed, offloaded, plain = re.findall(r"1280x720x81 needs ([\d.]+) GiB .*?, ([\d.]+) .*?, ([\d.]+) ", PAGE, re.S)[
        0
    ]
    large = ('data.buckets=["1280x720x81"]', "data.max_tokens=80000")
    parked = '`checkpointing = "offloaded"`'
    for settings, said in ((f"`stream_blocks = 40`, {parked}", streamed), (parked, offloaded), ("", plain)):
        assert planned(capsys, "80", settings, *large) == {"1280x720x81": (float(said), True)}
    text = (ROOT / "configs" / "a14b.toml").read_text(encoding="utf-8")
    (said,) = re.findall(r"activations: ([\d.]+) GiB in all, by `train.plan`", text)
    assert max(planned(capsys, "80", "", "run.seed=0").values()) == (float(said), True)


def test_examples_are_tables_of_the_configuration(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    tables = tomllib.loads((ROOT / "configs" / "a14b.toml").read_text())
    tables |= tomllib.loads(example)
    config = Config.model_validate(tables)
    assert (config.expert("high").lora.rank, config.expert("low").lora.rank) == (16, 32)


def test_every_link_and_every_key_is_there():
    for link in re.findall(r"\]\(([\w.]+)\)", PAGE):
        assert (ROOT / "docs" / link).is_file(), link
    for table, key in re.findall(r"`(train|validation|flow|lora|optimizer|memory|tracking)\.(\w+)", PAGE):
        fields = type(getattr(load_settings(Config, ROOT / "configs" / "pocket.toml", []), table)).model_fields
        assert key in fields or f"{table}.{key}" in ("train.plan", "validation.jsonl"), f"{table}.{key}"
