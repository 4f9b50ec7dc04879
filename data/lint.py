"""Captions judged: what keeps a trigger from learning the look, and what no text encoder should be given."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import ftfy.badness

from wan_finetune.captions import clean_caption, count_trigger, settle
from wan_finetune.spec import TEXT_TOKENS

from .style_words import COMMON_CHINESE, COMMON_CHINESE_WORDS, COMMON_ENGLISH, find_style_words

SHARE_EVERYWHERE = 0.9
"""Share of a set's captions from which on a word counts as standing in all of them."""
FEWEST_CAPTIONS = 10
"""Fewer captions than this say nothing about a share."""
MOST_CAPTIONS = 10_000
"""How many captions, the first of a set, the shares are counted in: the words of all would not fit into memory."""
FEWEST_WORDS = 3
"""A caption of fewer is very short; two characters of Chinese or Japanese are taken as a word."""
NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LintInput:
    """One caption of one clip."""

    clip: str
    """The clip's name. A clip's captions follow on each other."""
    written: str
    """As its source has it."""
    composed: str
    """As it is encoded (`captions.compose`)."""
    num_tokens: int | None = None
    """Of `composed`, with the closing one; None where they were not counted."""
    trigger: str | None = None
    """Where its source has a trigger of its own."""
    regularisation: bool = False
    """Whether it belongs to a set that is to do without the trigger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something to mend in a caption."""

    level: Literal["error", "warning"]
    """An error defeats the training of this caption; a warning makes it worse."""
    clip: str | None
    """The clip's name; None where it concerns the whole set."""
    message: str
    """What is wrong and what to do."""


def lint(captions: Iterable[LintInput], trigger: str) -> list[Finding]:
    """Everything there is to say against the captions of a set whose trigger is `trigger`, "" for none.

    In the order of the captions, then what they have in common. Time is linear in the text.
    """
    findings: list[Finding] = []
    likeness, words = _Likeness(), _Words()
    for caption in captions:
        own_trigger = settle(trigger if caption.trigger is None else caption.trigger)
        content = _content(caption.written, own_trigger)
        findings += _judge(caption, content, own_trigger)
        likeness.add(caption)
        if not caption.regularisation:
            words.add(content)
    return [*findings, *likeness.findings(), *words.findings()]


def _judge(caption: LintInput, content: str, trigger: str) -> Iterator[Finding]:
    """What one caption shows by itself; `content` is what it says without the trigger."""

    def error(message: str) -> Finding:
        return Finding(level="error", clip=caption.clip, message=message)

    def warning(message: str) -> Finding:
        return Finding(level="warning", clip=caption.clip, message=message)

    said = count_trigger(caption.composed, trigger)
    if not content:
        yield error("its caption is empty; describe what is to be seen")
    elif _count_words(content) < FEWEST_WORDS:
        yield warning(f"its caption is very short ({_quote(content)}); say who or what does what, and where")
    if caption.regularisation and said:
        yield error(f"belongs to a regularisation set and says the trigger {_quote(trigger)}; take it out")
    elif trigger and not caption.regularisation:
        if said == 0:
            yield error(f"does not say the trigger {_quote(trigger)}; put {{trigger}} into data.caption")
        elif said > 1:
            yield warning(
                f"says the trigger {_quote(trigger)} {said} times; write it once, or leave it to data.caption"
            )
        if count_trigger(caption.composed.casefold(), trigger.casefold()) > said:
            yield warning(f"says the trigger {_quote(trigger)} in other letter case as well; write it as the trigger")
    if caption.num_tokens is not None and caption.num_tokens > TEXT_TOKENS:
        lost = caption.num_tokens - TEXT_TOKENS
        yield warning(
            f"is {caption.num_tokens} tokens long and the encoder reads {TEXT_TOKENS}: the last {lost} are cut off; "
            "shorten it"
        )
        kept = len(caption.composed) * TEXT_TOKENS // caption.num_tokens
        if said and not caption.regularisation and not count_trigger(caption.composed[:kept], trigger):
            yield error("is so long that its trigger is cut off; shorten it, or put {trigger} first in data.caption")
    if not caption.regularisation and (style := find_style_words(content)):
        shown = ", ".join(map(_quote, style[:5]))
        yield warning(f"describes the look ({shown}), which the trigger is to stand for; say only what is to be seen")
    if hidden := _hidden_characters(caption.written):
        yield warning(f"holds characters that nobody can see ({', '.join(hidden[:NAMES_SHOWN])}); delete them")
    if garbled := _garbled(caption):
        yield Finding(level=garbled[0], clip=caption.clip, message=garbled[1])


def _content(written: str, trigger: str) -> str:
    """A caption as written, cleaned, without the trigger."""
    text = settle(written)
    if trigger and count_trigger(text, trigger):
        text = text.replace(trigger, " ")
    return text.strip(" ,;:.、。")


def _count_words(text: str) -> float:
    """Words of a text; where words are not spaced, two characters are taken as one."""
    unspaced = sum(map(len, _UNSPACED_RUN.findall(text)))
    return len(_WORD.findall(_UNSPACED_RUN.sub(" ", text))) + unspaced / 2


def _hidden_characters(text: str) -> list[str]:
    """Control, direction and other characters without a picture, each once, by number and name."""
    right_to_left = any(unicodedata.bidirectional(character) in ("R", "AL") for character in set(text))
    found = []
    for character in dict.fromkeys(text):
        category = unicodedata.category(character)
        if category not in ("Cc", "Cf") or character in "\t\n\r\x85" or character in _JOINING:
            continue
        if character in _DIRECTION_MARKS and right_to_left:
            continue
        found.append(f"U+{ord(character):04X} {unicodedata.name(character, 'control character').lower()}")
    return found


