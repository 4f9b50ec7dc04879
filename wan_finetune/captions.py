"""Captions as the pipeline will see them."""

import html
import re

import ftfy


def clean_caption(caption: str) -> str:
    """What diffusers' WanPipeline does to a prompt (`prompt_clean`), so that training encodes the same string."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return re.sub(r"\s+", " ", repaired).strip()
