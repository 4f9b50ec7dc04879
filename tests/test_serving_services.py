"""The endpoint as its service calls it, the local server over HTTP and its container, and docs/serving.md."""

import asyncio
import base64
import json
import re
import shlex
import signal
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.fork_server import wait_for
from tests.served import RED, SAMPLING, call_endpoint, free_port, lay_out, run_server, start
from tests.serving_fixtures import BASE, adapter, classifier, generator, settings
from wan_finetune.experts import HIGH, LOW
from wan_finetune.safety import FRAME_SWITCH, PROMPT_SWITCH, TERMS_FILE, SafetySettings
from wan_finetune.serving.asking import GenerationRequest
from wan_finetune.serving.files import endpoint_files
from wan_finetune.serving.server import BODY_SECONDS, MAX_BODY_BYTES, Service, make_parser
from wan_finetune.serving.settings import ENVIRONMENT, ServingSettings
from wan_finetune.video import read_video

__all__ = ["adapter", "classifier", "generator", "settings"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent


def test_the_endpoint_answers_as_its_service_calls_it(tiny_base, adapter, classifier, generator, tmp_path):
    folder = lay_out(tmp_path / "repository", endpoint_files(base=BASE))
    for expert in (HIGH, LOW):
        (folder / expert.file_name).write_bytes((adapter / expert.file_name).read_bytes())
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "sampling": SAMPLING}))
    bodies = [
        {"inputs": RED["prompt"], "parameters": {"seed": 7, "compare": True}},
        {"inputs": RED["prompt"], "parameters": {"seed": 7, "strength_high": 0.5, "strength_low": 1.5}},
        {"inputs": "一个裸体的人"},
        {"inputs": "a", "parameters": {"width": 65}},
        {"inputs": "a", "parameters": {"prompt": "porn"}},
        {"inputs": ["a"]},
        {"inputs": "a", "parameters": [1]},
        {"inputs": "a", "seed": 3},
        "a",
    ]
    (tmp_path / "app").mkdir()
    out = tmp_path / "app" / "answers.json"
    environment = {"WAN_FINETUNE_BASE": str(tiny_base), FRAME_SWITCH: str(classifier)}
    child = start(call_endpoint, folder, bodies, out, log=tmp_path / "log", environment=environment)
    assert child.wait() == 0 and "ANOTHER HOST" not in child.output, child.output
    answers = json.loads(out.read_text(encoding="utf-8"))
    assert [status for status, _ in answers] == [200, 200, *[400] * 7], answers
    first, second = answers[0][1], answers[1][1]
    here = generator.generate({**RED, "compare": True})
    assert base64.b64decode(first["video"]) == here.video and base64.b64decode(first["base_video"]) == here.base_video
    assert second["video"] != first["video"] and "base_video" not in second
    assert (first["content_type"], first["seed"], first["settings"]["shift"]) == ("video/mp4", 7, 5.0)
    assert first["settings"]["prompt"] == here.prompt
    expected = (
        "sexual",
        "multiple of 16",
        "goes into inputs",
        "inputs must be",
        "parameters must be",
        "'seed'",
        "JSON",
    )
    for (_, answer), words in zip(answers[2:], expected, strict=True):
        assert words in answer["error"] and str(tmp_path) not in json.dumps(answer)


class Served:
    """A server in a child, as the Dockerfile starts it."""

    def __init__(self, port, child):
        self.url, self.child = f"http://127.0.0.1:{port}", child

    def ask(self, body, path="/", content_type="application/json", **headers):
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"content-type": content_type, **headers} if body is not None else headers
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def health(self):
        try:
            return self.ask(None, "/health")[0]
        except (urllib.error.URLError, ConnectionError):
            return None


def docker_lines(instruction):
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(f"{instruction} ")]