def _garbled(caption: LintInput) -> tuple[Literal["error", "warning"], str] | None:
    """Whether the text was read in another encoding than it was written in."""
    if "\ufffd" in caption.composed or "锟斤拷" in caption.composed:
        return "error", "holds characters that were lost on the way (U+FFFD); write them again and save it as UTF-8"
    for encoding in ("gb18030", "cp932") if not caption.written.isascii() else ():
        meant = caption.written.encode(encoding, "ignore").decode("utf-8", "replace")
        found = sum(map(len, _UNSPACED_RUN.findall(meant)))
        # Text that was read in the wrong way gives two losses for three characters at most, right text ten for one.
        if found >= 2 and meant.count("\ufffd") <= found:
            return "error", f"is garbled, most likely {_quote(meant)} read as {encoding}; save it as UTF-8"
    if ftfy.badness.is_bad(caption.composed):
        return "warning", f"looks garbled ({_quote(caption.composed)}); write it again and save it as UTF-8"
    if ftfy.badness.is_bad(caption.written):
        return (
            "warning",
            f"was garbled and has been mended to {_quote(clean_caption(caption.written))}; save it as UTF-8",
        )
    return None


@dataclass(slots=True)
class _Alike:
    """Captions that say the same."""

    clips: list[str]
    """The first few."""
    first: bytes
    last_clip: str
    count: int = 1
    """Clips, not captions."""
    exact: bool = True
    """Whether they are equal to the letter."""
    within: bool = False
    """Whether a clip says it twice."""


@dataclass(slots=True)
class _Likeness:
    """Finds captions that are equal but for letter case, punctuation and the order of tags."""

    groups: dict[bytes, _Alike] = field(default_factory=dict)

    def add(self, caption: LintInput) -> None:
        tags = (_PUNCTUATION.sub(" ", tag).split() for tag in re.split("[,，]", caption.composed.casefold()))
        key = _digest("\n".join(sorted(" ".join(words) for words in tags if words)))
        exact = _digest(caption.composed)
        group = self.groups.get(key)
        if group is None:
            self.groups[key] = _Alike(clips=[caption.clip], first=exact, last_clip=caption.clip)
            return
        group.exact &= exact == group.first
        if caption.clip == group.last_clip:
            group.within = True
            return
        group.count += 1
        group.last_clip = caption.clip
        if len(group.clips) <= NAMES_SHOWN:
            group.clips.append(caption.clip)

    def findings(self) -> Iterator[Finding]:
        for group in self.groups.values():
            apart = "" if group.exact else ", but for letter case, punctuation or order,"
            if group.count > 1:
                others = "another clip" if group.count == 2 else f"{group.count - 1} other clips"
                shown = ", ".join(group.clips[1 : NAMES_SHOWN + 1]) + (", ..." if group.count > NAMES_SHOWN + 1 else "")
                yield Finding(
                    level="warning",
                    clip=group.clips[0],
                    message=f"has the same caption{apart} as {others} ({shown}); say what tells them apart, or remove "
                    "copies",
                )
            elif group.within:
                message = f"two of its captions are the same{apart.rstrip(',')}; remove one"
                yield Finding(level="warning", clip=group.clips[0], message=message)


@dataclass(slots=True)
class _Words:
    """Counts in how many captions each word stands."""

    counts: Counter[str] = field(default_factory=Counter)
    spaced: int = 0
    """Captions that hold words in a script with spaces."""
    unspaced: int = 0
    """Captions that hold Chinese or Japanese."""
    seen: int = 0

    def add(self, content: str) -> None:
        self.seen += 1
        if self.seen > MOST_CAPTIONS:
            return
        runs = _UNSPACED_RUN.findall(content)
        words = {word for word in _WORD.findall(_UNSPACED_RUN.sub(" ", content.casefold())) if len(word) >= 4}
        self.spaced += bool(words)
        self.unspaced += bool(runs)
        self.counts.update(words - COMMON_ENGLISH)
        parts = {
            run[start : start + size] for run in runs for size in (2, 3, 4) for start in range(len(run) - size + 1)
        }
        self.counts.update(part for part in parts if COMMON_CHINESE.isdisjoint(part))

    def findings(self) -> Iterator[Finding]:
        def stands_everywhere(word: str, count: int) -> bool:
            captions = self.unspaced if _UNSPACED_RUN.match(word) else self.spaced
            return captions >= FEWEST_CAPTIONS and count >= SHARE_EVERYWHERE * captions

        found = {w for w, count in self.counts.items() if stands_everywhere(w, count) and w not in COMMON_CHINESE_WORDS}
        whole = sorted(word for word in found if not any(word != other and word in other for other in found))
        if whole:
            yield Finding(
                level="warning",
                clip=None,
                message=f"nearly every caption says {', '.join(map(_quote, whole[:8]))}, so that the look is learnt "
                "together with that; where it describes the look, leave it to the trigger",
            )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _quote(text: str) -> str:
    """A text in quotes, shortened, with nothing in it that a terminal would act on."""
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown) + '"'


_UNSPACED_RUN = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_JOINING = "\u200c\u200d"  # Persian and Indian scripts and emoji need them
_DIRECTION_MARKS = "\u200e\u200f\u061c"
