"""Captions and prompts as the pipeline will see them: cleaned, with the trigger in its place."""

import html
import re
import unicodedata
from functools import lru_cache

import ftfy

DEFAULT_TEMPLATE = "{trigger}, {caption}"
"""How trigger and caption become one text, where a configuration does not say otherwise."""

_NESTED_AMPERSAND = re.compile(r"&(?:(?:amp|#0*38|#x0*26);?)+", re.IGNORECASE)
_SLOT = re.compile(r"(\{trigger\}|\{caption\})")
_JOINERS = " ,;:.|/+-–—、。，；：·"
_STOPS = (".", ",", ";", "。", "，", "、", "；")
_BRACKETS = ("()", "[]", "{}", "<>", '""', "''", "（）", "【】", "「」", "『』", "《》", "“”", "‘’")
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


def clean_caption(caption: str) -> str:
    """What diffusers' WanPipeline does to a prompt (`prompt_clean`), so that training encodes the same string."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return re.sub(r"\s+", " ", repaired).strip()


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


def _close_gap(before: str, after: str, at_start: bool, at_end: bool) -> tuple[str, str]:
    """The literals around a slot that stays empty, without what would have joined it to them."""
    while before.rstrip()[-1:] + after.lstrip()[:1] in _BRACKETS:
        before, after = before.rstrip()[:-1], after.lstrip()[1:]
    if at_start:
        return before.rstrip(_JOINERS), after.lstrip(_JOINERS)
    if at_end or after.lstrip()[:1] in _JOINERS:
        return before.rstrip(_JOINERS), after
    return before, after.lstrip()


def _is_one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters, or none, are inside one word of a script that has spaces between words."""
    return all(
        character
        and (character == "_" or unicodedata.category(character)[0] in "LMN")
        and not _UNSPACED.match(character)
        for character in (left, right)
    )
