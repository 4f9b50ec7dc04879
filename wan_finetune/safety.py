"""The safety filter: what is not made for strangers, by the words of a prompt and by the frames of a clip.

On in whatever serves others. A list of words is a first net, with holes: paraphrase passes it. The frames are the
second, which looks at what was made, whatever was written. Neither makes a service safe to leave alone.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .captions import settle
from .errors import InputError
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_SWITCH = "WAN_FINETUNE_PROMPT_FILTER"
"""Environment variable: `off` turns the prompt filter off."""
FRAME_SWITCH = "WAN_FINETUNE_FRAME_FILTER"
"""Environment variable: a classifier's name or folder, or `off`, which turns the frame filter off."""
TERMS_FILE = "WAN_FINETUNE_BLOCKED_TERMS"
"""Environment variable: a text file of further blocked terms, one a line."""

UNSAFE_LABELS = frozenset(
    {
        *("nsfw", "unsafe", "explicit", "sexual", "sexy", "erotic", "porn", "pornography", "hentai", "nude", "nudity"),
        *("gore", "violence", "violent"),
    }
)
"""What classifiers call what is not to be shown; names are compared in small letters."""

# What a word may be disguised with. In ordinary text these stand for themselves, so each is tried in place only.
_DISGUISES = {"a": "a4@*", "e": "e3*", "i": "i1!|*", "o": "o0*", "u": "u*", "s": "s5$", "t": "t7+", "l": "l1|"}
_LOOKALIKES = str.maketrans("аеорсухіјѕкмтнвпɑοεανκτρυıø", "aeopcyxijskmthbnaoeavktpuio")
_FLAGS = {0x1F1E6 + i: chr(ord("a") + i) for i in range(26)}
_FILLERS = dict.fromkeys(map(ord, "\u115f\u1160\u3164\uffa0"))
_START, _END = "(?<![a-z0-9])", "(?![a-z0-9])"
_GAP = r"[\W_]"
_NOISE = re.compile(r"[\s*·・\-_.|/\\~+=^'\"`<>#$%&@]+")
_UNDER_AGE = re.compile(
    r"(?<!\d)(?:\d|1[0-7])[\s-]*(?:years?[\s-]*olds?|yrs?[\s-]*old|y/?o\b|岁|歲)"
    r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven)teen)"
    r"[\s-]+years?[\s-]+old"
    r"|(?<![二三四五六七八九百])十[一二三四五六七]?[岁歲]|(?<![十百])[一二两三四五六七八九][岁歲]"
)
_REASONS = {
    "minors": ("sexual content with minors", "涉及未成年人的性内容"),
    "sexual": ("explicit sexual content", "露骨的性内容"),
    "gore": ("gore or self-harm", "血腥或自残内容"),
    "real_people": ("imitation of real people", "冒充真实人物"),
    "other": ("a term that this service blocks", "本服务禁用的词语"),
}


class Refused(InputError):
    """A filter said no. The message is for whoever asked; it names the kind of content, never the term."""

    def __init__(self, category: str, english: str, chinese: str) -> None:
        super().__init__(english)
        self.category = category
        self.texts = {"en": english, "zh": chinese}


class SafetySettings(Settings):
    """How frames are judged; whether they are, the environment alone can say."""

    classifier: str = "Falconsai/nsfw_image_detection"
    """Image classifier, a folder or a Hub repository, as `AutoModelForImageClassification` opens it."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """A frame is blocked from this probability of all unsafe labels together."""
    frames: int = Field(8, ge=2)
    """Frames of a clip that are looked at, evenly spaced, its first and last among them."""
    unsafe_labels: tuple[str, ...] = ()
    """The classifier's labels that are unsafe. Left out: those with a usual name, such as nsfw."""


class Together(NamedTuple):
    """Two groups of words that are blocked in one prompt and are harmless apart."""

    category: str
    one: "Words"
    other: "Words"


