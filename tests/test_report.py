"""The report: everything inside, nothing leaks, and a real browser shows it."""

import base64
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from wan_finetune.errors import InputError
from wan_finetune.evaluation.report import Curve, Figure, Panel, Report, verdict, without_folders, write_report
from wan_finetune.evaluation.report_chart import chart

HOSTILE = (
    "<script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" & 夜空中，红色的圆形 مرحبا \u202e \udc80 \0"
)


def write_clip(path, shade, size=64, num_frames=9):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(num_frames):
            pixels = np.full((size, size, 3), shade, np.uint8)
            pixels[8:24, 4 * i : 4 * i + 16] = 255 - shade
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-folder")
    clips = [write_clip(folder / f"clip-{i}.mp4", 20 + 20 * i) for i in range(8)]
    final = [
        Panel(prompt=HOSTILE, seed=1, base=clips[0], adapter=clips[1], base_nearness=20.5, adapter_nearness=4.25),
        Panel(prompt="夜空中，一个红色的圆形", seed=2, base=clips[2], adapter=clips[3]),
        Panel(
            prompt="x" * 300, seed=3, base=clips[2], adapter=clips[4], base_nearness=9, adapter_nearness=float("nan")
        ),
    ]
    steps = list(range(0, 2000, 10))
    return Report(
        title="Ember & friends",
        summary="82 % of the way to the brand.",
        reference=clips[5:7],
        panels=final,
        midway=[replace(final[0], adapter=clips[7]), replace(final[1], seed=99)],
        curves=[
            Curve(expert="high noise", steps=steps, loss=[1.0 / (1 + s) for s in steps]),
            Curve(expert="low noise", steps=[1, 2, 3], loss=[0.2, float("nan"), 0.1]),
            Curve(expert="nothing yet", steps=[], loss=[]),
        ],
        figures=[Figure(name="Distance <b>", base=4.0, adapter=1.0), Figure(name="Motion", base=None, adapter=None)],
        facts={"data": str(folder / "clips"), "base": "Wan-AI/Wan2.2-T2V-A14B"},
    )


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "report.html"
    write_report(path, report)
    return path


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of script and style."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def videos(self):
        """Label and bytes of each video, in order; a repeated one has those of the first."""
        shown, stored = [], {}
        for tag, attributes in self.tags:
            if tag == "video":
                if "src" in attributes:
                    head, data = attributes["src"].split(",", 1)
                    assert head == "data:video/mp4;base64"
                    stored[attributes["id"]] = base64.b64decode(data, validate=True)
                shown.append((attributes["aria-label"], stored[attributes.get("id") or attributes["data-same"]]))
        return shown


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text(encoding="utf-8"))


def test_every_clip_is_there_byte_for_byte(page, report):
    first = report.panels[0]
    expected = list(report.reference)
    expected += [path for panel in report.panels for path in (panel.base, panel.adapter)]
    expected += [first.base, report.midway[0].adapter, first.adapter, report.midway[1].base, report.midway[1].adapter]
    assert [content for _, content in page.videos()] == [path.read_bytes() for path in expected]


def test_a_clip_is_stored_once(page):
    stored = [attributes["src"] for tag, attributes in page.tags if tag == "video" and "src" in attributes]
    assert len(stored) == len(set(stored)) == 8


def test_nothing_is_asked_of_any_network_or_folder(page, written):
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    source = written.read_text(encoding="utf-8")
    assert "@import" not in source and "url(" not in source and "http" not in source.replace("http-equiv", "")


def test_a_hostile_prompt_is_only_text(page):
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = next(word for word in page.words if "alert" in word)
    assert shown.startswith("<script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" & 夜空中")
    assert "\0" not in shown
    assert page.open == [], "every tag is closed"


def test_only_file_names_are_told(written, report):
    source = written.read_text(encoding="utf-8")
    assert "secret-folder" not in source
    assert "Wan-AI/Wan2.2-T2V-A14B" in source
    assert report.panels[0].adapter.name in source


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/clips/ember", "ember"),
        ("from ~/a/b.mp4, then", "from b.mp4, then"),
        (r"C:\Users\me\x.toml", "x.toml"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("user/repo 1/2 and/or", "user/repo 1/2 and/or"),
    ],
)
def test_absolute_paths_lose_their_folders(given, shown):
    assert without_folders(given) == shown


