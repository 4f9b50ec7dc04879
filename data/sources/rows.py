"""Rows of a table, one at a time: .jsonl, .csv and .parquet, and pairs of text files that list clips and captions."""

import csv
import json
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from wan_finetune.errors import InputError

from .columns import CLIP_COLUMNS
from .documents import document_rows
from .paths import Unusable
from .text import encoding_of

Row = tuple[int, dict[str, Any] | str]
"""Its number, as an editor or a spreadsheet counts (from 1, a header included), with its cells, or with what is wrong
with it and the remedy."""

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CLIP_LISTS = ("videos.txt", "video.txt")
CAPTION_LISTS = ("captions.txt", "caption.txt", "prompts.txt", "prompt.txt")
MAX_ROW_CHARACTERS = 2**23
_LIMIT = f"is longer than {MAX_ROW_CHARACTERS:,} characters; check that it is one row"


def read_rows(table: Path, wanted: Collection[str] | None = None) -> Iterator[Row]:
    """Rows of a table in its own order, in bounded memory. `wanted` spares reading other columns of a parquet file.

    Raises:
        InputError: no table can be made out in the file.
    """
    suffix = table.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from parquet_rows(table, wanted)
        elif table.name.lower() in CLIP_LISTS:
            yield from _listed_rows(table)
        else:
            with open_text(table) as file:
                if suffix == ".csv":
                    yield from _csv_rows(file)
                elif _first_character(file) == "[" or (suffix == ".json" and not _holds_lines(file)):
                    yield from document_rows(file, MAX_ROW_CHARACTERS)
                else:
                    yield from _jsonl_rows(file)
    except Unusable as fault:
        raise InputError(f"data.sources: {table}: {fault}") from None
    except OSError as error:
        raise InputError(f"data.sources: {table}: cannot be read ({error.strerror or error}); check the file") from None


def open_text(table: Path) -> IO[str]:
    """A text file open for reading in the encoding that its first bytes declare. Raises Unusable and OSError.

    In UTF-8, bytes that are no UTF-8 become lone surrogates, which the check of captions and file names finds: so a
    fault stays one of its row.
    """
    with table.open("rb") as file:
        encoding = encoding_of(file.read(256))
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return table.open(encoding=encoding, errors=errors, newline="")


def _first_character(file: IO[str]) -> str:
    head = file.read(4096).lstrip("\ufeff \t\r\n")
    file.seek(0)
    return head[:1]


def _holds_lines(file: IO[str]) -> bool:
    """Whether a .json file holds one object a line, in the way of .jsonl."""
    try:
        row = json.loads(file.readline(MAX_ROW_CHARACTERS))
    except (ValueError, RecursionError):
        row = None
    file.seek(0)
    return isinstance(row, dict) and any(isinstance(row.get(name), str) for name in CLIP_COLUMNS)


def _jsonl_rows(file: IO[str]) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_ROW_CHARACTERS + 1):
        number += 1
        if len(line) > MAX_ROW_CHARACTERS:
            while line and not line.endswith("\n"):
                line = file.readline(MAX_ROW_CHARACTERS)
            yield number, _LIMIT
        elif line.strip("\ufeff \t\r\n"):
            yield number, json_object(line.strip("\ufeff \t\r\n"))


def json_object(text: str) -> dict[str, Any] | str:
    """The JSON object that a text is, or what is wrong with it and the remedy."""
    try:
        row = json.loads(text)
    except RecursionError:
        return 'is nested too deep; write {"file_name": ..., "caption": ...}'
    except json.JSONDecodeError as error:
        return f"is not valid JSON ({error.msg}, column {error.colno}); correct it, or remove the row"
    except ValueError as error:  # an integer of thousands of digits
        return f"is not valid JSON ({error}); correct it, or remove the row"
    if not isinstance(row, dict):
        return 'is no object; write {"file_name": ..., "caption": ...}'
    return row


def _csv_rows(file: IO[str]) -> Iterator[Row]:
    header = ""
    while not header.strip():
        line = file.readline(MAX_ROW_CHARACTERS)
        if not line:
            raise Unusable("is empty; write a header, such as file_name,caption, and a row for each clip")
        header = line
    if any(0xDC80 <= ord(char) <= 0xDCFF for char in header):  # what `surrogateescape` makes of a byte
        raise Unusable("its header is not UTF-8; save it as UTF-8")
    delimiter = next((mark for mark in ",;\t|" if _names_a_clip(header.split(mark))), ",")
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    lines = iter(lambda: file.readline(MAX_ROW_CHARACTERS), "")
    # strict: an open quote is an error, not a caption that holds the rest of the file.
    reader, number = csv.reader(lines, delimiter=delimiter, strict=True), 1
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f'is not valid CSV ({error}); put the caption in double quotes, and write " inside it as ""'
            continue
        if not cells:
            number -= 1
        elif len(cells) > len(names):
            yield number, f"has {len(cells)} cells for {len(names)} columns; put a caption with commas in double quotes"
        else:
            yield number, dict(zip_longest(names, cells))


def _names_a_clip(names: list[str]) -> bool:
    return len(names) > 1 and any(name.strip(' "\ufeff\r\n').lower() in CLIP_COLUMNS for name in names)


def parquet_schema(table: Path) -> Any:
    """The Arrow schema of a parquet file. Raises InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(table)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"data.sources: {table}: is no readable parquet file ({_line(error)}); write it again"
        ) from None


def parquet_rows(table: Path, wanted: Collection[str] | None, batch_rows: int = 512) -> Iterator[Row]:
    """As `read_rows`, `batch_rows` at a time. Raises Unusable where no row can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(table) as file:
            columns = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
            for batch in file.iter_batches(batch_rows, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        if number == 0:
            raise Unusable(f"is no readable parquet file ({_line(error)}); write it again") from None
        yield number + 1, f"cannot be read, nor what follows ({_line(error)}); write the file again"


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _listed_rows(table: Path) -> Iterator[Row]:
    """Line n of one file names a clip, line n of its neighbour is the caption."""
    neighbour = next((path for name in CAPTION_LISTS if (path := table.with_name(name)).is_file()), None)
    if neighbour is None:
        raise Unusable(f"lists clips, and no list of captions lies beside it; add {CAPTION_LISTS[0]}")
    with open_text(table) as clips, open_text(neighbour) as captions:
        for number, (clip, caption) in enumerate(zip_longest(clips, captions), 1):
            if clip is None or caption is None:
                short, long = (table, neighbour) if clip is None else (neighbour, table)
                if (caption if clip is None else clip).strip():
                    yield number, f"{short.name} ends before {long.name}; give each clip one line in both"
            elif clip.strip():
                yield number, {"file_name": clip.strip(), "caption": caption.rstrip("\r\n")}
            elif caption.strip():
                yield number, f"has a caption and no clip; write its name into {table.name}"
