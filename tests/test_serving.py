"""What serves an adapter: the generator, the endpoint as its service calls it, and the local server over HTTP."""

import base64
import json
import re
import signal
import threading
import time
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fork_server import wait_for
from tests.served import call_endpoint, free_port, lay_out, run_server, start
from tests.test_adapters import trained
from tests.tiny_classifier import write_tiny_classifier
from wan_finetune.captions import DEFAULT_TEMPLATE
from wan_finetune.errors import InputError
from wan_finetune.experts import HIGH, LOW
from wan_finetune.export import write_adapter_folder
from wan_finetune.pipeline import load_pipeline
from wan_finetune.safety import FRAME_SWITCH, FrameFilter, Refused, SafetySettings
from wan_finetune.sampling import Request, SamplingSettings, sample
from wan_finetune.serving.asking import parse_request
from wan_finetune.serving.files import SDK_VERSION, endpoint_files, space_files
from wan_finetune.serving.generator import as_mp4, open_generator
from wan_finetune.serving.server import MAX_BODY_BYTES
from wan_finetune.serving.settings import ServingSettings, read_settings
from wan_finetune.video import read_video

ROOT = Path(__file__).resolve().parent.parent
BASE = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
SAMPLING = {"width": 64, "height": 32, "num_frames": 5, "steps": 2, "guidance_scale": 2.0, "guidance_scale_2": 1.5}
RED = {"prompt": "夜空中，一个红色的圆形", "seed": 7}


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter_folder(folder, [trained(tiny_base, expert) for expert in (HIGH, LOW)])
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_tiny_classifier(tmp_path_factory.mktemp("classifier"), "nothing")


@pytest.fixture(scope="module")
def settings(tiny_base, adapter):
    table = {"base": str(tiny_base), "adapter": str(adapter), "sampling": SAMPLING}
    return ServingSettings.model_validate(table)


@pytest.fixture(scope="module")
def generator(settings, classifier):
    return open_generator(settings, {FRAME_SWITCH: str(classifier)})


def clip_of(base, adapter, strength=1.0, prompt=RED["prompt"], seed=RED["seed"]):
    """The clip as a fresh pipeline makes it, trigger in place."""
    pipe = load_pipeline(str(base), adapter, strength=strength)
    wanted = SamplingSettings(**SAMPLING, shift=pipe.scheduler.config.flow_shift)
    return as_mp4(sample(pipe, [Request(prompt=f"ember style, {prompt}", seed=seed)], wanted)[0], 16.0)


def test_strengths_change_between_requests_and_leave_nothing_behind(generator, tiny_base, adapter):
    plain = generator.generate({**RED, "compare": True})
    weak = generator.generate({**RED, "strength_high": 0.5, "strength_low": 1.5})
    again = generator.generate(RED)
    assert plain.video == clip_of(tiny_base, adapter) == again.video
    assert weak.video == clip_of(tiny_base, adapter, (0.5, 1.5)) != plain.video
    assert plain.base_video == clip_of(tiny_base, None) != plain.video and again.base_video is None
    assert generator.generate({**RED, "strength_high": 0, "strength_low": 0}).video == plain.base_video
    # The pipeline cleans prompts like captions; among other things the comma becomes a plain one.
    assert plain.prompt == "ember style, 夜空中,一个红色的圆形" and plain.shift == 5.0


def test_requests_at_once_get_what_they_would_have_got_alone(generator):
    asked = [{**RED, "strength_low": strength, "compare": True} for strength in (0.25, 1.75)]
    alone = [generator.generate(each) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generator.generate, asked * 2))
    assert [made.video for made in together] == [made.video for made in alone] * 2
    assert {made.base_video for made in together} == {alone[0].base_video} and alone[0].video != alone[1].video


