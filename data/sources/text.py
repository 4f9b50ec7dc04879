"""Text of captions: its encoding, and what no caption may hold."""

import codecs
import re
import unicodedata
from pathlib import Path

from .paths import Unusable, require_file

MAX_CAPTION_CHARACTERS = 16_384
"""Far beyond the 512 tokens that the text encoder sees: more is a wrong file or a wrong column."""
MAX_CAPTION_FILE_BYTES = 2**20

_ENCODINGS = (  # UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SUSPECT = re.compile("[\0\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def encoding_of(head: bytes) -> str:
    """The encoding that a file's first bytes declare by their byte-order mark; UTF-8 without one.

    Raises:
        Unusable: UTF-16 without its mark.
    """
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            return name
    if head[:200].count(0) > len(head[:200]) // 4:
        raise Unusable("looks like UTF-16 without a byte-order mark; save it as UTF-8")
    return "utf-8"


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen."""
    return not any(char.isprintable() and char != " " for char in text)


def check_caption(text: str) -> str:
    """The same text.

    Control characters other than these are left: the cleaning that every caption undergoes removes them.

    Raises:
        Unusable: too long, broken characters, or marks that make it read otherwise than it is encoded.
    """
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise Unusable(
            f"its caption is {len(text):,} characters long, more than {MAX_CAPTION_CHARACTERS:,}; shorten it, or check "
            "that this is the caption"
        )
    if found := _SUSPECT.search(text):
        code = ord(found[0])
        if code == 0:
            raise Unusable("its caption holds a NUL character, as UTF-16 read for UTF-8 does; save it as UTF-8")
        if 0xDC80 <= code <= 0xDCFF:  # what `surrogateescape` makes of a byte
            raise Unusable("its caption is not UTF-8; save it as UTF-8")
        if 0xD800 <= code <= 0xDFFF:
            raise Unusable(f"its caption holds half a character (U+{code:04X}); write it again")
        name = unicodedata.name(found[0]).lower()
        raise Unusable(
            f"its caption holds an invisible U+{code:04X} ({name}), with which it reads otherwise than it is encoded; "
            "remove it, or type that part again"
        )
    return text


def read_caption_file(path: Path) -> list[str]:
    """Captions of a text file as written, one a line, blank lines left out; empty where there is none.

    Raises:
        Unusable: no regular file, unreadable, not UTF-8 (or UTF-16 with its mark), or as `check_caption`.
    """
    try:
        require_file(path, path.name)
        with path.open("rb") as file:
            content = file.read(MAX_CAPTION_FILE_BYTES + 1)
    except OSError as error:
        raise Unusable(f"its caption {path.name} cannot be read ({error.strerror}); check its rights") from None
    return split_captions(content, path.name)


def split_captions(content: bytes, name: str) -> list[str]:
    """As `read_caption_file`, for the bytes of a caption file of that name."""
    if len(content) > MAX_CAPTION_FILE_BYTES:
        raise Unusable(f"its caption {name} is larger than 1 MiB; check that it is a caption")
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError:
        raise Unusable(f"its caption {name} is not UTF-8; save it as UTF-8") from None
    except Unusable as error:
        raise Unusable(f"its caption {name} {error}") from None
    # Not splitlines: to it, a form feed or a vertical tab inside a pasted caption ends a line.
    return [check_caption(line) for line in re.split(r"\r\n|\r|\n", text) if not is_blank(line)]


def captions_in(value: object, column: str) -> list[str]:
    """Captions that a table's cell holds: one text, or a list of texts. Empty where it holds none.

    Raises:
        Unusable: neither text nor a list of texts, or as `check_caption`.
    """
    captions = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str):
            if not is_blank(text):
                captions.append(check_caption(text))
        elif text is not None:
            raise Unusable(f"its {column} is neither text nor a list of texts; write one of them")
    return captions