@pytest.fixture(scope="module")
def served(tiny_base, adapter, classifier, tmp_path_factory):
    root = tmp_path_factory.mktemp("container")
    for line in docker_lines("COPY"):
        for name in line.split()[:-1]:
            source = ROOT / name
            files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
            kept = [path for path in files if path.suffix not in (".pyc", ".safetensors")]
            lay_out(root / "app", {str(path.relative_to(ROOT)): path.read_bytes() for path in kept})
    lay_out(root / "repository", {e.file_name: (adapter / e.file_name).read_bytes() for e in (HIGH, LOW)})
    (root / "repository" / "settings.json").write_text(json.dumps({"sampling": SAMPLING}))
    port = free_port()
    command = json.loads(docker_lines("CMD")[0])
    assert command[:3] == ["python", "-m", "wan_finetune.serving.server"]
    changes = {"/repository": str(root / "repository"), "0.0.0.0": "127.0.0.1", "7861": str(port)}
    arguments = [changes.get(word, word) for word in command[3:]]
    environment = {"WAN_FINETUNE_BASE": str(tiny_base), FRAME_SWITCH: str(classifier)}
    child = start(run_server, root / "app", arguments, log=root / "log", environment=environment)
    server = Served(port, child)
    try:
        wait_for(lambda: server.health() is not None, "server")
        early = server.ask({"inputs": "a"}) if server.health() == 503 else None
        wait_for(lambda: server.health() == 200, "loaded model")
        server.early = early
        yield server
    finally:
        child.kill()


def test_the_server_says_that_it_is_not_ready_yet(served):
    if served.early is not None:  # Loading takes a second or two; a machine that stops in it finds it done.
        status, headers, body = served.early
        assert status == 503 and int(headers["retry-after"]) > 0 and b"still being loaded" in body


def test_the_server_makes_the_clip_that_the_generator_makes(served, generator, tmp_path):
    body = {"inputs": RED["prompt"], "parameters": {"seed": 7}}
    status, headers, content = served.ask(body)
    assert status == 200 and headers["content-type"] == "application/json" and "server" not in headers
    answer = json.loads(content)
    assert base64.b64decode(answer["video"]) == generator.generate(RED).video and answer["seed"] == 7
    status, headers, content = served.ask(body, "/predict", accept="video/mp4")
    assert (status, headers["content-type"], headers["x-seed"]) == (200, "video/mp4", "7")
    (tmp_path / "a.mp4").write_bytes(content)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == (5, 32, 64, 3) and fps == pytest.approx(16) and np.ptp(frames) > 0


@pytest.mark.parametrize(
    ("body", "more", "status", "words"),
    [
        (b"{", {}, 422, "not valid JSON"),
        (b"", {}, 422, "not valid JSON"),
        (b"\xff\xfe", {}, 422, "not valid JSON"),
        (b"[" * 60_000, {}, 422, "not valid JSON"),
        (b'{"inputs": "' + b"x" * MAX_BODY_BYTES + b'"}', {}, 413, "at most 65536 bytes"),
        ({"inputs": "a"}, {"content_type": "text/plain"}, 415, "application/json"),
        ({"inputs": "a nude woman"}, {}, 422, "sexual"),
        ({"inputs": "a", "parameters": {"num_frames": 4}}, {}, 422, "4n+1"),
        ({"inputs": "a", "parameters": {"steps": 10**30}}, {}, 422, "steps"),
        ({"prompt": "a"}, {}, 422, "unknown key 'prompt'"),
        (None, {}, 405, ""),
        (None, {"path": "/../etc/passwd"}, 404, ""),
    ],
)
def test_the_server_refuses_what_it_cannot_do(served, body, more, status, words):
    got, _, content = served.ask(body, **more)
    assert got == status and words in content.decode()
    if words == "sexual":
        assert json.loads(content)["category"] == "sexual"


def test_one_request_waits_and_others_are_turned_away(served):
    long = {"inputs": "a red circle", "parameters": {"seed": 1, "steps": 50, "num_frames": 17}}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(served.ask, long) for _ in range(6)]
        wait_for(lambda: any(each.done() for each in asked), "answer")
        assert served.health() == 200, "the server answers while it makes a clip"
        answers = [each.result() for each in asked]
    made = [json.loads(content)["video"] for status, _, content in answers if status == 200]
    refused = [(headers, content) for status, headers, content in answers if status == 429]
    assert len(made) >= 2 and len(refused) >= 1 and len(made) + len(refused) == 6
    assert len(set(made)) == 1
    assert all(int(headers["retry-after"]) > 0 and b"try again later" in content for headers, content in refused)
    assert served.ask({"inputs": "a", "parameters": {"steps": 1}})[0] == 200, "the queue is empty again"


