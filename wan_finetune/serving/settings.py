"""How an adapter is served: `settings.json` beside what serves it, and the environment, which has the last word."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..captions import DEFAULT_TEMPLATE
from ..errors import InputError
from ..safety import SafetySettings
from ..sampling import SamplingSettings
from ..settings import Settings

FILE_NAME = "settings.json"
ENVIRONMENT = {"base": "WAN_FINETUNE_BASE", "adapter": "WAN_FINETUNE_ADAPTER", "trigger": "WAN_FINETUNE_TRIGGER"}
"""Settings that the environment may set, and by which variable."""

Language = Literal["en", "zh"]


class Limits(Settings):
    """The most that one request may ask for."""

    prompt_characters: int = Field(2000, ge=1)
    """Of a prompt, and of a negative one."""
    side: int = Field(1280, ge=16)
    """Pixels of width or height."""
    pixels: int = Field(1280 * 720, ge=16 * 16)
    """Width times height."""
    num_frames: int = Field(81, ge=1)
    steps: int = Field(50, ge=1)
    guidance: float = Field(20.0, gt=0)
    strength: float = Field(2.0, gt=0)
    """Of the adapter in an expert; the least is 0."""


class ServingSettings(Settings):
    """All that `settings.json` may hold."""

    base: str = ""
    """`pocket`, a diffusers folder, or a repository of the Hub."""
    revision: str | None = None
    """Commit of a base from the Hub. Left out: the one that the adapter was trained on, where its files say it."""
    adapter: str = ""
    """Folder or Hub repository of the experts' two files. Left out: the folder that is served."""
    trigger: str | None = None
    """Put into every prompt that does not say it. Left out: the one that the adapter's files name."""
    template: str = DEFAULT_TEMPLATE
    """How trigger and prompt become one text; `data.caption` of the training."""
    title: str = "Wan2.2 LoRA"
    examples: tuple[str, ...] = ()
    """Prompts that the Space offers."""
    lang: Language = "en"
    """Of the Space's labels."""
    sampling: SamplingSettings = SamplingSettings()
    """What a request that leaves it out gets. Size, frames, fps and shift left out: those of the adapter's training."""
    limits: Limits = Limits()
    safety: SafetySettings = SafetySettings()


def read_settings(folder: Path, environment: Mapping[str, str]) -> ServingSettings:
    """The settings in a folder, defaults where it has none, and what the environment says instead.

    Raises:
        InputError: for a file that is no JSON, or a key or value that is wrong.
    """
    path = folder / FILE_NAME
    table: dict[str, Any] = {}
    if path.is_file():
        try:
            table = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(table, dict):
            raise InputError(f"{path}: must be a JSON object")
    for key, name in ENVIRONMENT.items():
        # An empty trigger is none; an empty base or adapter is a variable that was left empty.
        if environment.get(name) or (key == "trigger" and name in environment):
            table[key] = environment[name]
    try:
        return ServingSettings.model_validate(table)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first problem, as key: what is wrong, got what."""
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key} is required and missing"
    if isinstance(problem["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {shortened(problem['input'])}"


def shortened(value: Any) -> str:
    """A value in an error message, of a length that leaves the message readable."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
