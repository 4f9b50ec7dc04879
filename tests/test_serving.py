"""What serves an adapter: the generator, its settings, and the files that go to the Hub."""

import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.served import RED, SAMPLING
from tests.serving_fixtures import BASE, adapter, classifier, generator, settings
from tests.test_adapters import trained
from tests.tiny_classifier import write_tiny_classifier
from tests.tiny_model import write_tiny_base
from wan_finetune.captions import DEFAULT_TEMPLATE
from wan_finetune.errors import InputError
from wan_finetune.experts import SINGLE
from wan_finetune.export import write_adapter_folder
from wan_finetune.pipeline import go_block_by_block, load_pipeline
from wan_finetune.safety import FRAME_SWITCH, FrameFilter, Refused, SafetySettings
from wan_finetune.sampling import Request, SamplingSettings, sample
from wan_finetune.serving.asking import parse_request
from wan_finetune.serving.files import SDK_VERSION, endpoint_files, space_files
from wan_finetune.serving.generator import Generator, as_mp4, open_generator, with_facts
from wan_finetune.serving.settings import ServingSettings, read_settings

__all__ = ["adapter", "classifier", "generator", "settings"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent


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


def test_blocks_that_come_and_go_obey_strengths_too(generator, settings):
    pipe = load_pipeline(settings.base, settings.adapter)
    go_block_by_block(pipe, torch.device("cpu"))
    streamed = Generator(pipe, generator.settings, None, None)
    for asked in ({**RED, "strength_low": 1.5, "compare": True}, {**RED, "strength_high": 0.5}):
        here, there = generator.generate(asked), streamed.generate(asked)
        assert (here.video, here.base_video) == (there.video, there.base_video)


def test_a_base_with_one_denoiser_is_served_at_the_first_strength(tmp_path):
    write_tiny_base(tmp_path / "base", num_experts=1)
    write_adapter_folder(tmp_path / "adapter", [trained(tmp_path / "base", SINGLE)])
    table = {"base": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter"), "sampling": SAMPLING}
    single = open_generator(ServingSettings.model_validate(table), {FRAME_SWITCH: "off"})
    full, none = single.generate(RED), single.generate({**RED, "strength_high": 0, "strength_low": 2, "compare": True})
    assert full.video != none.video == none.base_video


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
        ({"prompt": "a", "steps": 10**4000}, r"steps is 10+\.\.\."),
        ({"prompt": "a", "steps": -(10**4000)}, "steps"),
        ({"prompt": "a\ud800"}, "prompt: Input should be a valid string"),
        ({"prompt": "a", "fps": 0}, "fps"),
        ({"prompt": "a", "fps": float("nan")}, "fps"),
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


def test_the_adapters_own_facts_stand_in_for_what_the_settings_leave_out():
    facts = {"base": "a/b", "base_revision": "c0ffee", "trigger": "acme", "resolution": "640x368", "frames": "33"}
    facts["fps"] = "24.0"
    found = with_facts(ServingSettings(base="a/b"), facts)
    sampling = found.sampling
    assert (sampling.width, sampling.height, sampling.num_frames, sampling.fps) == (640, 368, 33, 24.0)
    assert (found.trigger, found.revision, sampling.steps) == ("acme", "c0ffee", SamplingSettings().steps)
    table = {"base": "c/d", "trigger": "", "sampling": {"width": 320, "fps": 8, "steps": 5}}
    found = with_facts(ServingSettings.model_validate(table), facts)
    sampling = found.sampling
    assert (sampling.width, sampling.height, sampling.num_frames, sampling.fps) == (320, 480, 33, 8.0)
    assert (found.trigger, found.revision, sampling.steps) == ("", None, 5)
    for odd in ({"resolution": "4096x4096"}, {"frames": "4"}, {"resolution": "x"}, {"fps": "fast"}, {}):
        assert with_facts(ServingSettings(trigger=""), odd) == ServingSettings(trigger="")


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
    # Reading clips, pushing, and progress bars are not for what serves.
    unused = {"decord", "decord2", "httpx2", "rich"}
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    own = {re.split(r"[<>=;\[ ]", line)[0]: line for line in table["project"]["dependencies"]}
    for kind, more in (("space", set()), ("endpoint", {"torchvision"})):
        text = (ROOT / "wan_finetune" / "serving" / kind / "requirements.txt").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert {line for line in lines if line not in more} <= set(own.values()), kind
        assert set(own) - {re.split(r"[<>=]", line)[0] for line in lines} == unused