def test_whatever_keeps_the_model_from_loading_ends_the_server():
    failures = []

    def fail():
        raise RuntimeError("no space left")

    async def opened():
        service = Service(fail, failures.append)
        await service.open()
        return service.handler

    assert asyncio.run(opened()) is None and str(failures[0]) == "no space left"


def test_a_server_without_its_filter_ends_with_a_message(tiny_base, adapter, tmp_path):
    environment = {"WAN_FINETUNE_BASE": str(tiny_base), FRAME_SWITCH: "no/such-classifier"}
    arguments = ["--folder", str(adapter), "--port", str(free_port())]
    child = start(run_server, ROOT, arguments, log=tmp_path / "log", environment=environment)
    assert child.wait() == 2 and "error: the safety filter's image classifier" in child.output


def test_the_container_lets_this_machine_in_alone_and_runs_as_nobody_special():
    import yaml

    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["wan"]
    assert compose["ports"] == ["127.0.0.1:7861:7861"] and "FRAME_FILTER" not in str(compose.get("command"))
    switches = {PROMPT_SWITCH, FRAME_SWITCH, TERMS_FILE, ENVIRONMENT["base"], ENVIRONMENT["trigger"]}
    assert switches <= compose["environment"].keys(), "set in the shell, and without effect"
    assert docker_lines("USER") == ["serve"] and docker_lines("EXPOSE") == ["7861"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {name for line in docker_lines("COPY") for name in line.split()[:-1]}
    assert "*" in ignored and {name for name in ignored if name.startswith("!")} == {f"!{name}" for name in copied}
    assert not docker_lines("ADD") and ":latest" not in docker_lines("FROM")[0] and ":" in docker_lines("FROM")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert '".[serve]"' in docker_lines("RUN")[0] and {"starlette", "uvicorn"} == {
        re.split("[<>=]", line)[0] for line in extras["serve"]
    }


PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def examples(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def test_the_pages_settings_are_settings():
    (text,) = examples("json")
    settings = ServingSettings.model_validate_json(text)
    assert (settings.sampling.num_frames, settings.safety.threshold, settings.limits.pixels) == (81, 0.4, 1280 * 720)


def test_the_pages_programs_run(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    client, endpoint, space = examples("python")
    exec(compile(client.replace("http://127.0.0.1:7861", served.url), "client", "exec"), {})
    assert capsys.readouterr().out.split() == ["7", "2"]
    assert read_video(tmp_path / "clip.mp4")[0].shape == (5, 32, 64, 3)
    exec(compile(endpoint, "endpoint", "exec"), {})
    exec(compile(space, "space", "exec"), {})
    assert (tmp_path / "repository" / "handler.py").is_file() and (tmp_path / "space" / "app.py").is_file()
    assert (tmp_path / "space" / "wan_finetune" / "safety_terms.json").is_file()


def test_the_pages_commands_name_what_is_there():
    server, compose, space = examples("bash")
    base, *command = shlex.split(server)
    assert base == "WAN_FINETUNE_BASE=pocket" and command[:3] == ["python", "-m", "wan_finetune.serving.server"]
    assert make_parser().parse_args(command[3:]).host == "127.0.0.1"
    assert compose.startswith("ADAPTER=") and "${ADAPTER:?" in (ROOT / "compose.yaml").read_text()
    assert (ROOT / "space" / re.search(r"BASE=(\S+)", space)[1] / "model_index.json").resolve().is_file()


def test_the_page_names_every_switch_parameter_and_limit():
    for name in (FRAME_SWITCH, PROMPT_SWITCH, TERMS_FILE, *ENVIRONMENT.values(), SafetySettings().classifier):
        assert f"`{name}`" in PAGE
    for name in set(GenerationRequest.model_fields) - {"prompt"}:
        assert f"`{name}`" in PAGE, name
    assert f"{MAX_BODY_BYTES // 1024} KiB" in PAGE and f"longer than {BODY_SECONDS} s" in PAGE


def test_the_server_listens_on_this_machine_alone_and_ends_when_told(served):
    # The last test of this server.
    assert "http://127.0.0.1:" in served.child.output
    served.child.process.terminate()
    assert served.child.wait(30) == -signal.SIGTERM, served.child.output
    assert "ANOTHER HOST" not in served.child.output
    assert "Traceback" not in served.child.output and "red circle" not in served.child.output
