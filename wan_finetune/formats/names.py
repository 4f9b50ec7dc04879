"""Names of a block's Linears in every spelling that adapter files use (sources: diffusers' converters, FastVideo)."""

import re
from collections.abc import Iterable

DIFFUSERS_TO_ORIGINAL = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
DIFFUSERS_TO_FASTVIDEO = {
    "attn1.to_q": "to_q",
    "attn1.to_k": "to_k",
    "attn1.to_v": "to_v",
    "attn1.to_out.0": "to_out",
    "attn2.to_q": "attn2.to_q",
    "attn2.to_k": "attn2.to_k",
    "attn2.to_v": "attn2.to_v",
    "attn2.to_out.0": "attn2.to_out",
    "ffn.net.0.proj": "ffn.fc_in",
    "ffn.net.2": "ffn.fc_out",
}
"""FastVideo's own names, in which its trainer saves."""
SPELLINGS = {
    spelling: name
    for name, original in DIFFUSERS_TO_ORIGINAL.items()
    for spelling in (name, original, original.replace(".", "_"), DIFFUSERS_TO_FASTVIDEO[name])
}
"""Every spelling of a Linear within its block -> diffusers' name. No spelling stands for two."""
# ASCII digits without leading zeros: `blocks.01` would be a second name of `blocks.1`.
BLOCK = re.compile(r"blocks[._](0|[1-9][0-9]{0,3})[._]([A-Za-z0-9_.]+)")


def canonical(module: str) -> str | None:
    """`blocks.N.MODULE` in diffusers' names from any spelling of it, without prefix; None where it is none of Wan's."""
    match = BLOCK.fullmatch(module)
    if match is None or match[2] not in SPELLINGS:
        return None
    return f"blocks.{match[1]}.{SPELLINGS[match[2]]}"


def original(module: str) -> str:
    """`blocks.N.MODULE` of diffusers in the original names; KeyError for a module that these lack."""
    blocks, number, name = module.split(".", 2)
    return f"{blocks}.{number}.{DIFFUSERS_TO_ORIGINAL[name]}"


def flattened(module: str) -> str:
    """`blocks.N.MODULE` of diffusers in the original names with underscores; KeyError as in `original`."""
    return original(module).replace(".", "_")


def nameless(modules: Iterable[str]) -> str | None:
    """The first module that the original names lack, None where they have all."""
    return next((module for module in modules if module.split(".", 2)[2] not in DIFFUSERS_TO_ORIGINAL), None)
