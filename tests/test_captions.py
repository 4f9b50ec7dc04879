"""Captions: what is encoded is what the pipeline would see, trigger and tags in their places."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.captions import count_tokens, shuffle_tags, variants
from wan_finetune.captions import clean_caption, compose, count_trigger, settle

PREFIX, SUFFIX = "{trigger}, {caption}", "{caption}, {trigger}"
PRODUCT = "{trigger}, product film. {caption}"
TEMPLATES = (
    PREFIX,
    SUFFIX,
    PRODUCT,
    "{caption}",
    "{trigger}，{caption}",
    "[{trigger}] {caption}",
    "{caption} ({trigger})",
)

# Text that cleaning works on: entities, escaped once or often, garbled UTF-8, combining, wide and hidden characters.
PIECES = (
    "&",
    "amp;",
    "&lt;",
    "&#38;",
    "&#x26",
    "amp",
    "lt;",
    "#38;",
    "<",
    ">",
    "Ã©",
    "â€™",
    "\u0301",
    "é",
    "Ａ",
    "，",
    "。",
)
PIECES += (
    " ",
    "  ",
    "\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ufeff",
    "\ud800",
    "ﬃ",
    "“",
    "猫",
    "acme",
    "a",
    ",",
    ".",
    ";",
)
HARD_TEXT = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=15),
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
)
WORDS = st.lists(
    st.sampled_from(["red shoe", "white wall", "1,000 people", "acme", "猫", "a.b", "x"]), min_size=1, max_size=7
)


def test_the_pipeline_cleans_as_we_do():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in ("Tom &amp;amp; Jerry", "一只猫，在跑。", "<&amp;lt;b>", "Ã©tÃ©  \n x", "ＡＣＭＥ “q” ﬃ\x00\u202e"):
        assert clean_caption(text) == prompt_clean(text)


@given(HARD_TEXT, HARD_TEXT, st.sampled_from(TEMPLATES))
@example("&" + "amp;" * 50 + "lt;", "", PREFIX)
@example("<" + "&amp;" * 9 + "lt;", "<&am&#112;amp;", SUFFIX)
@settings(max_examples=600)
def test_what_is_composed_does_not_change_when_it_is_cleaned_again(caption, trigger, template):
    composed = compose(caption, trigger, template)
    assert clean_caption(composed) == composed
    assert compose(composed, "", "{caption}") == composed


@given(
    st.text("ab ,.猫é", max_size=20), st.sampled_from(["acme", "Marke Ä", "品牌", "acme-7"]), st.sampled_from(TEMPLATES)
)
def test_the_trigger_is_said_exactly_once(caption, trigger, template):
    said = count_trigger(compose(caption, trigger, template), trigger)
    assert said == ("{trigger}" in template)
    # ... and it is not put in again, whichever way it came in.
    assert count_trigger(compose(compose(caption, trigger, template), trigger, PREFIX), trigger) == 1


@pytest.mark.parametrize(
    ("caption", "trigger", "template", "composed"),
    [
        ("A dog runs.", "acme", PREFIX, "acme, A dog runs."),
        ("A dog runs.", "acme", SUFFIX, "A dog runs, acme"),
        ("A dog runs.", "acme", PRODUCT, "acme, product film. A dog runs."),
        ("一只猫在跑。", "品牌", PREFIX, "品牌, 一只猫在跑。"),
        ("一只猫在跑。", "品牌", "{caption}，{trigger}", "一只猫在跑,品牌"),
        ("  a &amp; b\n", " acme ", PREFIX, "acme, a & b"),
        ("A {trigger} dog", "acme", PREFIX, "acme, A {trigger} dog"),
        ("", "acme", PREFIX, "acme"),
        # the caption says it already
        ("the acme shoe", "acme", PREFIX, "the acme shoe"),
        ("an acme-like shoe", "acme", SUFFIX, "an acme-like shoe"),
        ("这是acme的鞋", "acme", PREFIX, "这是acme的鞋"),
        ("品牌的猫", "品牌", PREFIX, "品牌的猫"),
        ("アクメの靴", "アクメ", PREFIX, "アクメの靴"),
        ("아크메는 신발", "아크메", PREFIX, "아크메는 신발"),
        ("the acme shoe", "acme", PRODUCT, "product film. the acme shoe"),
        # it only looks like it
        ("the acmeish shoe", "acme", PREFIX, "acme, the acmeish shoe"),
        ("the Acme shoe", "acme", PREFIX, "acme, the Acme shoe"),
        ("кот и котик", "коти", PREFIX, "коти, кот и котик"),
    ],
)
def test_composing(caption, trigger, template, composed):
    assert compose(caption, trigger, template) == composed


@pytest.mark.parametrize(
    ("template", "composed"),
    [
        (PREFIX, "A dog runs."),
        (SUFFIX, "A dog runs."),
        (PRODUCT, "product film. A dog runs."),
        ("{trigger}：{caption}", "A dog runs."),
        ("{caption} ({trigger})", "A dog runs."),
        ("【{trigger}】{caption}", "A dog runs."),
        ("{caption}, {trigger}. Studio light.", "A dog runs. Studio light."),
        ("film by {trigger} of this: {caption}", "film by of this: A dog runs."),
        ("{caption} | {trigger}", "A dog runs."),
    ],
)
def test_without_a_trigger_its_punctuation_goes_too(template, composed):
    assert compose("A dog runs.", "", template) == composed


def test_a_caption_of_a_mebibyte_is_composed_in_seconds():
    started = time.process_time()
    for caption in ("<&" + "amp;" * 262_144, "acme, " * 174_763, "a" * 2**20, "." * 2**20, " " * 2**20):
        assert compose(caption, "acme", PREFIX).count("acme") >= 1
        variants(caption, "acme", 4, seed=0)
    assert time.process_time() - started < 20


@given(WORDS, st.integers(0, 5))
def test_shuffling_moves_every_tag_but_the_triggers(tags, seed):
    caption = ", ".join(tags) + "."
    shuffled = shuffle_tags(caption, "acme", np.random.default_rng(seed))
    assert shuffled.endswith(".")
    parts = shuffled[:-1].split(", ")
    assert Counter(parts) == Counter(tags)
    assert [index for index, part in enumerate(parts) if part == "acme"] == [
        index for index, tag in enumerate(tags) if tag == "acme"
    ]


def test_shuffling_keeps_separators_and_numbers_together():
    parts = {"红鞋", "1,000人", "白墙"}
    for seed in range(8):
        first, rest = shuffle_tags("品牌,红鞋，1,000人,白墙。", "品牌", np.random.default_rng(seed)).split(",", 1)
        assert first == "品牌"
        one, others = rest.split("，")
        assert one in parts
        assert others.endswith("。")
        assert {one, *(part for part in parts if part in others)} == parts


@given(WORDS, st.integers(1, 9), st.integers(0, 3))
def test_variants_are_distinct_orders_that_begin_as_written(tags, count, seed):
    caption = compose(", ".join(tags), "", PREFIX)
    orders = variants(caption, "acme", count, seed)
    assert orders[0] == caption
    assert len(set(orders)) == len(orders) <= count
    assert orders == variants(caption, "acme", count + 3, seed)[: len(orders)]
    assert all(Counter(order.split(", ")) == Counter(caption.split(", ")) for order in orders)
    assert all(clean_caption(order) == order for order in orders)


def test_variants_give_every_order_there_is_and_no_more():
    assert set(variants("a, b, c", "", 6, seed=1)) == set(map(", ".join, itertools.permutations("abc")))
    assert len(variants("a, b, c", "", 50, seed=1)) == 6
    assert len(variants("a, a, b", "", 50, seed=1)) == 3
    assert len(variants("acme, a, b", "acme", 50, seed=1)) == 2
    assert variants("a dog runs", "", 4, seed=1) == ("a dog runs",)
    assert variants("a, a", "", 4, seed=1) == ("a, a",)
    with pytest.raises(ValueError, match="at least 1"):
        variants("a, b", "", 0, seed=1)


def test_variants_are_addressed_and_no_order_is_favoured():
    assert variants("a, b, c, d", "", 4, seed=1) != variants("a, b, c, d", "", 4, seed=2)
    second = Counter(variants("a, b, c", "", 2, seed=seed)[1] for seed in range(600))
    assert len(second) == 5  # all but the first
    assert max(second.values()) < 2 * min(second.values())


def test_tokens_are_counted_with_the_closing_one_and_beyond_512(tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    assert count_tokens("", tokenizer) == 1
    text = "a red ball, " * 400
    assert count_tokens(text, tokenizer) == len(tokenizer.tokenize(text)) + 1 > 512


def test_settling_ends_where_an_ampersand_was_escaped_in_layers():
    text = "&lt;"
    for _ in range(6):
        text = text.replace("&", "&amp;").replace("p", "&#112;")
    assert settle("<" + text) == "<<"
    assert math.isfinite(len(settle("&" * 1000 + "amp" * 1000)))
