"""What may be asked of a generator: a request, checked before anything is computed."""

import difflib
import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from ..errors import InputError
from ..sampling import SamplingSettings
from ..settings import Settings
from .settings import Limits, ServingSettings, explain, shortened

MOST_SEED = 2**32 - 1
FROM_DEFAULTS = (
    "width", "height", "num_frames", "fps", "steps", "guidance_scale", "guidance_scale_2", "negative_prompt"
)  # fmt: skip
"""Keys of a request that the served settings have a value for."""


class GenerationRequest(Settings):
    """One clip, or one with the adapter and one without."""

    prompt: str = Field(min_length=1)
    negative_prompt: str = ""
    seed: int = Field(0, ge=0, le=MOST_SEED)
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: float = Field(16.0, ge=1, le=120)
    steps: int = 40
    guidance_scale: float = 4.0
    guidance_scale_2: float = 3.0
    strength_high: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Of the adapter in the high-noise expert: layout and motion."""
    strength_low: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Of the adapter in the low-noise expert: texture and colour."""
    compare: bool = False
    """Make the clip without the adapter too, from the same noise."""


def parse_request(table: Mapping[str, Any], settings: ServingSettings) -> GenerationRequest:
    """A checked request; keys that are left out or null take the served settings' values, and the seed is drawn.

    Raises:
        InputError: for an unknown key, or a value that is wrong or beyond the limits.
    """
    given = {key: value for key, value in table.items() if value is not None}
    for key in given:
        if key not in GenerationRequest.model_fields:
            near = difflib.get_close_matches(str(key), GenerationRequest.model_fields, n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(GenerationRequest.model_fields)}"
            raise InputError(f"unknown key {str(key)[:60]!r}; {known}")
    defaults = {key: getattr(settings.sampling, key) for key in FROM_DEFAULTS}
    try:
        request = GenerationRequest.model_validate({"seed": secrets.randbelow(2**31), **defaults, **given})
        check_limits(request, settings.limits)
        sampling_of(request, 1.0)
    except ValidationError as error:
        raise InputError(explain(error)) from None
    return request


def sampling_of(request: GenerationRequest, shift: float) -> SamplingSettings:
    """The settings of `sample` for a request; raises ValidationError for a size that no clip can have."""
    return SamplingSettings.model_validate({**{key: getattr(request, key) for key in FROM_DEFAULTS}, "shift": shift})


def check_limits(request: GenerationRequest, limits: Limits) -> None:
    """Raises InputError for what is more than one request may ask for."""
    if not request.prompt.strip():
        raise InputError("prompt is empty; say what the clip shows")
    for name in ("prompt", "negative_prompt"):
        if (length := len(getattr(request, name))) > limits.prompt_characters:
            raise InputError(f"{name} has {length} characters; at most {limits.prompt_characters} are taken")
    most = {
        "width": limits.side,
        "height": limits.side,
        "num_frames": limits.num_frames,
        "steps": limits.steps,
        "guidance_scale": limits.guidance,
        "guidance_scale_2": limits.guidance,
        "strength_high": limits.strength,
        "strength_low": limits.strength,
    }
    for name, limit in most.items():
        # Written so that a value that is no number is refused.
        if not (value := getattr(request, name)) <= limit:
            raise InputError(f"{name} is {shortened(value)}, and at most {limit:g} is served")
    if request.width * request.height > limits.pixels:
        raise InputError(
            f"{request.width}x{request.height} is {request.width * request.height} pixels, and at most "
            f"{limits.pixels} are served; make width or height smaller"
        )