class Words:
    """Terms in English, met as whole words, and in Chinese, met anywhere."""

    def __init__(self, english: Iterable[str], chinese: Iterable[str]) -> None:
        self.english = _any_of(map(_english, english))
        self.chinese = _any_of(map(_chinese, chinese))

    def found_in(self, text: str, unspaced: str) -> bool:
        return bool(self.english.search(text) or self.chinese.search(unspaced))


class PromptFilter:
    """Blocked terms of `safety_terms.json`, and an operator's own."""

    def __init__(self, more: Iterable[str] = ()) -> None:
        terms = json.loads((Path(__file__).parent / "safety_terms.json").read_text(encoding="utf-8"))
        pairs = terms.pop("together")
        self.passes = _any_of(map(_english, terms.pop("passes")["en"]))
        self.alone = {category: _words(found) for category, found in terms.items()}
        self.together = [Together(pair["category"], _words(pair["one"]), _words(pair["with"])) for pair in pairs]
        own = [normalised(term).replace("#", "") for term in more if any(map(str.isalnum, term))]
        chinese = [term for term in own if re.search("[\u2e80-\u9fff]", term)]
        self.alone["other"] = Words([term for term in own if term not in chinese], map(_unspaced, chinese))

    def find(self, prompt: str) -> str | None:
        """The kind of content that a prompt asks for and that is blocked; None for any other prompt."""
        # The pipeline undoes entities and garbled characters, so what they hide is what will be drawn.
        text = normalised(settle(prompt))
        text = self.passes.sub(lambda match: "\n" * len(match[0]), text)
        unspaced = _unspaced(text)
        for pair in self.together:
            young = pair.one.found_in(text, unspaced) or (pair.category == "minors" and _UNDER_AGE.search(text))
            if young and pair.other.found_in(text, unspaced):
                return pair.category
        return next((name for name, words in self.alone.items() if words.found_in(text, unspaced)), None)

    def check(self, prompt: str) -> None:
        """Raises Refused for a prompt with blocked content."""
        if category := self.find(prompt):
            english, chinese = _REASONS[category]
            raise Refused(
                category,
                f"this prompt is not served, because it reads like {english}; change it and try again",
                f"该提示词疑似包含{chinese}，无法生成。请修改后重试。",
            )


