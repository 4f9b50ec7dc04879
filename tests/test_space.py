"""The Gradio Space, laid out as on the Hub and driven by a real browser, and what of it needs none."""

import json
import sys
import types
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.fork_server import wait_for
from tests.served import free_port, lay_out, run_app, start, write_adapter
from tests.tiny_classifier import write_tiny_classifier
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder
from wan_finetune.safety import FRAME_SWITCH, PromptFilter, Refused
from wan_finetune.serving.asking import parse_request
from wan_finetune.serving.files import space_files
from wan_finetune.serving.generator import Made, open_generator
from wan_finetune.serving.settings import ServingSettings
from wan_finetune.serving.space import app

SAMPLING = {"width": 64, "height": 64, "num_frames": 9, "steps": 4, "guidance_scale": 3.0, "guidance_scale_2": 3.0}
PROMPT = "夜空中，一个红色的圆形向上移动。"
EXAMPLES = ["A red star moves up in a desert.", PROMPT]
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --autoplay-policy=no-user-gesture-required"
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(base_folder("pocket"), tmp_path_factory.mktemp("ember"))


@pytest.fixture(scope="module")
def space(adapter, tmp_path_factory):
    """(address, child, environment) of a Space that runs."""
    root = tmp_path_factory.mktemp("space")
    files = space_files(
        base="Wan-AI/Wan2.2-T2V-A14B-Diffusers", adapter_repo="me/ember", trigger="ember style", title="Ember",
        examples=EXAMPLES, lang="zh",
    )  # fmt: skip
    lay_out(root / "repository", files)
    settings = {**json.loads(files["settings.json"]), "sampling": SAMPLING}
    (root / "repository" / "settings.json").write_text(json.dumps(settings))
    port = free_port()
    environment = {
        "WAN_FINETUNE_BASE": str(base_folder("pocket")),
        "WAN_FINETUNE_ADAPTER": str(adapter),
        FRAME_SWITCH: str(write_tiny_classifier(root / "classifier", "nothing")),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(root / "gradio"),
    }
    (root / "log").touch()
    child = start(run_app, root / "repository", log=root / "log", environment=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: not child.process.is_alive() or "Running on local URL" in child.output, "Space")
        assert child.process.is_alive(), child.output
        yield address, child, environment
    finally:
        child.kill()


@pytest.fixture(scope="module")
def here(space):
    """A generator in this process that serves the same."""
    _, _, environment = space
    table = {"base": environment["WAN_FINETUNE_BASE"], "adapter": environment["WAN_FINETUNE_ADAPTER"]}
    return open_generator(ServingSettings.model_validate({**table, "sampling": SAMPLING}), environment)


