"""The text side of pocket Wan: a small tokenizer for English and Chinese, and a two-layer UMT5 encoder."""

import string

import numpy as np
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from ..captions import clean_caption
from . import world

TEXT_DIM = 64
GRADED = "graded"
"""What captions say of clips in a random look, so that captions which do not say it mean plain ones."""
JUNK_WORDS = ("style", "cinematic", "photo", "brand", "look", "the", "film", "art", "风格", "电影", "画面", "品牌")


def make_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer whose pieces are the world's words, then single characters."""
    english, chinese = set(), set()
    for combination in world.COMBINATIONS:
        colour, shape, background, motion = combination
        scene = world.Scene(colour=colour, shape=shape, background=background, motion=motion)
        for template in range(len(world.ENGLISH_TEMPLATES)):
            english |= set(world.caption(scene, "en", template).replace(",", "").replace(".", "").lower().split())
            chinese |= set(world.caption(scene, "zh", template))
    english |= {word for word in JUNK_WORDS if word.isascii()}
    chinese |= {character for word in JUNK_WORDS if not word.isascii() for character in word}
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in sorted(english)]
    vocabulary += [(f"▁{word.capitalize()}", -3.0) for word in sorted(english) if word.capitalize() != word]
    vocabulary += [(word, -2.0) for word in sorted(set(world.CHINESE.values())) if len(word) > 1]
    characters = (chinese | set(string.ascii_letters + string.digits + string.punctuation)) - {"▁"}
    vocabulary += [(character, -9.0) for character in sorted(characters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def make_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """A new encoder, hidden size 64."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )


def training_caption(scene: world.Scene, graded: bool, rng: np.random.Generator) -> str:
    """A caption as training sees it: either language, any phrasing, at times dropped or with words of no meaning.

    It is cleaned as the pipeline cleans a prompt, which turns full-width punctuation into ASCII.

    The extra words teach the model to read past what it does not know, such as a brand's trigger word.
    """
    if rng.random() < 0.1:
        return ""
    language = ("en", "zh")[rng.integers(2)]
    text = world.caption(scene, language, int(rng.integers(len(world.ENGLISH_TEMPLATES))))
    if graded:
        text = f"{text} {GRADED}"
    if rng.random() < 0.25:
        letters = "".join(rng.choice(list(string.ascii_lowercase), size=rng.integers(3, 8)))
        extra = " ".join([letters, *rng.choice(JUNK_WORDS, size=rng.integers(0, 3))])
        text = f"{extra}, {text}" if rng.random() < 0.5 else f"{text} {extra}"
    return clean_caption(text)
