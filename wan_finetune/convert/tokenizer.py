"""The tokenizer: files of `google/umt5-xxl`, or ComfyUI's sentencepiece model inside the text encoder's file."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .weights import Stored

if TYPE_CHECKING:
    from transformers import T5Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")
MAIN_FILE = FILES[0]
SENTINELS = 300
"""`<extra_id_N>` that google/umt5-xxl's tokenizer adds after its 256,000 pieces."""
MAX_TOKENS = 512
END = 1
"""Of `</s>`."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder.

    Raises:
        InputError: when it holds no tokenizer.
    """
    if not (folder / MAIN_FILE).is_file():
        raise InputError(f"{folder}: holds no {MAIN_FILE}; fetch the files of google/umt5-xxl again")
    return [folder / name for name in FILES if (folder / name).is_file()]


def require_tokenizer(folder: Path) -> None:
    """The tokenizer loads, and ends a text as UMT5 expects it.

    Raises:
        InputError: it does not.
    """
    from transformers import T5TokenizerFast

    try:
        ids = T5TokenizerFast.from_pretrained(folder, local_files_only=True)("a").input_ids
    except Exception as error:
        # Whatever a damaged file makes the library raise.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{folder}: the tokenizer does not load ({reason}); give --tokenizer FOLDER") from error
    if ids[-1:] != [END]:
        raise InputError(f"{folder}: does not end a text as UMT5's tokenizer does; give --tokenizer FOLDER")


def tokenizer_from_spiece(stored: Stored, num_rows: int) -> "T5Tokenizer":
    """The tokenizer of a sentencepiece model.

    Args:
        stored: its bytes, as ComfyUI keeps them.
        num_rows: words of the text encoder's table, which must have room for the pieces.

    Raises:
        InputError: bytes that are no such model.
    """
    try:
        from google.protobuf.message import DecodeError
    except ImportError:
        raise InputError(
            f"{stored.where}: is read by protobuf, which is not installed; pip install protobuf, or give "
            "--tokenizer FOLDER"
        ) from None
    from transformers import T5Tokenizer
    from transformers.convert_slow_tokenizer import import_protobuf

    from .tensor_files import read_whole

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(bytes(read_whole(stored.file, stored.key).numpy()))
    except DecodeError:
        model.Clear()
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if not pieces or [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise InputError(f"{stored.where}: is no sentencepiece model of UMT5; give the tokenizer by --tokenizer FOLDER")
    if len(pieces) > num_rows:
        raise InputError(f"{stored.where}: has {len(pieces)} pieces, the text encoder's table {num_rows} rows")
    return T5Tokenizer(
        vocab=pieces,
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap or None,
        extra_ids=SENTINELS if len(pieces) + SENTINELS <= num_rows else 0,
        model_max_length=MAX_TOKENS,
    )
