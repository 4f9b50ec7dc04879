"""Rows of one JSON document, read piece by piece: lists of objects, and objects that map file names to captions."""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from .paths import Unusable

_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


class Scanner:
    """Values of a JSON document one after another, holding about one of them in memory."""

    def __init__(self, file: IO[str], max_value_characters: int, chunk_characters: int = 2**16) -> None:
        self._file = file
        self._max = max_value_characters
        self._chunk = chunk_characters
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, characters: str) -> str:
        """The next character, which must be one of these. Raises Unusable."""
        found = self.peek()
        if not found:
            raise Unusable("ends too early")
        if found not in characters:
            raise Unusable(f"has {found!r} where {' or '.join(characters)} is due")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value whole. Raises Unusable."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise Unusable("is nested too deep") from None
            except json.JSONDecodeError as error:
                # It may only lack what has not been read yet.
                if len(self._text) - self._at > self._max or not self._read():
                    raise Unusable(f"is not valid JSON ({error.msg})") from None
            except ValueError as error:  # an integer of thousands of digits
                raise Unusable(f"is not valid JSON ({error})") from None
            else:
                length = end - self._at
                # A number that ends where the text read so far ends may go on.
                if isinstance(value, int | float) and end == len(self._text) and self._read():
                    continue
                self._at += length
                return value

    def _read(self) -> bool:
        """Read as much again as is held, so that a long value is tried only a few times."""
        self._text = self._text[self._at :]
        self._at = 0
        more = self._file.read(max(self._chunk, len(self._text)))
        self._text += more
        return bool(more)


def document_rows(file: IO[str], max_value_characters: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a document with their numbers, from 1: of a list of objects, on its own or as a member of an object
    (`{"data": [...]}`), or of an object that maps file names to captions, lists of captions, or objects.

    After a fault in the JSON itself nothing more can be told apart: it is the last row.

    Raises:
        Unusable: neither a list nor an object, or nothing in it.
    """
    scanner = Scanner(file, max_value_characters)
    start = scanner.peek()
    if start not in ("[", "{"):
        what = "is empty" if not start else "is neither a JSON list nor an object"
        raise Unusable(f'{what}; write [{{"file_name": ..., "caption": ...}}, ...]')
    number = 0
    try:
        for row in _elements(scanner) if start == "[" else _members(scanner):
            number += 1
            yield number, row if isinstance(row, dict) else 'is no object; write {"file_name": ..., "caption": ...}'
        if scanner.peek():
            raise Unusable("is followed by more text")
    except Unusable as fault:
        yield number + 1, f"{fault}: nothing from here on can be read; correct the JSON"


def _elements(scanner: Scanner) -> Iterator[Any]:
    scanner.take("[")
    if scanner.peek() == "]":
        scanner.take("]")
        return
    while True:
        yield scanner.value()
        if scanner.take(",]") == "]":
            return


def _members(scanner: Scanner) -> Iterator[Any]:
    scanner.take("{")
    if scanner.peek() == "}":
        scanner.take("}")
        return
    while True:
        if scanner.peek() != '"':
            scanner.take('"')
        key = scanner.value()
        scanner.take(":")
        if scanner.peek() == "[":
            yield from _list_member(scanner, key)
        else:
            value = scanner.value()
            if isinstance(value, dict):
                yield {"file_name": key, **value}
            elif "." in key:  # not a title or a version of the whole
                yield {"file_name": key, "caption": value}
        if scanner.take(",}") == "}":
            return


def _list_member(scanner: Scanner, key: str) -> Iterator[Any]:
    """A list of objects holds rows; any other list holds the captions of the file that `key` names."""
    captions = []
    for element in _elements(scanner):
        if isinstance(element, dict):
            yield element
        else:
            captions.append(element)
    if captions:
        yield {"file_name": key, "caption": captions}
