"""`wan-finetune push` and docs/hub.md, word for word, against a Hub on loopback."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.fake_hub import FakeHub, cut_afterwards, fake_hub, status
from tests.publishable import A14B, SECRET_PLACE, write_run
from train.config import Config
from wan_finetune.cli import main, make_parser
from wan_finetune.commands.push import again
from wan_finetune.export import write_adapter_folder
from wan_finetune.formats.reading import read_all
from wan_finetune.serving.settings import ServingSettings

# huggingface_hub hands a file to its client by an argument's older name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
TOKEN = "hf_SENTINELxyzzy0123456789abcdefgh"
EXAMPLES = re.findall(r"^wan-finetune (push .*)$", PAGE, re.M)


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    """The Hub of this process, with a login."""
    with fake_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def home(tiny_base, tmp_path_factory) -> Path:
    """A folder with `runs/ember` in it."""
    folder = tmp_path_factory.mktemp("home")
    write_run(folder / "runs" / "ember", tiny_base)
    return folder


@pytest.fixture
def at_home(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def serving(monkeypatch) -> list[dict]:
    """Stand-ins for the files of a Space and an endpoint; what they were asked for."""
    asked: list[dict] = []

    def space_files(**wanted) -> dict[str, bytes]:
        asked.append(wanted)
        return {"app.py": b"print()\n", "README.md": b"---\nsdk: gradio\n---\n"}

    def endpoint_files(**wanted) -> dict[str, bytes]:
        asked.append(wanted)
        return {"handler.py": b"# /tmp is where it works\n", "requirements.txt": b"diffusers\n"}

    module = types.ModuleType("wan_finetune.serving.files")
    module.space_files, module.endpoint_files = space_files, endpoint_files  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wan_finetune.serving", types.ModuleType("wan_finetune.serving"))
    monkeypatch.setitem(sys.modules, "wan_finetune.serving.files", module)
    return asked


def test_every_example_of_the_page_runs(at_home, hub, serving, capsys):
    assert len(EXAMPLES) == 8
    for example in EXAMPLES:
        assert main(shlex.split(example, comments=True)) == 0, example
        if "--keep-card" in example:
            assert "提示词" in hub.files("acme/look")["README.md"].decode()
    assert set(hub.repositories) == {"acme/look", "acme/look-open", "acme/look-only", "acme/look-demo"}
    look = hub.repositories["acme/look"]
    assert [commit["summary"] for commit in look.commits] == [
        *["Adapter, card and samples", "Card in Chinese", "Adapter, card and samples", "Adapter, card and samples"]
    ]
    assert [commit["branch"] for commit in look.commits] == ["main", "main", "second-round", "main"]
    assert not hub.repositories["acme/look-open"].private and look.private
    assert b"license: cc-by-4.0" in hub.files("acme/look-open")["README.md"]
    assert sorted(hub.files("acme/look-only")) == [
        "README.md", "comfyui/high_noise.safetensors", "comfyui/low_noise.safetensors", "high_noise.safetensors",
        "low_noise.safetensors",
    ]  # fmt: skip
    assert hub.files("acme/look")["handler.py"] and hub.repositories["acme/look-demo"].kind == "space"
    assert serving[1] == {
        "base": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "adapter_repo": "acme/look",
        "trigger": "ember style",
        "title": "ember style",
        "examples": ["a red circle moves up in a desert.", "草地上，一个蓝色的正方形向左移动。"],
        "lang": "en",
    }
    said = capsys.readouterr()
    assert "as a secret in its settings" in said.out
    sent = b"".join(hub.bodies) + b"".join(hub.objects.values())
    for secret in (TOKEN, SECRET_PLACE, str(at_home)):
        assert secret not in said.out + said.err and secret.encode() not in sent


def test_what_is_pushed_to_be_served_is_served_as_it_was_trained(at_home, hub, tmp_path):
    """With the real files of a Space and an endpoint."""
    shutil.copytree(at_home / "runs" / "ember", tmp_path / "ember")
    config = tmp_path / "ember" / "config.toml"
    config.write_text(config.read_text().replace("[data]", '[data]\ncaption = "{caption}, {trigger}"'))
    assert (
        main(["push", str(tmp_path / "ember"), "acme/look", "--endpoint", "--space", "--space-name", "acme/demo"]) == 0
    )
    look, demo = hub.files("acme/look"), hub.files("acme/demo")
    assert {"README.md", "high_noise.safetensors", "handler.py", "requirements.txt", "settings.json"} <= look.keys()
    assert {"app.py", "README.md", "requirements.txt", "settings.json"} <= demo.keys()
    for files, adapter in ((look, ""), (demo, "acme/look")):
        settings = ServingSettings.model_validate_json(files["settings.json"])
        assert (settings.base, settings.adapter, settings.template) == (A14B, adapter, "{caption}, {trigger}")
        assert files["wan_finetune/serving/generator.py"] and not any("__pycache__" in name for name in files)
    assert len(hub.repositories["acme/look"].commits) == len(hub.repositories["acme/demo"].commits) == 1


def test_the_pages_tables_and_python_are_as_the_code_has_them(hub, capsys):
    (table,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    tables = tomllib.loads((ROOT / "configs" / "a14b.toml").read_text()) | tomllib.loads(table)
    config = Config.model_validate(tables)
    assert config.hub.repo == "acme/look" and set(tomllib.loads(table)["hub"]) == set(type(config.hub).model_fields)
    defaults = type(config.hub)()
    assert all(
        getattr(config.hub, name) == getattr(defaults, name)
        for name in ("private", "base", "language", "license", "wait_seconds")
    )
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    assert hub.files("acme/notes") == {"README.md": b"# Notes\n"}
    assert f"{hub.url}/acme/notes" in capsys.readouterr().out


def test_a_dry_run_shows_names_and_sizes_and_sends_nothing(at_home, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", "runs/ember", "acme/look", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("acme/look (private): 10 files, ") and "nothing is sent" in lines[0]
    listed = {name: int(size.replace(",", "")) for size, name in (line.split() for line in lines[1:])}
    file = at_home / "runs" / "ember" / "adapter" / "low_noise.safetensors"
    assert listed["low_noise.safetensors"] == file.stat().st_size and len(listed) == 10
    assert not hub.requests


def test_a_card_of_another_licence_than_the_files_say_is_warned_of(at_home, tmp_path, hub, capsys):
    pair = read_all(at_home / "runs" / "ember" / "adapter")
    write_adapter_folder(
        tmp_path / "look", [replace(each, about={**each.about, "licence": "apache-2.0"}) for each in pair]
    )
    for licence, warnings in (("mit", 1), ("apache-2.0", 0)):
        assert main(["push", str(tmp_path / "look"), "acme/look", "--license", licence, "--dry-run"]) == 0
        said = capsys.readouterr().err
        assert said.count("the adapter's files say apache-2.0") == warnings


def test_the_result_is_on_stdout_and_the_same_again_says_so(at_home, hub, capsys):
    assert main(["push", "runs/ember", "acme/look"]) == 0
    first = capsys.readouterr()
    assert first.out.splitlines()[-1] == f"{hub.url}/acme/look (private)" and first.err == ""
    assert main(["push", "runs/ember", "acme/look", "--public"]) == 0
    told = capsys.readouterr().out
    assert f"nothing has changed there: {hub.url}/acme/look (private)" in told and "stays so" in told
    assert len(hub.repositories["acme/look"].commits) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/ember", "look"], "'look' is no name of a repository"),
        (["runs/ember", "https://huggingface.co/acme/look"], "is no name of a repository"),
        (["runs/ember", "acme/look", "--space-name", "demo"], "--space-name: 'demo' is no name"),
        (["runs/ember", "acme/look", "--message", " "], "--message: is empty"),
        (["runs", "acme/look"], "runs: holds no adapter to push"),
        (["nowhere", "acme/look"], "nowhere: no such folder"),
    ],
)
def test_bad_input_ends_with_exit_2_before_any_network(at_home, hub, capsys, arguments, message):
    assert main(["push", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.out == ""
    assert not hub.requests


def test_no_login_and_offline_are_told_before_any_network(at_home, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", "runs/ember", "acme/look"]) == 2
    assert "not logged in to the Hub; run `hf auth login`" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", "runs/ember", "acme/look"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err and not hub.requests


def test_a_push_that_fails_keeps_the_folder_and_prints_the_command_that_works(at_home, hub, capsys):
    before = {path: path.read_bytes() for path in (at_home / "runs").rglob("*") if path.is_file()}
    hub.script["commit"] = [status(400, f"your header was: Bearer {TOKEN}")]
    with pytest.raises(SystemExit) as ended:
        main(["push", "runs/ember", "acme/look", "--lang", "zh", "--message", "It's new"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert TOKEN not in said and "the Hub answers 400 (your header was: Bearer ***)" in said
    command = re.search(r"the same again: wan-finetune (.*)", said)[1]
    assert main(shlex.split(command)) == 0
    assert hub.repositories["acme/look"].commits[0]["summary"] == "It's new"
    assert {path: path.read_bytes() for path in before} == before


def test_ctrl_c_ends_with_the_command_and_no_traceback(at_home, hub, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_finetune.hub.push", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["push", "runs/ember", "acme/look"])
    assert (
        ended.value.code == 130 and "the same again: wan-finetune push runs/ember acme/look" in capsys.readouterr().err
    )


def test_the_command_that_is_printed_means_the_same():
    line = "push a/b acme/look --public --lang zh --license mit --base x/y --branch b --message 'a b'"
    for each in (
        line,
        f"{line} --space --endpoint --keep-card",
        "push a acme/look",
        "push 'a b' acme/look --space-name acme/s",
    ):
        wanted = make_parser().parse_args(shlex.split(each))
        found = make_parser().parse_args(shlex.split(again(wanted))[1:])
        assert isinstance(found, argparse.Namespace) and vars(found) == vars(wanted)


def test_a_process_of_its_own_recognises_a_lost_answer_and_leaks_nothing(at_home, hub, tmp_path):
    """The real thing: environment, imports, clock and all."""
    hub.script["commit"] = [cut_afterwards]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "0", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "wan_finetune.cli", "push", "runs/ember", "acme/look"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(hub.repositories["acme/look"].commits) == 1
    assert (
        hub.files("acme/look")["high_noise.safetensors"]
        == Path("runs/ember/adapter/high_noise.safetensors").read_bytes()
    )
    assert re.fullmatch(r"the commit: the connection was cut; trying again in [\d.]+ s \(1 of 5 tries\)\n", done.stderr)
    for secret in (TOKEN, str(tmp_path), str(at_home), "signature"):
        assert secret not in done.stdout + done.stderr