def fetched(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def called(address, *values):
    """(adapter's clip, base's clip, status) through the Space's API: queued, then streamed."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    stream = fetched(f"{address}/gradio_api/call/generate/{event}").decode()
    assert "event: complete" in stream, stream
    *clips, status = json.loads(stream.rpartition("data: ")[2])
    return *(fetched(clip["url"]) if clip else None for clip in clips), status


@pytest.mark.browser
def test_a_browser_makes_clips_and_sees_what_is_refused(space, here, chromium, tmp_path):
    from playwright.sync_api import sync_playwright

    address, _, _ = space
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=chromium, headless=True, args=FLAGS.split(),
            viewport={"width": 1280, "height": 900}, locale="zh-CN",
        )  # fmt: skip
        try:
            tab = browser.new_page()
            faults, asked = [], []
            tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: faults.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            tab.wait_for_selector("#make", timeout=30_000)
            words = tab.inner_text("body")
            assert all(
                text in words for text in ("提示词", "生成视频", "带适配器", "基础模型", "ember style", "安全过滤")
            )
            assert str(Path.home()) not in words and str(tmp_path.parent) not in words

            tab.get_by_text(EXAMPLES[0]).click()
            tab.wait_for_function(f"document.querySelector('#prompt textarea').value === {EXAMPLES[0]!r}")
            tab.fill("#prompt textarea", PROMPT)
            tab.click("#settings button")
            tab.fill("#seed input", "7")
            tab.click("#make")
            shown = "[...document.querySelectorAll('#adapter video, #base video')]"
            tab.wait_for_function(f"{shown}.filter(v => v.readyState >= 3).length == 2", timeout=60_000)
            tab.wait_for_function(f"{shown}.every(v => v.played.length > 0)", timeout=20_000)
            facts = tab.evaluate(f"{shown}.map(v => [v.videoWidth, v.videoHeight, v.duration, v.error])")
            assert [each[:2] + each[3:] for each in facts] == [[64, 64, None]] * 2
            assert all(each[2] == pytest.approx(9 / 16, abs=0.01) for each in facts)
            sources = tab.evaluate(f"{shown}.map(v => v.currentSrc)")
            made = here.generate({"prompt": PROMPT, "seed": 7, "compare": True})
            assert [fetched(source) for source in sources] == [made.video, made.base_video]
            assert made.video != made.base_video
            assert "种子 7，64x64，9 帧" in tab.input_value("#status textarea")
            tab.screenshot(path=tmp_path / "clips.png", full_page=True)

            tab.fill("#prompt textarea", "一个裸 体的人")
            tab.click("#make")
            tab.wait_for_function("document.querySelector('#status textarea').value.includes('露骨')", timeout=20_000)
            assert tab.evaluate(f"{shown}.length") == 0, "the clip of before does not stand under a refusal"

            tab.set_viewport_size({"width": 390, "height": 844})
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            assert tab.locator("#make").bounding_box()["width"] > 200
            tab.screenshot(path=tmp_path / "phone.png", full_page=True)
            assert faults == []
            elsewhere = [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))]
            assert asked and elsewhere == []
        finally:
            browser.close()


def test_the_space_answers_requests_at_once_as_it_would_one_by_one(space, here):
    address, _, _ = space
    strengths = (0.5, 1.5)
    wanted = [["A red circle.", "", 3, 64, 64, 9, 2, 1.0, strength, True] for strength in strengths]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda values: called(address, *values), wanted * 2))
    asked = {"prompt": "A red circle.", "seed": 3, "steps": 2, "compare": True}
    alone = [here.generate({**asked, "strength_low": strength}) for strength in strengths] * 2
    for (video, base, status), made, strength in zip(answers, alone, strengths * 2, strict=True):
        assert (video, base) == (made.video, made.base_video) and f"{strength:g}" in status
    assert len({video for video, _, _ in answers}) == 2
    body, kind = json.dumps({"data": wanted[0]}).encode(), {"content-type": "application/json"}
    past_the_queue = urllib.request.Request(f"{address}/gradio_api/run/generate", body, kind)
    with pytest.raises(urllib.error.HTTPError) as error, urllib.request.urlopen(past_the_queue, timeout=60):
        pass
    error.value.close()
    assert error.value.code == 404
    assert called(address, "a nude woman", "", 3, 64, 64, 9, 4, 1.0, 1.0, False)[:2] == (None, None)
    assert "multiple of 16" in called(address, "a", "", 3, 65, 64, 9, 4, 1.0, 1.0, False)[2]


def test_the_space_listens_on_this_machine_alone(space):
    _, child, environment = space
    listening = [c.laddr for c in psutil.Process(child.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {(place.ip, str(place.port)) for place in listening} == {("127.0.0.1", environment["GRADIO_SERVER_PORT"])}
    assert "ANOTHER HOST" not in child.output
    assert "nude" not in child.output and "圆形" not in child.output, "prompts are in no log"


def test_a_space_without_its_filter_ends_with_a_message(space, tmp_path):
    _, _, environment = space
    folder = lay_out(tmp_path, space_files(
        base="pocket", adapter_repo="me/ember", trigger="", title="t", examples=[], lang="en"
    ))  # fmt: skip
    child = start(run_app, folder, log=tmp_path / "log", environment={**environment, FRAME_SWITCH: "no/such"})
    assert child.wait() == 2 and "error: the safety filter's image classifier 'no/such'" in child.output


class StubGenerator:
    """Checks like a generator, and makes nothing."""

    def __init__(self, **settings):
        self.settings = ServingSettings.model_validate({"sampling": SAMPLING, **settings})
        self.prompt_filter = self.frame_filter = PromptFilter()
        self.outcome = None

    def check(self, table):
        request = parse_request(table, self.settings)
        self.prompt_filter.check(request.prompt)
        return request

    def generate(self, table):
        request = parse_request(table, self.settings)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return Made(
            video=f"{request.seed}".encode(), base_video=b"base" if request.compare else None,
            prompt=request.prompt, request=request, shift=3.0,
        )  # fmt: skip


KEYS = ["prompt", "seed", "compare"]


def respond_with(generator, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path))
    return app.responder(generator, app.attempting(generator), KEYS, app.texts_of(generator.settings.lang))


def test_a_click_gives_clips_or_a_reason_in_the_pages_language(monkeypatch, tmp_path):
    generator = StubGenerator(lang="zh")
    respond = respond_with(generator, monkeypatch, tmp_path)
    video, base, status = respond("A red circle.", 5, True)
    assert (Path(video).read_bytes(), Path(base).read_bytes()) == (b"5", b"base") and "种子 5" in status
    assert "red" not in video, "no prompt in a file's name"
    assert respond("A red circle.", 5, False)[1] is None
    assert respond("porn", 5, False) == (None, None, "该提示词疑似包含露骨的性内容，无法生成。请修改后重试。")
    assert respond("", 5, False)[2].startswith("prompt")
    generator.outcome = Refused("frames", "not shown", "不予显示")
    assert respond("a", 5, False) == (None, None, "不予显示")
    generator.outcome = InputError("fewer frames")
    assert respond("a", 5, False) == (None, None, "fewer frames")
    generator.outcome = RuntimeError("/secret/path")
    assert respond("a", 5, False) == (None, None, "视频生成失败，原因见日志。")


def test_clips_on_disk_stay_few(monkeypatch, tmp_path):
    respond = respond_with(StubGenerator(), monkeypatch, tmp_path)
    for seed in range(app.KEPT_CLIPS + 10):
        newest = respond("a", seed, True)[0]
    assert Path(newest).is_file() and len(list(tmp_path.glob("*.mp4"))) <= app.KEPT_CLIPS + 2


def build_pages(out):
    """In a child, because gradio leaves event loops open: the page in both languages, and how it is launched."""
    import gradio

    found = {}
    for lang in ("en", "zh"):
        generator = StubGenerator(lang=lang, examples=EXAMPLES, trigger="acme", adapter="me/look", base="a/b")
        generator.frame_filter = None
        demo = app.build(generator, app.attempting(generator))
        found[lang] = {"analytics": demo.analytics_enabled, "components": demo.get_config_file()["components"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan_finetune.serving.generator.open_generator", lambda *_: StubGenerator(adapter="me/look"))
        patch.setattr(gradio.Blocks, "queue", lambda self, **options: found.update(queue=options) or self)
        patch.setattr(gradio.Blocks, "launch", lambda self, **options: found.update(launch=options))
        patch.setitem(sys.modules, "spaces", None)
        for place, variables in (("home", {}), ("space", {"SPACE_ID": "me/space"})):
            with patch.context() as inner:
                for name, value in variables.items():
                    inner.setenv(name, value)
                assert app.main() == 0
                launch = found.pop("launch")
                found[place] = {key: launch[key] for key in ("server_name", "share", "ssr_mode")}
    out.write_text(json.dumps(found, default=str))
    return 0


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    child = start(build_pages, folder / "found.json", log=folder / "log", environment={})
    assert child.wait() == 0, child.output
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_is_built_in_either_language_with_the_served_limits(pages, lang):
    components = [each["props"] for each in pages[lang]["components"]]
    props = {each.get("elem_id") or each.get("label"): each for each in components}
    texts = app.texts_of(lang)
    assert props["prompt"]["label"] == texts["prompt"] and props["prompt"]["max_length"] == 2000
    assert props["make"]["value"] == texts["make"] and "acme" in props["prompt"]["info"]
    assert (props[texts["frames"]]["maximum"], props[texts["frames"]]["step"]) == (81, 4)
    assert "me/look" in props["introduction"]["value"]
    assert props["filter"]["value"] == texts["filter_off"], "a filter of which a part is off does not read as on"
    assert pages[lang]["analytics"] is False


def test_every_label_is_there_in_both_languages():
    texts = json.loads((Path(app.__file__).parent / "texts.json").read_text(encoding="utf-8"))
    assert texts["en"].keys() == texts["zh"].keys() and all(texts["zh"].values())


def test_only_a_space_listens_to_others_and_nothing_is_shared(pages):
    assert pages["home"] == {"server_name": "127.0.0.1", "share": False, "ssr_mode": False}
    assert pages["space"] == {"server_name": "0.0.0.0", "share": False, "ssr_mode": False}
    assert pages["queue"] == {"max_size": 16, "default_concurrency_limit": 1, "api_open": False}


def test_zerogpu_reserves_by_size_and_gets_plain_answers(monkeypatch):
    reserved = []

    def gpu(*, duration):
        def decorate(function):
            def call(table):
                reserved.append(duration(table))
                return function(table)

            return call

        return decorate

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    generator = StubGenerator()
    attempt = app.gpu_decorator()(app.attempting(generator))
    table = parse_request({"prompt": "a"}, ServingSettings()).model_dump()
    assert isinstance(attempt(table), Made)
    attempt({**table, "compare": True})
    attempt({**table, "steps": 20, "num_frames": 21})
    whole, both, less = reserved
    assert 200 < whole < 1200 and both == pytest.approx(2 * whole, rel=0.1) and less < whole / 4
    generator.outcome = Refused("frames", "not shown", "不予显示")
    # An exception would come back from ZeroGPU's process as another one.
    assert attempt(table) == {"en": "not shown", "zh": "不予显示"}
