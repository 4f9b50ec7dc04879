"""The tokenizer: files of `google/umt5-xxl`, or ComfyUI's sentencepiece model inside the text encoder's file."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .weights import Stored

if TYPE_CHECKING:
    from transformers import T5Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")
ONE_OF = ("tokenizer.json", "spiece.model")
SENTINELS = 300
"""`<extra_id_N>` that google/umt5-xxl's tokenizer adds after its 256,000 pieces."""
MAX_TOKENS = 512


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder.

    Raises:
        InputError: when it holds no tokenizer.
    """
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ONE_OF):
        raise InputError(f"{folder}: holds no tokenizer (neither {' nor '.join(ONE_OF)}); fetch google/umt5-xxl again")
    return files


def tokenizer_from_spiece(stored: Stored, num_rows: int) -> "T5Tokenizer":
    """The tokenizer of a sentencepiece model.

    Args:
        stored: its bytes, as ComfyUI keeps them.
        num_rows: words of the text encoder's table, which must have room for the pieces.

    Raises:
        InputError: bytes that are no such model.
    """
    from google.protobuf.message import DecodeError
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
