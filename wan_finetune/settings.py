"""Configuration files: strict TOML, `section.key=value` overrides, and errors that name file, line and key."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError


class Settings(BaseModel):
    """Base of every configuration table: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


def load_settings(model: type[S], path: Path, overrides: list[str]) -> S:
    """Read `path`, apply overrides (values are TOML; a bare word is taken as a string), and validate.

    Raises:
        InputError: with file, line and key of everything that is wrong, and the nearest known key.
    """
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such configuration file" + (f"; there are {', '.join(near)}" if near else ""))
    text = path.read_text(encoding="utf-8-sig")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    origin: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = parse_override(override)
        target = table
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise InputError(f"{override!r}: {key} is a value, not a section")
        target[keys[-1]] = value
        origin[keys] = override
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problems = error.errors()
        lines = [explain(p, model, path, text, origin) for p in problems if not is_inherited(p, problems)]
        raise InputError("\n".join(lines)) from None


def is_inherited(problem: Any, problems: list[Any]) -> bool:
    """Whether a table that was copied into another one repeats a problem, which is told of once."""
    here, same = problem["loc"], [other["loc"] for other in problems if other["type"] == problem["type"]]
    return any(0 < len(other) < len(here) and here[-len(other) :] == other for other in same)


def parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=value` -> (("a", "b"), value)."""
    name, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name.strip()):
        raise InputError(f"{override!r} is not section.key=value, such as lora.rank=8")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if not re.fullmatch(r"[^\s\"'\[\]{}=,]+", value):
            raise InputError(f"{override!r}: the value is not TOML; strings with spaces need quotes") from None
        parsed = value
    return tuple(name.strip().split(".")), parsed


def explain(problem: Any, model: type[Settings], path: Path, text: str, origin: dict[tuple[str, ...], str]) -> str:
    """One pydantic error as one line: where, what, and what is near."""
    location = tuple(part for part in problem["loc"] if isinstance(part, str))
    dotted = ".".join(str(part) for part in problem["loc"])
    where = next((repr(origin[keys]) for keys in origin if location[: len(keys)] == keys), None)
    if where is None:
        line = line_of(text, location)
        where = f"{path}:{line}" if line else str(path)
    if problem["type"] == "extra_forbidden":
        known = known_keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {dotted}; {advice}"
    if problem["type"] == "missing":
        return f"{where}: {dotted} is required and missing"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        # About a table as a whole: what it holds is more than one line.
        return f"{where}: {dotted}: {message}" if dotted else f"{where}: {message}"
    return f"{where}: {dotted}: {message}, got {problem['input']!r}"


def known_keys(model: type[Settings], location: tuple[str, ...]) -> list[str]:
    """The keys of the table at `location`."""
    current: Any = model
    for part in location:
        annotation = current.model_fields[part].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        current = next((a for a in inner if isinstance(a, type) and issubclass(a, Settings)), None)
        if current is None:
            return []
    return list(current.model_fields)


def line_of(text: str, location: tuple[str, ...]) -> int | None:
    """The line on which the key, or the nearest section that holds it, stands."""
    section: tuple[str, ...] = ()
    best: int | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            section = tuple(header[1].split("."))
            if location[: len(section)] == section:
                best = best or number
        elif (key := re.match(r"\s*([\w.-]+)\s*=", line)) and (*section, *key[1].split(".")) == location[
            : len(section) + len(key[1].split("."))
        ]:
            return number
    return best
