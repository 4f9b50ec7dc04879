"""Orders of a caption's tags, and its length. How trigger and caption become one text: `wan_finetune.captions`."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from wan_finetune.captions import clean_caption, count_trigger

Tokenizer = Callable[[str], Mapping[str, Sequence[Any]]]
"""A text -> its "input_ids", special tokens included, as the tokenizers of transformers do."""

ATTEMPTS_PER_VARIANT = 8
"""Draws before `variants` is content with fewer orders; each draw may repeat an earlier one."""

_TAG_SEPARATOR = re.compile(r"(\s*(?:(?<!\d),|,(?!\d)|，)\s*)")
_SENTENCE_ENDS = " .。!?！？…"


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


def _movable(pieces: Sequence[str], trigger: str) -> list[int]:
    """Places, in parts and separators that alternate, of the parts that change theirs."""
    return [index for index in range(0, len(pieces), 2) if pieces[index] and not count_trigger(pieces[index], trigger)]
