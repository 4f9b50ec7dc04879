"""From captions as written to the texts that are encoded: trigger, template, orders of tags, length."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from wan_finetune.captions import clean_caption

Tokenizer = Callable[[str], Mapping[str, Sequence[Any]]]
"""A text -> its "input_ids", special tokens included, as the tokenizers of transformers do."""

ATTEMPTS_PER_VARIANT = 8
"""Draws before `variants` is content with fewer orders; each draw may repeat an earlier one."""

_NESTED_AMPERSAND = re.compile(r"&(?:(?:amp|#0*38|#x0*26);?)+", re.IGNORECASE)
_SLOT = re.compile(r"(\{trigger\}|\{caption\})")
_JOINERS = " ,;:.|/+-–—、。，；：·"
_STOPS = (".", ",", ";", "。", "，", "、", "；")
_BRACKETS = ("()", "[]", "{}", "<>", '""', "''", "（）", "【】", "「」", "『』", "《》", "“”", "‘’")
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_TAG_SEPARATOR = re.compile(r"(\s*(?:(?<!\d),|,(?!\d)|，)\s*)")
_SENTENCE_ENDS = " .。!?！？…"


def compose(caption: str, trigger: str, template: str) -> str:
    """The text that is encoded for a caption: cleaned as the pipeline cleans a prompt, with the trigger in its place.

    `template` holds {caption} once and {trigger} at most once. A caption that says the trigger already is not given
    another, and neither is any where `trigger` is empty; the punctuation that would have joined it goes too. Cleaning
    the result again changes nothing, so what is encoded is what a cache's record says.
    """
    text, word = settle(caption), settle(trigger)
    if count_trigger(text, word):
        word = ""
    pieces = _SLOT.split(template)
    values = {"{trigger}": word, "{caption}": text}
    slots = range(1, len(pieces), 2)
    for slot in slots:
        pieces[slot] = values[pieces[slot]]
    for slot in slots:
        if not pieces[slot]:
            at_start = not any(piece.strip(_JOINERS) for piece in pieces[:slot])
            at_end = not any(piece.strip(_JOINERS) for piece in pieces[slot + 1 :])
            pieces[slot - 1], pieces[slot + 1] = _close_gap(pieces[slot - 1], pieces[slot + 1], at_start, at_end)
    for slot in slots:
        if "".join(pieces[slot + 1 :]).lstrip().startswith(_STOPS):
            pieces[slot] = pieces[slot].rstrip("".join(_STOPS) + " ")  # nobody wants "A dog runs., acme"
    return settle("".join(pieces))


@lru_cache(maxsize=1024)
def settle(text: str) -> str:
    """The text cleaned until cleaning changes nothing: one pass may leave "&amp;lt;" as "&lt;"."""
    while True:
        # An ampersand that was escaped a thousand times would cost a thousand passes.
        cleaned = clean_caption(_NESTED_AMPERSAND.sub("&amp;", text))
        if cleaned == text:
            return text
        text = cleaned


def count_trigger(text: str, trigger: str) -> int:
    """How often a cleaned text says a cleaned trigger; 0 for an empty trigger.

    As whole words, letter case included, where the script puts spaces between words. Chinese, Japanese, Thai and others
    do not, and Korean appends its particles, so there any occurrence counts.
    """
    if not trigger:
        return 0
    found = 0
    for match in re.finditer(re.escape(trigger), text):
        before, after = text[max(match.start() - 1, 0) : match.start()], text[match.end() : match.end() + 1]
        found += not (_is_one_word(before, trigger[0]) or _is_one_word(trigger[-1], after))
    return found


def shuffle_tags(caption: str, trigger: str, rng: np.random.Generator) -> str:
    """The comma-separated parts of a caption in another order.

    The part that says the trigger stays where it is, as do separators and the end of the sentence. 1,000 is one part.
    """
    end = len(caption.rstrip(_SENTENCE_ENDS))
    pieces = _TAG_SEPARATOR.split(caption[:end])
    movable = _movable(pieces, trigger)
    tags = [pieces[index] for index in movable]
    for index, drawn in zip(movable, rng.permutation(len(tags)), strict=True):
        pieces[index] = tags[drawn]
    return "".join(pieces) + caption[end:]


def variants(caption: str, trigger: str, count: int, seed: int) -> tuple[str, ...]:
    """Up to `count` orders of a caption's tags, each another text, the caption as it stands first.

    Few and fixed, because each of them is encoded and cached. A function of its arguments alone; asking for more adds
    to the end. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    from wan_finetune.addressing import numpy_rng

    orders = {caption: None}
    wanted = min(count, _count_orders(caption, trigger))
    if wanted == 1:
        return (caption,)
    clean = clean_caption(caption) == caption
    for attempt in range(1, ATTEMPTS_PER_VARIANT * count + 1):
        if len(orders) >= wanted:
            break
        order = shuffle_tags(caption, trigger, numpy_rng(seed, "tags", caption, attempt))
        # A new order can make two halves of a garbled character neighbours, which cleaning would join.
        if not clean or clean_caption(order) == order:
            orders[order] = None
    return tuple(orders)


def count_tokens(text: str, tokenizer: Tokenizer) -> int:
    """Tokens of a text with the one that ends it, not cut off at 512."""
    return len(tokenizer(text)["input_ids"])


def _count_orders(caption: str, trigger: str) -> float:
    """How many different texts the orders of a caption's tags make; infinite beyond what anyone encodes."""
    pieces = _TAG_SEPARATOR.split(caption.rstrip(_SENTENCE_ENDS))
    tags = Counter(pieces[index] for index in _movable(pieces, trigger))
    if len(tags) <= 1:
        return 1
    if tags.total() > 12:
        return math.inf
    return math.factorial(tags.total()) // math.prod(map(math.factorial, tags.values()))


def _close_gap(before: str, after: str, at_start: bool, at_end: bool) -> tuple[str, str]:
    """The literals around a slot that stays empty, without what would have joined it to them."""
    while before.rstrip()[-1:] + after.lstrip()[:1] in _BRACKETS:
        before, after = before.rstrip()[:-1], after.lstrip()[1:]
    if at_start:
        return before.rstrip(_JOINERS), after.lstrip(_JOINERS)
    if at_end or after.lstrip()[:1] in _JOINERS:
        return before.rstrip(_JOINERS), after
    return before, after.lstrip()


def _movable(pieces: Sequence[str], trigger: str) -> list[int]:
    """Places, in parts and separators that alternate, of the parts that change theirs."""
    return [index for index in range(0, len(pieces), 2) if pieces[index] and not count_trigger(pieces[index], trigger)]


def _is_one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters, or none, are inside one word of a script that has spaces between words."""
    return all(
        character
        and (character == "_" or unicodedata.category(character)[0] in "LMN")
        and not _UNSPACED.match(character)
        for character in (left, right)
    )