@pytest.mark.parametrize(
    ("base", "adapter", "better", "word"),
    [
        (4.0, 1.0, "lower", "nearer"),
        (1.0, 4.0, "lower", "farther"),
        (1.0, 1.01, "lower", "kept"),
        (80.0, 95.0, "higher", "gained"),
        (95.0, 80.0, "higher", "lost"),
        (1.0, 0.95, "same", "kept"),
        (1.0, 0.4, "same", "lost"),
        (1.0, 1.9, "same", "grown"),
        (0.0, 0.0, "same", "kept"),
        (0.0, 2.0, "lower", "farther"),
        (None, 2.0, "lower", "not measured"),
        (float("nan"), 2.0, "lower", "not measured"),
    ],
)
def test_a_figure_has_a_plain_word(base, adapter, better, word):
    assert verdict(Figure(name="f", base=base, adapter=adapter, better=better))[1] == word


def test_a_curve_stays_inside_its_axes_and_a_constant_one_is_drawn():
    for loss in ([0.3] * 50, [1e9, *[0.1] * 49], [0.0] * 50):
        svg = chart("high noise", list(range(50)), loss, 0)
        points = [p.split(",") for line in svg.split('points="')[1:] for p in line.split('"')[0].split()]
        assert all(0 <= float(x) <= 520 and 0 <= float(y) <= 260 for x, y in points)
    assert chart("low noise", [5], [0.1], 0) == ""


def test_the_held_out_loss_is_drawn_where_its_step_and_value_are():
    svg = chart(
        "high noise", list(range(1, 101)), [0.5] * 50 + [0.1] * 50, 0, [(0, 9.0), (1, 0.5), (50, 0.3), (100, 0.1)]
    )
    held = re.search(r'class="held" points="([^"]*)"', svg)[1].split()
    mean = re.search(r'class="mean" points="([^"]*)"', svg)[1].split()
    assert len(held) == 3 and "clips that training never sees" in svg  # not the one before the first step
    assert held[0] == mean[0] and held[2] == mean[-1]
    assert "never sees" not in chart("high noise", [1, 2], [0.5, 0.4], 0)


def test_a_report_of_nothing_is_a_page(tmp_path):
    write_report(tmp_path / "a" / "report.html", Report(title="t", summary="s"))
    assert Page((tmp_path / "a" / "report.html").read_text(encoding="utf-8")).videos() == []


def test_a_missing_clip_leaves_the_old_report(tmp_path, report):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InputError, match=r"gone\.mp4"):
        write_report(path, replace(report, reference=[tmp_path / "gone.mp4"]))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.browser
def test_a_browser_plays_it(written, tmp_path, chromium):
    from playwright.sync_api import sync_playwright

    flags = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=chromium,
            headless=True,
            args=[*flags.split(), "--disable-sync"],
            viewport={"width": 1280, "height": 900},
        )
        try:
            tab = browser.new_page()
            faults, asked = [], []
            tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: faults.append(str(error)))
            tab.on("dialog", lambda dialog: faults.append(dialog.message))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(written.as_uri())
            all_ready = "[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && v.videoWidth > 0)"
            tab.wait_for_function(all_ready, timeout=20_000)
            tab.wait_for_function("document.querySelector('video').played.length > 0", timeout=20_000)
            assert tab.locator('[data-speed="0.5"]').get_attribute("aria-pressed") == "true", "short clips start slow"
            assert tab.locator("video.pixels").count() == tab.locator("video").count()

            tab.locator('[data-speed="1"]').click()
            tab.locator("#play").click()
            assert tab.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
            for width in (1280, 400):
                tab.set_viewport_size({"width": width, "height": 800})
                assert tab.evaluate("document.documentElement.scrollWidth") <= width

            tab.emulate_media(reduced_motion="reduce", color_scheme="dark")
            tab.reload()
            tab.wait_for_function(all_ready, timeout=20_000)
            assert tab.locator("#play").inner_text() == "Play"
            assert tab.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
            assert faults == []
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        finally:
            browser.close()
