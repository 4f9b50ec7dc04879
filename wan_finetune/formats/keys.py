"""What a key of an adapter file means, whichever tool wrote it.

Sources are the tools' own writers: diffusers, PEFT, ComfyUI, musubi-tuner, DiffSynth-Studio, VideoX-Fun, ai-toolkit,
diffusion-pipe, FastVideo, finetrainers. `docs/export.md` says which writes what.
"""

import re
from typing import Literal, NamedTuple

from .names import canonical

Part = Literal["A.weight", "B.weight", "magnitude_vector", "alpha"]


class Meaning(NamedTuple):
    """What a key holds."""

    module: str
    """`blocks.N.MODULE` in diffusers' names."""
    part: Part
    expert: Literal["high", "low"] | None
    """Of a file with both experts: whose it is."""


EXPERT_MARKS: dict[str, Literal["high", "low"]] = {"transformer_1.": "high", "transformer_2.": "low"}
"""ai-toolkit marks both in a file for both; others have a plain `transformer.` beside `transformer_2.`."""
PREFIX = re.compile(r"(?:(?:base_model\.model|pipe\.dit|diffusion_model|transformer_[12]|transformer)\.|lora_unet__?)*")
ENDING = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<half>A|B|down|up)(?:\.weight|\.[A-Za-z0-9_-]+\.weight)?"
    r"|(?P<alpha>alpha|lora_alpha)"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight|\.[A-Za-z0-9_-]+\.weight|\.default)?"
    r")"
)
HALVES: dict[str, Part] = {"A": "A.weight", "down": "A.weight", "B": "B.weight", "up": "B.weight"}
FOREIGN = {
    r"lokr_|hada_": "it belongs to a LoKr or LoHa, which are other methods; train or export a plain LoRA",
    r"\.diff(_b)?$": "it is a whole difference of weights, not a LoRA; ask for the LoRA without it",
    r"dora_scale": "another tool's DoRA, which may take its norms along another axis; train a plain LoRA or one here",
    r"k_img|v_img|add_[kv]_proj|img_emb|image_embedder": "it is of an image-to-video model; use a text-to-video LoRA",
    r"lora_te|text_encoder": "it is of a text encoder, which is not adapted here; train without it",
    r"\.bias$": "LoRA biases are not read here; train with bias = none",
    r"double_blocks|single_blocks|transformer_blocks|up_blocks|down_blocks": "it is of another kind of model than Wan",
}
"""Signs of what is not read -> what to do about it."""


def cleaned(key: str) -> str:
    """The key without what torch.compile puts between a model and its parts, and DistributedDataParallel before it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def meaning(key: str) -> Meaning | None:
    """What a key holds; None where it is nothing that is read here."""
    key = cleaned(key)
    match = PREFIX.match(key)
    assert match is not None, "the prefix may be empty"
    ending = ENDING.fullmatch(key[match.end() :])
    if ending is None:
        return None
    module = canonical(ending["module"])
    if module is None:
        return None
    part = HALVES[ending["half"]] if ending["half"] else "alpha" if ending["alpha"] else "magnitude_vector"
    return Meaning(module, part, next((expert for mark, expert in EXPERT_MARKS.items() if mark in match[0]), None))


def why_not(key: str) -> str:
    """Why a key without a meaning has none."""
    for sign, reason in FOREIGN.items():
        if re.search(sign, key):
            return reason
    return "it is no weight of Wan's blocks that is read here; use a LoRA of their attention and feed-forward"


def shown(text: str, most: int = 120) -> str:
    """A stranger's text for a message: one line, of printable characters, not long."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= most else f"{text[:most]}..."
