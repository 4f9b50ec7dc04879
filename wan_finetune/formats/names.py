"""Module names of a block in diffusers and in the original Wan code, both ways (source: diffusers' converters)."""

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
ORIGINAL_TO_DIFFUSERS = {original: name for name, original in DIFFUSERS_TO_ORIGINAL.items()}


def rename_module(module: str, table: dict[str, str]) -> str:
    """`blocks.N.MODULE` with MODULE renamed by `table`; KeyError for a module that the table lacks."""
    blocks, number, name = module.split(".", 2)
    return f"{blocks}.{number}.{table[name]}"
