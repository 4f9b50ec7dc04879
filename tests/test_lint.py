"""Lint: what it says against captions is so, and it says nothing against good ones, in English as in Chinese."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.lint import LintInput, lint
from wan_finetune.captions import compose
from wan_finetune.pocket import world

PREFIX, SUFFIX = "{trigger}, {caption}", "{caption}, {trigger}"
PIECES = (
    "&",
    "amp;",
    "Ã©",
    "\u0301",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ufffd",
    "\ud800",
    "猫",
    "acme",
    "4k",
    ",",
    " ",
    ".",
)
HARD_TEXT = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


def inputs(captions, trigger="", template=PREFIX, **fields):
    return [
        LintInput(clip=f"{index}.mp4", written=caption, composed=compose(caption, trigger, template), **fields)
        for index, caption in enumerate(captions)
    ]


def levels(findings):
    return [(finding.level, finding.clip) for finding in findings]


def test_good_captions_are_left_alone():
    places = {
        "hall": "大厅里",
        "yard": "院子里",
        "snow": "雪地上",
        "street": "街边",
        "kitchen": "厨房里",
        "park": "公园里",
    }
    things = {"red shoe": "红色的鞋在转动", "blue lamp": "蓝色的灯亮着"}
    english = [f"A {thing} is here, in the {place}." for thing in things for place in places]
    chinese = [f"{place}，一只{thing}。" for thing in things.values() for place in places.values()]
    assert lint(inputs(english, "acme"), "acme") == []
    assert lint(inputs(chinese, "品牌"), "品牌") == []
    assert lint(inputs(english + chinese), "") == []
    assert lint([], "acme") == []


@pytest.mark.parametrize("languages", [("en",), ("zh",), ("en", "zh")])
@pytest.mark.parametrize("templates", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_the_pocket_worlds_captions_are_left_alone_but_for_their_duplicates(languages, templates):
    scenes = [world.Scene(colour=c[0], shape=c[1], background=c[2], motion=c[3]) for c in world.COMBINATIONS]
    captions = [world.caption(s, language, t) for s in scenes for language in languages for t in templates]
    findings = lint(inputs(captions, "acme"), "acme")
    # The second English template is the first one in small letters and without its full stop.
    twins = len(scenes) if "en" in languages and len(templates) > 1 else 0
    assert len(findings) == twins
    assert all("the same caption, but for letter case" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("caption", "level", "words"),
    [
        ("", "error", "empty"),
        ("acme, .", "error", "empty"),
        ("cat", "warning", "very short"),
        ("一只猫", "warning", "very short"),
        ("a cinematic dog runs by, film-grain", "warning", 'describes the look ("cinematic", "film-grain")'),
        ("a dog runs by in 4K with moody lighting", "warning", 'describes the look ("4K", "moody lighting")'),
        (
            "colour grading of muted colors and lens flares",
            "warning",
            '"colour grading", "muted colors", "lens flares"',
        ),
        ("一只狗在街上跑，电影感，4K画质，胶片", "warning", 'describes the look ("电影感", "4K", "画质", "胶片")'),
        ("Acme shoes on a table", "warning", "other letter case"),
        ("the acme shoe by acme itself", "warning", "2 times"),
        ("a dog\u202e runs by here", "warning", "U+202E right-to-left override"),
        ("a dog runs\x07 by here", "warning", "U+0007 control character"),
        ("a\u200bdog runs by here", "warning", "U+200B zero width space"),
        ("the dog\ufffds are running", "error", "U+FFFD"),
        ("Der Hund lÃ¤uft Ã¼ber die StraÃŸe", "warning", 'mended to "Der Hund läuft über die Straße"'),
        ("猫狗".encode().decode("gb18030"), "error", 'most likely "猫狗" read as gb18030'),
        ("一只狗在街上跑".encode().decode("gb18030", "ignore"), "error", "read as gb18030"),
        ("犬が道を走っている".encode().decode("cp932", "ignore"), "error", "read as cp932"),
    ],
)
def test_lint_says_what_is_wrong(caption, level, words):
    findings = lint(inputs([caption], "acme"), "acme")
    assert [level == finding.level for finding in findings if words in finding.message] == [True], findings
    assert all(finding.clip == "0.mp4" and ";" in finding.message for finding in findings)


@pytest.mark.parametrize(
    "caption",
    [
        "a black and white cat in a vintage car",
        "一只黑白相间的猫坐在老爷车里",
        "the audience gradually degraded at the shd market",  # graded, hd
        "a moodyish dogma of 14k gold and 4kg of grain",
        "שלום \u200fעולם, כלב רץ ברחוב",
        "می\u200cخواهم سگ در خیابان بدود",
        "a family 👨\u200d👩\u200d👧 walks through a park",
        "naïve café, Müller läuft über die Straße",
        "Ο σκύλος τρέχει στο δρόμο",
        "สุนัขวิ่งอยู่บนถนนในเมือง",
        "개가 거리에서 빠르게 달린다",
    ],
)
def test_lint_does_not_mistake_other_words_and_scripts(caption):
    assert lint(inputs([caption], "acme"), "acme") == []


def test_the_trigger_is_missed_except_in_regularisation_sets():
    (finding,) = lint(inputs(["a dog runs by"], "acme", "{caption}"), "acme")
    assert (finding.level, finding.clip) == ("error", "0.mp4")
    assert "does not say the trigger" in finding.message
    assert lint(inputs(["a dog runs by"], "acme", "{caption}", regularisation=True), "acme") == []
    (finding,) = lint(inputs(["the acme dog runs by"], "acme", regularisation=True), "acme")
    assert finding.level == "error"
    assert lint(inputs(["a cinematic dog runs by"], regularisation=True), "acme") == []
    own = [LintInput(clip="a.mp4", written="a dog runs by", composed="brand, a dog runs by", trigger="brand")]
    assert lint(own, "acme") == []
    # An encoding detail: the trigger is looked for as it was cleaned.
    assert lint(inputs(["a dog runs by"], "Ａcme &amp; co"), "Ａcme &amp; co") == []


def test_what_the_encoder_cuts_off_is_said():
    fits, long = (
        inputs(["a dog runs by here"], "acme", num_tokens=512),
        inputs(["a dog runs by " * 90], "acme", num_tokens=513),
    )
    assert lint(fits, "acme") == []
    (finding,) = lint(long, "acme")
    assert finding.level == "warning"
    assert "the last 1 are cut off" in finding.message
    at_end = inputs(["a dog runs by " * 90], "acme", SUFFIX, num_tokens=600)
    assert levels(lint(at_end, "acme")) == [("warning", "0.mp4"), ("error", "0.mp4")]


def test_duplicates_are_named_once_for_each_group():
    captions = [
        "a dog runs by",
        "a cat sits here",
        "A dog runs by!",
        "a dog runs by",
        "sits here, a cat",
        "a cat sits, here",
    ]
    findings = lint(inputs(captions), "")
    assert levels(findings) == [("warning", "0.mp4")]
    assert "but for letter case" in findings[0].message
    assert "2 other clips (2.mp4, 3.mp4)" in findings[0].message
    (finding,) = lint(inputs(["红鞋, 白墙上的影子", "白墙上的影子，红鞋"]), "")
    assert "another clip (1.mp4)" in finding.message
    (finding,) = lint(inputs(["a dog in fog"] * 30), "")
    assert "29 other clips (1.mp4, 2.mp4, 3.mp4, ...)" in finding.message
    twice = [LintInput(clip="a.mp4", written=text, composed=text) for text in ("a dog runs by",) * 2]
    (finding,) = lint(twice, "")
    assert "two of its captions are the same; remove one" in finding.message


@pytest.mark.parametrize(("said", "found"), [(20, True), (18, True), (17, False)])
def test_a_word_in_nearly_every_caption_is_named(said, found):
    things = ["dog", "cat", "bird", "fish", "tree", "car", "boat", "shoe", "lamp", "chair"]
    acts = [f"the {thing} {verb} here" for verb in ("rests", "turns") for thing in things]
    english = [f"{act}{', luminous' if index < said else ''}" for index, act in enumerate(acts)]
    animals = "狗猫鸟鱼马牛羊鹅兔鼠"
    acts = [f"一只{animal}{verb}" for verb in ("坐着", "跑来") for animal in animals]
    chinese = [f"{act}{'，梦幻光芒' if index < said else ''}" for index, act in enumerate(acts)]
    for captions, word in ((english, '"luminous"'), (chinese, '"梦幻光芒"')):
        findings = [finding for finding in lint(inputs(captions, "acme"), "acme") if finding.clip is None]
        assert [word in finding.message for finding in findings] == [True] * found
    # In a set of both languages each is counted for itself.
    findings = [finding for finding in lint(inputs(english + chinese), "") if finding.clip is None]
    assert ['"luminous", "梦幻光芒"' in finding.message for finding in findings] == [True] * found


def test_messages_hold_nothing_that_a_terminal_acts_on():
    nasty = "\x1b[31m\u202ecat"
    for finding in lint(inputs([nasty, nasty, "acme " + nasty], "acme"), "acme"):
        assert finding.message.isprintable()


@given(st.lists(st.tuples(HARD_TEXT, st.integers(0, 600)), max_size=4), st.sampled_from(["", "acme", "&", "品牌", "."]))
def test_lint_takes_any_text(captions, trigger):
    records = [
        LintInput(clip="a.mp4", written=text, composed=compose(text, trigger, PREFIX), num_tokens=tokens)
        for text, tokens in captions
    ]
    assert all(finding.message.isprintable() for finding in lint(records, trigger))


def test_lint_takes_time_in_proportion():
    def seconds(count):
        words = [f"word{number}" for number in range(500)]
        captions = [
            f"a {words[i % 500]} with {words[i * 7 % 500]} by {words[i * 13 // 500 % 500]} {i}" for i in range(count)
        ]
        records = [LintInput(clip=str(i), written=text, composed=text) for i, text in enumerate(captions)]
        started = time.process_time()
        lint(records, "")
        return time.process_time() - started

    seconds(100)
    assert seconds(4000) < 8 * seconds(1000) + 0.5
    long = LintInput(clip="a", written="cinematic 红 " * 90_000, composed="cinematic 红 " * 90_000)
    started = time.process_time()
    lint([long], "acme")
    assert time.process_time() - started < 20


def test_captions_and_lint_import_nothing_heavy():
    code = "import sys, data.captions, data.lint; print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