class FrameFilter:
    """An image classifier that looks at several frames of a clip."""

    def __init__(self, settings: SafetySettings) -> None:
        """Open the classifier.

        Raises:
            InputError: when it cannot be had, is not whole, or has no label that is known as unsafe.
        """
        self.settings = settings
        self.model, self.processor = _open_classifier(settings.classifier)
        self.unsafe = _unsafe_labels(self.model.config.id2label, settings)

    def score(self, clip: NDArray[np.uint8]) -> float:
        """Probability that the worst of the frames looked at is unsafe; `clip` is [F, H, W, 3], RGB."""
        import torch

        chosen = np.unique(np.linspace(0, len(clip) - 1, self.settings.frames).round().astype(int))
        inputs = self.processor(images=list(clip[chosen]), return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            probabilities = self.model(inputs["pixel_values"]).logits.float().softmax(-1)
        return float(probabilities[:, self.unsafe].sum(-1).max())

    def check(self, clip: NDArray[np.uint8]) -> None:
        """Raises Refused for a clip that is not to be shown."""
        # Written so that a score that is no number blocks.
        if not self.score(clip) < self.settings.threshold:
            raise Refused(
                "frames",
                "the clip was made and is not shown, because the image filter took it for unsafe; change the prompt "
                "or the seed",
                "生成的视频未通过图像安全检查，不予显示。请修改提示词或随机种子。",
            )


def open_prompt_filter(environment: Mapping[str, str]) -> PromptFilter | None:
    """The prompt filter; None where the environment turns it off."""
    if _switched_off(PROMPT_SWITCH, environment, only_a_switch=True):
        return None
    if not (path := environment.get(TERMS_FILE)):
        return PromptFilter()
    try:
        return PromptFilter(Path(path).read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{TERMS_FILE}: {path} is no readable text file ({type(error).__name__})") from None


def open_frame_filter(settings: SafetySettings, environment: Mapping[str, str]) -> FrameFilter | None:
    """The frame filter; None where the environment turns it off, and an error where it cannot be had."""
    if _switched_off(FRAME_SWITCH, environment):
        return None
    if classifier := environment.get(FRAME_SWITCH):
        settings = settings.model_copy(update={"classifier": classifier})
    return FrameFilter(settings)


@lru_cache(maxsize=256)
def normalised(text: str) -> str:
    """Text as terms are compared with it: one form of each letter, small, and nothing that cannot be seen."""
    text = unicodedata.normalize("NFKC", text).translate(_FLAGS).casefold()
    text = unicodedata.normalize("NFKD", text).translate(_FILLERS)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn", "Me", "Cc") or c in "\t\n\r")
    # Runs of three and more letters are no spelling of any word.
    return re.sub(r"\bx{3,}\b|([a-z])\1{2,}", lambda match: match[1] or "xxx", text.translate(_LOOKALIKES))


def _switched_off(name: str, environment: Mapping[str, str], only_a_switch: bool = False) -> bool:
    value = environment.get(name, "").strip()
    if only_a_switch and value not in ("", "on", "off"):
        raise InputError(f'{name}: "off" turns the filter off, "on" is the default, got {value!r}')
    return value == "off"


def _words(terms: Mapping[str, Sequence[str]]) -> Words:
    return Words(terms.get("en", ()), terms.get("zh", ()))


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


def _english(term: str) -> str:
    """A term in any disguise: other signs for letters, no or other signs between words, or a gap after each letter."""
    rest = "[a-z0-9]*" if term.endswith("*") else ""
    words = term.rstrip("*").split()
    written = f"{_GAP}*".join("".join(f"[{re.escape(_DISGUISES.get(c, c))}]" for c in word) for word in words)
    apart = f"{_GAP}+".join(re.escape(letter) for letter in "".join(words))
    return f"{_START}(?:{written}{rest}|{apart}){_END}"


def _chinese(term: str) -> str:
    """`term#before#after`: a term, and the characters beside it with which it is another word."""
    word, before, after = [*term.split("#"), "", ""][:3]
    return (f"(?<![{before}])" if before else "") + re.escape(word) + (f"(?![{after}])" if after else "")


def _unspaced(text: str) -> str:
    """Text without the spaces and signs that Chinese does not need; its own punctuation still parts clauses."""
    return _NOISE.sub("", text)


def _open_classifier(source: str) -> "tuple[PreTrainedModel, Any]":
    from .quiet import quiet_imports

    quiet_imports()
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        processor = AutoImageProcessor.from_pretrained(source)
        model, loading = AutoModelForImageClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise InputError(
            f"the safety filter's image classifier {source!r} cannot be loaded ({type(error).__name__}), and without "
            "it nothing is served; check name, folder and connection, name another one in "
            f"{FRAME_SWITCH}, or set that to off to serve unfiltered frames"
        ) from error
    if loading["missing_keys"]:
        raise InputError(
            f"the safety filter's image classifier {source!r} lacks {len(loading['missing_keys'])} weights, such as "
            f"{min(loading['missing_keys'])}, so it is no trained classifier"
        )
    return model.eval().requires_grad_(False), processor


def _unsafe_labels(labels: Mapping[int, str], settings: SafetySettings) -> list[int]:
    wanted = {label.casefold() for label in settings.unsafe_labels} or UNSAFE_LABELS
    found = sorted(index for index, label in labels.items() if str(label).casefold() in wanted)
    if not found or len(found) == len(labels):
        raise InputError(
            f"safety: which labels of {settings.classifier!r} are unsafe is not known (it has "
            f"{', '.join(map(str, labels.values()))}); name them in safety.unsafe_labels"
        )
    return found
