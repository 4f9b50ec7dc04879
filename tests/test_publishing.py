"""Pushing beside the training: the run ends as without it, whatever the Hub does, and says what came of it."""

import re
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.child_runs import start
from tests.fake_hub import FakeHub, fake_hub, stall, status
from tests.faulty_training import Fault
from tests.publishable import write_run
from tests.tiny_runs import same, train
from train.config import Config
from train.job import make_adapter, train_experts
from train.publishing import Publisher, write_card
from wan_finetune.errors import InputError
from wan_finetune.formats.reading import read_file

TOKEN = "hf_SENTINELxyzzy0123456789abcdefgh"
ASKED = ["hub.repo=acme/look", "hub.push=end"]


@pytest.fixture
def environment(monkeypatch) -> Callable[[str], dict[str, str]]:
    """Of a process that finds a Hub at an address, and has a login."""

    def at(url: str) -> dict[str, str]:
        found = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        return found

    return at


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture
def finished(tiny_base, make_config) -> Callable[..., Publisher]:
    """A publisher of a finished run."""

    def of(*overrides: str) -> Publisher:
        config = make_config("run.name=ember", *ASKED, *overrides)
        write_run(config.run_folder, tiny_base)
        return Publisher(config, make_adapter, True)

    return of


def nobody() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def command_in(text: str) -> list[str]:
    """The command that a message tells."""
    return shlex.split(re.search(r"[Bb]y hand: (wan-finetune push .*)", text)[1])


def test_a_whole_job_pushes_after_rounds_and_at_the_end(make_config, hub, environment):
    config = make_config("hub.push=rounds", "hub.repo=acme/look", "hub.wait_seconds=60")
    child = start(config, Fault(whole_job=True), environment(hub.url))
    assert child.wait() == 0, child.output
    repository, sent = hub.repositories["acme/look"], hub.files("acme/look")
    told = [commit["summary"] for commit in repository.commits]
    assert told[-1] == "Adapter, card and samples"
    # The run is over in a second or two, which may be before its first push has sent anything.
    ended = "the Hub: the push on the way is ended" in child.output
    assert ended or told[0] == "Adapters as they stand (high step 2, low step 2)"
    assert len(told) <= 2
    run = config.run_folder
    for name in ("high_noise.safetensors", "low_noise.safetensors"):
        assert sent[name] == (run / "adapter" / name).read_bytes()
        assert sent[f"comfyui/{name}"] == (run / "adapter" / "comfyui" / name).read_bytes()
    assert sent["samples/00-0-base.mp4"] == (run / "samples" / "final" / "base" / "00-0-base.mp4").read_bytes()
    assert repository.private and f"the Hub: {hub.url}/acme/look (private)" in child.output
    card = (run / "adapter" / "README.md").read_text()
    assert "(../samples" not in card and 'src="../samples/final/base/00-0-base.mp4"' in card
    assert 'adapter = "."' in card and 'adapter = "acme/look"' in sent["README.md"].decode()
    assert not (run / "hub").exists()
    for text in (child.output, card, sent["README.md"].decode(), (run / "hub.log").read_text()):
        assert TOKEN not in text
    assert str(run) not in sent["README.md"].decode() + card


def test_a_whole_job_without_a_hub_ends_as_well_and_tells_the_command(make_config, environment):
    config = make_config(*ASKED, "hub.wait_seconds=1")
    child = start(config, Fault(whole_job=True), environment(nobody()))
    assert child.wait() == 0, child.output
    assert command_in(child.output)[2:4] == [str(config.run_folder), "acme/look"]
    assert (config.run_folder / "adapter" / "low_noise.safetensors").is_file()
    assert (config.run_folder / "report.html").is_file()


def test_a_refused_push_tells_remedy_and_command_and_the_command_works(finished, hub, environment, capsys):
    environment(hub.url)
    publisher = finished()
    hub.script["commit"] = [status(403)]
    publisher.finish()
    told = capsys.readouterr().out
    assert "may not write to acme/look (403): run `hf auth login`" in told and TOKEN not in told
    assert hub.requests["commit"] == 1 and not hub.repositories["acme/look"].commits
    assert command_in(told)[1:4] == ["push", str(publisher.config.run_folder), "acme/look"]
    publisher.finish()
    assert "(private)" in capsys.readouterr().out and len(hub.repositories["acme/look"].commits) == 1