def test_settings_of_a_clip_make_it_again(generator):
    first = generator.generate({"prompt": "A red circle.", "num_frames": 9})
    kept = {key: value for key, value in first.settings.items() if key not in ("shift", "versions")}
    assert generator.generate(kept).video == first.video
    assert generator.generate({"prompt": "A red circle.", "num_frames": 9}).request.seed != first.request.seed


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "prompt is required"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "x" * 2001}, "prompt has 2001 characters; at most 2000"),
        ({"prompt": ["a"]}, "prompt: Input should be a valid string"),
        ({"prompt": "a", "negative_prompt": "y" * 3000}, "negative_prompt has 3000"),
        ({"prompt": "a", "width": 65}, "width: Input should be a multiple of 16, got 65"),
        ({"prompt": "a", "width": 0}, "width"),
        ({"prompt": "a", "width": -16}, "width"),
        ({"prompt": "a", "width": 1296}, "width is 1296, and at most 1280"),
        ({"prompt": "a", "width": 1280, "height": 1280}, "1638400 pixels"),
        ({"prompt": "a", "num_frames": 6}, "num_frames must be 4n[+]1"),
        ({"prompt": "a", "num_frames": 85}, "num_frames is 85"),
        ({"prompt": "a", "num_frames": 1e400}, "num_frames"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "steps": 51}, "steps is 51"),
        ({"prompt": "a", "fps": 0}, "fps"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "strength_low": 2.5}, "strength_low is 2.5"),
        ({"prompt": "a", "strength_high": float("nan")}, "strength_high"),
        ({"prompt": "a", "strength_high": -0.5}, "strength_high"),
        ({"prompt": "a", "widht": 64}, "unknown key 'widht'; did you mean width?"),
        ({"prompt": "a", "width": "x" * 500}, r"width: .*\.\.\.$"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(request_, message):
    with pytest.raises(InputError, match=message) as error:
        parse_request(request_, ServingSettings())
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_left_out_or_null_is_the_served_default(settings):
    request = parse_request({"prompt": "a", "width": None, "seed": None}, settings)
    assert (request.width, request.steps, request.guidance_scale_2) == (64, 2, 1.5)
    assert ServingSettings().template == DEFAULT_TEMPLATE


def test_the_default_template_is_the_trainings():
    from data.config import DataConfig

    assert DataConfig.model_fields["caption"].default == DEFAULT_TEMPLATE


def test_a_blocked_prompt_costs_no_sampling_and_a_blocked_clip_is_not_returned(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "clip", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(Refused, match="sexual"):
        generator.generate({"prompt": "a n&#117;de woman"})
    monkeypatch.undo()
    everything = write_tiny_classifier(tmp_path, "everything")
    monkeypatch.setattr(generator, "frame_filter", FrameFilter(SafetySettings(classifier=str(everything))))
    with pytest.raises(Refused, match="not shown"):
        generator.generate(RED)


def test_the_clip_of_the_base_is_looked_at_too(generator, monkeypatch):
    seen = []
    monkeypatch.setattr(generator.frame_filter, "check", lambda clip: seen.append(clip))
    made = generator.generate({**RED, "compare": True})
    assert [as_mp4(clip, 16.0) for clip in seen] == [made.video, made.base_video]


def test_a_clip_that_memory_cannot_hold_is_a_message(generator, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator, "clip", out_of_memory)
    with pytest.raises(InputError, match="fewer frames or fewer pixels"):
        generator.generate(RED)
    monkeypatch.undo()
    assert generator.generate(RED).video, "the lock is free again"


def test_nothing_is_served_without_the_filter_base_or_adapter(settings, classifier, monkeypatch):
    monkeypatch.setattr("wan_finetune.serving.generator.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match="nothing is served"):
        open_generator(settings, {FRAME_SWITCH: "no/such-classifier"})
    for key, name in (("base", "WAN_FINETUNE_BASE"), ("adapter", "WAN_FINETUNE_ADAPTER")):
        with pytest.raises(InputError, match=f"no {key} is named.*{name}"):
            open_generator(settings.model_copy(update={key: ""}), {FRAME_SWITCH: str(classifier)})


def test_settings_come_from_the_file_and_the_environment(tmp_path):
    assert read_settings(tmp_path, {}) == ServingSettings()
    (tmp_path / "settings.json").write_text('{"base": "a/b", "trigger": "acme", "lang": "zh"}')
    read = read_settings(tmp_path, {"WAN_FINETUNE_BASE": "c/d", "WAN_FINETUNE_ADAPTER": "", "WAN_FINETUNE_TRIGGER": ""})
    assert (read.base, read.adapter, read.trigger, read.lang) == ("c/d", "", "", "zh")
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"bas": 1}', "unknown key bas"),
        ('{"lang": "de"}', "lang: Input should be 'en' or 'zh', got 'de'"),
        ('{"sampling": {"width": 65}}', "sampling.width: Input should be a multiple of 16"),
    ):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(InputError, match=re.escape(message)):
            read_settings(tmp_path, {})


def test_a_space_carries_the_library_and_says_what_it_is():
    from huggingface_hub import RepoCard

    arguments = {"base": BASE, "adapter_repo": "me/look", "trigger": "acme", "examples": ["A cat.", "一只猫"]}
    files = space_files(**arguments, title='Acme: "film"\n# 1', lang="zh")
    card = RepoCard(files["README.md"].decode())
    assert card.data.to_dict().items() >= {
        "title": 'Acme: "film" # 1', "sdk": "gradio", "sdk_version": SDK_VERSION, "app_file": "app.py",
        "license": "apache-2.0", "models": ["me/look", BASE],
    }.items()  # fmt: skip
    assert f"gradio=={SDK_VERSION}\n" in (ROOT / "constraints.txt").read_text()
    settings = ServingSettings.model_validate_json(files["settings.json"])
    assert (settings.base, settings.adapter, settings.trigger, settings.lang) == (BASE, "me/look", "acme", "zh")
    assert settings.examples == ("A cat.", "一只猫") and settings.sampling == SamplingSettings()
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "wan_finetune").rglob("*.py")}
    carried = {name for name in files if name.startswith("wan_finetune/")}
    assert own <= carried and carried - own == {
        *("wan_finetune/LICENSE", "wan_finetune/safety_terms.json", "wan_finetune/serving/endpoint/requirements.txt"),
        *(f"wan_finetune/serving/space/{name}" for name in ("README.md", "requirements.txt", "texts.json")),
    }
    assert sum(map(len, files.values())) < 2**21
    assert not any(str(ROOT).encode() in content for content in files.values())


