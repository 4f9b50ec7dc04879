"""Configuration: every shipped file parses, and what is wrong is named with file, line, key and remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from train.config import Config
from wan_finetune.errors import InputError
from wan_finetune.settings import load_settings, parse_override
from wan_finetune.spec import LORA_TARGETS

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_configuration_parses(path):
    load_settings(Config, path, [])


def test_the_a14b_configuration_names_every_key_that_decides_a_run():
    path = ROOT / "configs" / "a14b.toml"
    config = load_settings(Config, path, [])
    assert config.lora.targets == LORA_TARGETS and config.model.base == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    given = {line.partition("=")[0].strip(" #") for line in path.read_text().splitlines()}
    for section in ("flow", "train", "lora", "optimizer", "memory", "sampling", "data"):
        for key in type(getattr(config, section)).model_fields:
            assert key in given or key == "sources", f"{section}.{key} is not in a14b.toml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lora]\nrnk = 8\n", r"c.toml:2: unknown key lora.rnk; did you mean rank\?"),
        ("[lora]\nrank = 'many'\n", r"c.toml:2: lora.rank: .*integer.*got 'many'"),
        ("[lora]\nrank = 0\n", r"c.toml:2: lora.rank: .*greater than or equal to 1, got 0"),
        ("[data]\nbuckets = ['832x480x80']\n", r"c.toml:2: data.buckets.*80"),
        ("[sampling]\n\nnum_frames = 10\n", r"c.toml:3: sampling.num_frames: .*4n\+1"),
        ("[trian]\nx = 1\n", r"c.toml:1: unknown key trian; did you mean train\?"),
        ("[run\n", "c.toml: not valid TOML"),
        ("[lora]\nrank = 1\nrank = 2\n", "c.toml: not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_its_remedy(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_settings(Config, tmp_path / "c.toml", [])


def test_a_missing_section_is_named(tmp_path):
    (tmp_path / "c.toml").write_text("[run]\nname = 'a'\n")
    with pytest.raises(InputError, match="model is required and missing"):
        load_settings(Config, tmp_path / "c.toml", [])


def test_overrides_are_toml_and_name_themselves_when_wrong():
    path = ROOT / "configs" / "pocket.toml"
    config = load_settings(Config, path, ["lora.rank=3", "data.sources=[{path='my clips'}]", "data.trigger=acme"])
    assert config.lora.rank == 3 and config.data.trigger == "acme"
    assert [source.path for source in config.data.sources] == [Path("my clips")]
    with pytest.raises(InputError, match=r"'lora.rnk=3': unknown key lora.rnk; did you mean rank\?"):
        load_settings(Config, path, ["lora.rnk=3"])
    with pytest.raises(InputError, match=r"not section\.key=value"):
        parse_override("lora.rank")
    with pytest.raises(InputError, match="strings with spaces need quotes"):
        parse_override("data.trigger=a b")


def test_an_expert_takes_over_the_shared_tables_and_changes_what_it_names(tmp_path):
    changes = ["high.lora.rank=2", "low.lora.alpha=3", "low.flow.shift=7", "high.optimizer.schedule='constant'"]
    config = load_settings(Config, ROOT / "configs" / "pocket.toml", ["lora.dropout=0.1", *changes])
    high, low = config.expert("high"), config.expert("low")
    assert (high.lora.rank, low.lora.rank, low.lora.alpha) == (2, config.lora.rank, 3.0)
    assert high.lora.dropout == low.lora.dropout == 0.1
    assert (high.flow.shift, low.flow.shift) == (3.0, 7.0)
    assert (high.optimizer.schedule, low.optimizer.schedule) == ("constant", "cosine")
    assert high.optimizer.warmup_steps == low.optimizer.warmup_steps == 10
    # What is written down says it again, and a later change of a shared table still reaches both.
    (tmp_path / "c.toml").write_text(tomli_w.dumps(config.resolved()))
    assert load_settings(Config, tmp_path / "c.toml", []) == config
    again = load_settings(Config, tmp_path / "c.toml", ["lora.dropout=0.2"])
    assert again.expert("high").lora.dropout == again.expert("low").lora.dropout == 0.2


def test_a_mistake_in_a_shared_table_is_told_of_once():
    with pytest.raises(InputError) as raised:
        load_settings(Config, ROOT / "configs" / "pocket.toml", ["lora.rank='many'", "high.lora.rnk=3"])
    first, second = str(raised.value).splitlines()
    assert "lora.rank: " in first and "unknown key high.lora.rnk; did you mean rank?" in second


def test_an_expert_without_its_table_is_named():
    with pytest.raises(InputError, match=r"train.experts names 'single', and there is no table \[single\]"):
        load_settings(Config, ROOT / "configs" / "pocket.toml", ["train.experts=['single']"])


def trained_with(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """The trainer as a user starts it, in an empty folder."""
    return subprocess.run(
        [sys.executable, "-m", "train", "--config", str(ROOT / "configs" / "pocket.toml"), *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rnk=8"], "error: 'lora.rnk=8': unknown key lora.rnk; did you mean rank?"),
        (["model.base='/nowhere'"], "error: base model '/nowhere' is neither a folder nor a Hub repository"),
        (["model.base='nobody/nothing'"], "'nobody/nothing' could not be had from the Hub"),
        (["model.base='BASE'", "data.sources=[{path='absent'}]"], "absent: no such folder"),
        (["model.base='BASE'", "data.sources=[{path='empty'}]"], "empty: the folder is empty"),
    ],
    ids=["unknown key", "no base", "no repository", "no data", "empty data"],
)
def test_bad_input_ends_with_one_message_exit_2_and_nothing_written(tmp_path, tiny_base, overrides, message):
    (tmp_path / "empty").mkdir()
    done = trained_with(tmp_path, *[o.replace("BASE", str(tiny_base)) for o in overrides])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
