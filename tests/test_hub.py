"""Pushing against a Hub that fails: few tries, a bounded wait, one commit, equal bytes, and no token anywhere."""

import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from tests.fake_hub import (
    FakeHub,
    batch_error,
    cut,
    cut_afterwards,
    cut_midway,
    drip,
    fake_hub,
    silent_server,
    stall,
    status,
    truncated,
)
from tests.fork_server import fork
from tests.hub_child import push_by_xet
from wan_finetune.errors import InputError
from wan_finetune.hub import Pushed, Target, push, quiet_hub, require_repo_name
from wan_finetune.hub_patience import Patience, PushError, Unsettled, persevere

# huggingface_hub hands a file to its client by an argument's older name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_SENTINELxyzzy0123456789abcdefgh"
QUICK = Patience(stall_seconds=0.4, answer_seconds=0.4)
HASTY = ["info", "create", "card", "preupload", "batch", "put", "verify", "commit"]


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with fake_hub() as server:
        yield server


@pytest.fixture
def files(tmp_path) -> dict[str, Path | bytes]:
    """Two large files and two small ones."""
    found: dict[str, Path | bytes] = {
        "README.md": b"---\nlicense: apache-2.0\n---\n# A card\n",
        "evaluation.json": b"{}",
    }
    for name in ("high_noise", "low_noise"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(random.Random(name).randbytes(200_000))
        found[path.name] = path
    return found


class Waits:
    """A clock that does not wait: how long each pause would have been."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.pauses.append(seconds)


def send(hub: FakeHub, files, *, waits: Waits | None = None, told: list[str] | None = None, **target) -> Pushed:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    told = [] if told is None else told
    return push(
        Target(**{"name": "acme/look", **target}),
        files,
        message="Adapter",
        is_ours=lambda name: name.startswith("samples/") or name.endswith(".safetensors"),
        api=api,
        patience=QUICK,
        tell=told.append,
        sleep=waits or Waits(),
    )


def contents(files) -> dict[str, bytes]:
    return {name: each if isinstance(each, bytes) else each.read_bytes() for name, each in files.items()}


def test_a_push_is_one_commit_into_a_private_repository_bit_by_bit(hub, files):
    done = send(hub, files)
    repository = hub.repositories["acme/look"]
    assert repository.private and done.is_private and done.is_new
    assert done.url == f"{hub.url}/acme/look"
    assert [commit["summary"] for commit in repository.commits] == ["Adapter"]
    assert hub.files("acme/look") == contents(files)
    assert done.commit == repository.heads["main"]
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in b"".join(hub.bodies)


FAULTS = {
    "429 with Retry-After on the commit": {"commit": [status(429, Retry_After="7")]},
    "500 on the commit": {"commit": [status(500)]},
    "502 on the commit, twice": {"commit": [status(502)] * 2},
    "503 where files go": {"batch": [status(503)]},
    "504 on a file": {"put": [status(504)]},
    "503 on the card's check": {"card": [status(503)]},
    "cut before the commit": {"commit": [cut]},
    "cut after the commit": {"commit": [cut_afterwards]},
    "truncated answer to the commit": {"commit": [truncated]},
    "cut in the middle of a file": {"put": [cut_midway]},
    "stall of the commit": {"commit": [stall]},
    "stall of a file": {"put": [stall]},
    "drip of the answer": {"preupload": [drip]},
    "an error of the storage": {"batch": [batch_error]},
    "an expired address of the storage": {"put": [status(403)]},
    "412 on the commit": {"commit": [status(412)]},
    "409 on the commit": {"commit": [status(409)]},
    "409 while creating, busy": {
        "create": [status(409, "Cannot create repo: another conflicting operation is in progress")]
    },
    "created, and the answer is lost": {"create": [cut_afterwards]},
    "a fault of each kind": {"create": [status(500)], "preupload": [cut], "put": [status(503)], "commit": [truncated]},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_no_file_and_makes_no_second_commit(hub, files, name):
    hub.script.update({route: list(faults) for route, faults in FAULTS[name].items()})
    waits, told = Waits(), []
    done = send(hub, files, waits=waits, told=told)
    assert hub.files("acme/look") == contents(files)
    assert len(hub.repositories["acme/look"].commits) == 1
    assert done.commit == hub.repositories["acme/look"].heads["main"]
    assert all(not script for script in hub.script.values()), "the fault was not met"
    assert 1 <= len(told) == len(waits.pauses) <= 4 and sum(waits.pauses) <= 120
    assert hub.requests["commit"] <= 5 and hub.requests["put"] <= 2 * 5
    if "Retry-After" in name:
        assert 7 <= waits.pauses[0] <= 8
    for line in told:
        assert TOKEN not in line and "http" not in line and "secret" not in line and hub.url not in line


FOR_GOOD = {
    "500 for ever": ({"commit": [status(500)] * 99}, "the commit: the Hub answers 500; tried 5 times"),
    "stall for ever": ({"commit": [stall] * 99}, "the commit: nothing came for too long; tried 5 times"),
    "cut for ever": ({"put": [cut_midway] * 99}, "sending a file: the connection was cut; tried 5 times"),
    "a long Retry-After": (
        {"commit": [status(429, Retry_After="3600")] * 9},
        "tried 1 times, and the Hub asks to wait 360",
    ),
    "401": ({"info": [status(401)] * 9}, r"does not know this login \(401\): .* `hf auth login`"),
    "401 on the commit": ({"commit": [status(401)] * 9}, r"does not know this login \(401\)"),
    "403 on creating": ({"create": [status(403)] * 9}, r"may not write to acme/look \(403\): .*write role for acme"),
    "403 on the commit": ({"commit": [status(403)] * 9}, r"may not write to acme/look \(403\)"),
    "404 of the namespace": ({"create": [status(404)] * 9}, "acme/look was not found.*`hf auth whoami`"),
    "exists, and is not seen": ({"create": [status(409)] * 9}, "can neither be seen nor made"),
    "402": ({"commit": [status(402, "storage")] * 9}, "asks for a payment \\(storage\\)"),
    "400": ({"commit": [status(400, "bad card")] * 9}, "the Hub answers 400 \\(bad card\\)"),
}
AT_ONCE = ("401", "401 on the commit", "403 on creating", "403 on the commit", "404 of the namespace", "402", "400")


@pytest.mark.parametrize("name", FOR_GOOD)
def test_a_fault_that_stays_ends_in_few_tries_with_a_remedy(hub, files, name):
    script, message = FOR_GOOD[name]
    hub.script.update({route: list(faults) for route, faults in script.items()})
    waits, told = Waits(), []
    with pytest.raises(PushError, match=message):
        send(hub, files, waits=waits, told=told)
    # Two files are sent in a try, and the repository is looked at once more when it has been made.
    most = {"put": 10, "info": 6}
    assert all(hub.requests[route] <= most.get(route, 5) for route in HASTY)
    assert sum(waits.pauses) <= 120
    if name in AT_ONCE:
        assert hub.requests[next(iter(script))] == 1 and not waits.pauses
    assert not hub.repositories or not hub.repositories["acme/look"].commits
    assert all(each.exists() for each in files.values() if isinstance(each, Path))


def test_nobody_listening_and_no_such_host_end_as_well(hub, files):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = FakeHub(url=f"http://127.0.0.1:{free.getsockname()[1]}")
        for server in (nowhere, FakeHub(url="http://no-such-host.invalid")):
            with pytest.raises(PushError, match="asking for the repository: no connection; tried 5 times"):
                send(server, files)


def test_the_same_again_makes_no_commit_and_a_change_makes_one(hub, files):
    first = send(hub, files)
    sent = hub.requests["put"]
    again = send(hub, files)
    assert not again.is_new and again.commit == first.commit and hub.requests["put"] == sent
    assert len(hub.repositories["acme/look"].commits) == 1
    changed = {**files, "README.md": b"---\nlicense: mit\n---\n# Another\n"}
    assert send(hub, changed).is_new and len(hub.repositories["acme/look"].commits) == 2
    assert hub.requests["put"] == sent and hub.files("acme/look") == contents(changed)


def test_what_an_earlier_push_left_goes_and_what_others_put_there_stays(hub, files):
    send(hub, {**files, "samples/00-0-adapter.mp4": b"clip"})
    hub.repositories["acme/look"].branches["main"]["notes.txt"] = b"by hand"
    send(hub, files)
    assert hub.files("acme/look") == {**contents(files), "notes.txt": b"by hand"}
    assert len(hub.repositories["acme/look"].commits) == 2


def test_a_commit_that_comes_between_is_built_upon(hub, files):
    hub.add("acme/look")

    def somebody_commits(handler):
        repository = hub.repositories["acme/look"]
        repository.branches["main"]["notes.txt"], repository.heads["main"] = b"theirs", "f" * 40

    hub.script["preupload"] = [somebody_commits]
    told: list[str] = []
    send(hub, files, told=told)
    assert "another commit came between" in told[0]
    assert hub.files("acme/look") == {**contents(files), "notes.txt": b"theirs"}


def test_a_public_repository_takes_nothing_unless_that_is_said(hub, files):
    hub.add("acme/look", private=False)
    with pytest.raises(InputError, match=r"acme/look is public on the Hub.*--public"):
        send(hub, files)
    assert not hub.requests["preupload"] and not hub.objects
    assert not send(hub, files, private=False).is_private
    assert not send(hub, files, name="acme/open", private=False).is_private


def test_a_branch_is_made_and_a_space_is_a_gradio_one(hub, files):
    done = send(hub, files, branch="round-2")
    assert hub.files("acme/look", "round-2") == contents(files) and hub.files("acme/look") == {}
    assert not send(hub, files, branch="round-2").is_new and done.is_new
    space = send(hub, {"app.py": b"print()"}, name="acme/demo", kind="space")
    assert space.url == f"{hub.url}/spaces/acme/demo" and hub.repositories["acme/demo"].kind == "space"


@pytest.mark.parametrize(
    "name", ["look", "acme/look/more", "acme/", "/look", "a b/look", "acme/lo..ok", "acme/look.git"]
)
def test_a_name_that_cannot_be_is_told_before_any_network(name):
    with pytest.raises(InputError, match=r"is no name of a repository.*user/repo"):
        require_repo_name(name)


def test_no_series_of_faults_waits_longer_than_its_limit():
    """Pauses and failed requests together, with the limits that users have."""
    random_source, patience = random.Random(0), Patience()
    for _ in range(2000):
        now = 0.0

        def attempt(seconds_left: float) -> None:
            nonlocal now
            stalled = min(seconds_left, random_source.choice([0.0, 1.0, patience.stall_seconds]))
            now += stalled
            asked = random_source.choice([None, None, 5.0, 30.0, 600.0])
            raise Unsettled("x", idle_seconds=stalled, retry_after_seconds=asked)

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        tries: list[str] = []
        with pytest.raises(PushError):
            persevere(attempt, patience, tries.append, sleep, random_source.random)
        assert now <= patience.seconds and len(tries) < patience.tries


def test_bars_are_for_a_person_who_watches(monkeypatch):
    # The tests' own environment turns them off for good.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    enable_progress_bars()
    for watched in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda seen=watched: seen)
        with quiet_hub():
            assert are_progress_bars_disabled() is not watched
        assert not are_progress_bars_disabled()


def test_the_client_of_others_comes_back_comes_back(hub, files):
    send(hub, files)
    assert type(huggingface_hub.get_session()).__name__ == "Client"


@pytest.mark.parametrize("storage", ["gives no leave for now", "is not there", "is silent"])
def test_where_xet_fails_files_go_without_it_in_bounded_time(hub, tmp_path, storage):
    """hf_xet's own client, which is not ours: it alone goes on for minutes."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "low_noise.safetensors").write_bytes(random.Random(0).randbytes(200_000))
    if storage == "gives no leave for now":
        hub.script["xet"] = [status(500)] * 99
    began = time.monotonic()
    with silent_server() as silence:
        if storage == "is silent":
            hub.xet_url = silence
        child = fork(push_by_xet, hub.url, TOKEN, folder, log=tmp_path / "log", environment={"HF_HOME": str(tmp_path)})
        assert child.wait(60) == 0, child.output
    assert "sending files by Xet failed, the next try goes without it" in child.output
    assert hub.files("acme/look") == {"low_noise.safetensors": (folder / "low_noise.safetensors").read_bytes()}
    assert hub.requests["xet"] <= 2 and len(hub.repositories["acme/look"].commits) == 1
    assert time.monotonic() - began < 50 and TOKEN not in child.output


@pytest.mark.parametrize("code", [401, 403])
def test_where_xet_is_refused_the_login_is_told_at_once(hub, tmp_path, code):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "low_noise.safetensors").write_bytes(b"x" * 20_000)
    hub.script["xet"] = [status(code)] * 99
    child = fork(push_by_xet, hub.url, TOKEN, folder, log=tmp_path / "log", environment={"HF_HOME": str(tmp_path)})
    assert child.wait(60) == 1
    assert f"({code}): " in child.output and "hf auth login" in child.output and TOKEN not in child.output
    assert hub.requests["xet"] == 1 and not hub.requests["commit"]