def test_a_hub_that_does_not_answer_holds_no_run_up(finished, hub, environment, capsys):
    environment(hub.url)
    publisher = finished("hub.wait_seconds=4")
    hub.script["preupload"] = [stall] * 9
    before = threading.active_count()
    publisher.finish()
    told = capsys.readouterr().out
    assert re.search(r"not done after [45] s and ended; the run is whole", told) and command_in(told)
    assert publisher.child is None and threading.active_count() <= before + 2


def test_a_log_that_is_gone_fails_no_run(finished, hub, environment, capsys, monkeypatch):
    environment(hub.url)
    publisher = finished()
    start = Publisher.start

    def start_and_lose(self, folder: Path, message: str) -> None:
        start(self, folder, message)
        self.log.unlink()

    monkeypatch.setattr(Publisher, "start", start_and_lose)
    publisher.finish()
    told = capsys.readouterr().out
    assert "what came of the push is not known" in told and command_in(told) and hub.repositories["acme/look"].commits


def test_no_push_outlives_a_run_that_fails_after_its_training(finished, hub, environment, monkeypatch):
    environment(hub.url)
    hub.script["preupload"] = [stall] * 9
    at_the_end: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_the_end.append)
    with finished() as publisher:
        publisher.start(publisher.config.run_folder, "Adapters as they stand")
    child = publisher.child
    assert child is not None and child.poll() is None
    for end in at_the_end:
        end()
    assert child.poll() is not None


def test_training_is_the_same_with_pushes_that_fail(make_config, environment, capsys):
    environment(nobody())
    plain = train(make_config("run.name=plain"))
    config = make_config("run.name=pushed", "hub.repo=acme/look", "hub.push=rounds")
    pushed = train_with(config)
    assert same(plain["high"], pushed["high"]) and same(plain["low"], pushed["low"])
    held = read_file(config.run_folder / "hub" / "high_noise.safetensors")
    assert held.about["steps"] == "2" and capsys.readouterr().out


def test_the_best_states_are_pushed_not_the_last_ones(make_config, environment, capsys, monkeypatch):
    """The low expert's loss rises at its last validation; what is pushed of it is the state before."""
    environment(nobody())
    config = make_config(
        "run.name=best", "hub.repo=acme/look", "hub.push=best", "validation.every_steps=1", "train.round_steps=4"
    )
    started: list[dict[str, str]] = []

    def note(publisher: Publisher, folder: Path, message: str) -> None:
        files = sorted(folder.glob("*.safetensors"))
        started.append({file.name: read_file(file).about["steps"] for file in files} | {"message": message})

    monkeypatch.setattr(Publisher, "start", note)
    losses = iter([9.0, 3.0, 2.0, 1.5, 1.0, 9.0, 3.0, 1.0, 2.0, 2.5])

    def measure(self, trainer):
        found = original(self, trainer)
        changed = replace(found, loss=next(losses))
        self.done[-1] = changed
        return changed

    from train.validation import Validation

    original = Validation.measure
    monkeypatch.setattr(Validation, "measure", measure)
    train_with(config)
    assert [each.get("low_noise.safetensors") for each in started] == [None, "2"]
    assert started[-1]["high_noise.safetensors"] == "4"
    assert started[-1]["message"] == "Lowest held-out loss so far: low (high step 4, low step 2)"


def train_with(config: Config):
    """Training as the job does it."""
    from train.engine import make_accelerator
    from train.preparing import prepare_data
    from train.signals import StopRequest
    from train.tracking import Metrics
    from wan_finetune.experts import base_folder

    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    publisher = Publisher(config, make_adapter, True)
    with publisher:
        states = train_experts(
            config, base_folder(config.model.base), data, Metrics(config, accelerator), accelerator, StopRequest(),
            publisher,
        )  # fmt: skip
    publisher.end_child()
    return states


def test_without_a_login_the_run_says_so_at_its_start(finished, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with finished():
        pass
    assert "The run goes on, and will try" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hub.push=end"], r'push = "end" needs repo = "user/repo"'),
        (["hub.push=end", "hub.repo=look"], r"hub\.repo: 'look' is no name of a repository"),
        (["hub.token=hf_x"], r"unknown key hub\.token"),
    ],
)
def test_a_table_that_cannot_be_is_told_before_the_run(make_config, overrides, message):
    with pytest.raises(InputError, match=message):
        make_config(*overrides)


def test_the_card_is_written_before_there_are_samples(tiny_base, make_config):
    config = make_config("run.name=early", "hub.language=zh")
    write_run(config.run_folder, tiny_base)
    for part in ("samples/final/adapter/manifest.json", "evaluation.json", "validation.jsonl"):
        (config.run_folder / part).unlink()
    card = write_card(config).read_text()
    assert "num_inference_steps=2" in card and "<video" not in card and "提示词" in card