def test_the_pocket_base_travels_along_because_no_hub_has_it():
    files = endpoint_files(base="pocket")
    weights = [name for name in files if name.endswith(".safetensors")]
    assert weights and all(name.startswith("wan_finetune/pocket/model/") for name in weights)
    assert ServingSettings.model_validate_json(files["settings.json"]).sampling.width == 64


@pytest.mark.parametrize("name", ["/home/me/secret/wan", "tiny", "a/b/c", "", "../up", "me/"])
def test_what_cannot_be_fetched_is_refused_without_naming_a_folder(name):
    more = {"trigger": "", "title": "t", "examples": [], "lang": "en"}
    calls = (
        lambda: endpoint_files(base=name),
        lambda: space_files(base=name, adapter_repo="a/b", **more),
        lambda: space_files(base=BASE, adapter_repo=name, **more),
    )
    for call in calls:
        with pytest.raises(InputError, match="is no repository of the Hub") as error:
            call()
        assert "secret" not in str(error.value)


def test_the_requirements_are_the_projects_own():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    own = {re.split(r"[<>=;\[ ]", line)[0]: line for line in table["project"]["dependencies"]}
    for kind, more in (("space", set()), ("endpoint", {"torchvision"})):
        text = (ROOT / "wan_finetune" / "serving" / kind / "requirements.txt").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert {line for line in lines if line not in more} <= set(own.values()), kind
        assert set(own) - {re.split(r"[<>=]", line)[0] for line in lines} == {"decord", "decord2", "rich"}


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
    assert child.wait() == 0, child.output
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


def test_one_request_waits_and_the_next_is_turned_away(served):
    long = {"inputs": "a red circle", "parameters": {"seed": 1, "steps": 50, "num_frames": 17}}
    answers = {}

    def ask(name, body):
        answers[name] = served.ask(body)

    first = threading.Thread(target=ask, args=("first", long))
    second = threading.Thread(target=ask, args=("second", long))
    first.start()
    time.sleep(0.2)
    second.start()
    time.sleep(0.2)
    status, headers, content = served.ask(long)
    assert status == 429 and int(headers["retry-after"]) > 0 and b"try again later" in content
    assert served.health() == 200, "the server answers while it makes a clip"
    first.join()
    second.join()
    assert answers["first"][0] == answers["second"][0] == 200
    assert json.loads(answers["first"][2])["video"] == json.loads(answers["second"][2])["video"]
    assert served.ask({"inputs": "a", "parameters": {"steps": 1}})[0] == 200, "the queue is empty again"


def test_the_server_listens_on_this_machine_alone_and_ends_when_told(served):
    # The last test of this server.
    assert "http://127.0.0.1:" in served.child.output
    served.child.process.terminate()
    assert served.child.wait(30) == -signal.SIGTERM, served.child.output
    assert "Traceback" not in served.child.output and "red circle" not in served.child.output


def test_a_server_without_its_filter_ends_with_a_message(tiny_base, adapter, tmp_path):
    environment = {"WAN_FINETUNE_BASE": str(tiny_base), FRAME_SWITCH: "no/such-classifier"}
    arguments = ["--folder", str(adapter), "--port", str(free_port())]
    child = start(run_server, ROOT, arguments, log=tmp_path / "log", environment=environment)
    assert child.wait() == 2 and "error: the safety filter's image classifier" in child.output


def test_the_container_lets_this_machine_in_alone_and_runs_as_nobody_special():
    import yaml

    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["wan"]
    assert compose["ports"] == ["127.0.0.1:7861:7861"] and "FRAME_FILTER" not in str(compose.get("command"))
    assert docker_lines("USER") == ["serve"] and docker_lines("EXPOSE") == ["7861"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {name for line in docker_lines("COPY") for name in line.split()[:-1]}
    assert "*" in ignored and {name for name in ignored if name.startswith("!")} == {f"!{name}" for name in copied}
    assert not docker_lines("ADD") and ":latest" not in docker_lines("FROM")[0] and ":" in docker_lines("FROM")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert '".[serve]"' in docker_lines("RUN")[0] and {"starlette", "uvicorn"} == {
        re.split("[<>=]", line)[0] for line in extras["serve"]
    }
