"""The one generator behind the Space, the endpoint and the local server: a checked request becomes filtered clips."""

import hashlib
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray
from pydantic import ValidationError

from ..captions import compose
from ..errors import InputError
from ..experts import EXPERTS
from ..pipeline import ADAPTER_NAME, adapter_source, load_pipeline, read_adapters
from ..safety import FrameFilter, PromptFilter, open_frame_filter, open_prompt_filter
from ..sampling import Request, SamplingSettings, sample, versions
from ..video import write_video
from .asking import GenerationRequest, parse_request, sampling_of
from .settings import ENVIRONMENT, ServingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of a request."""

    video: bytes
    """An mp4 file, with the adapter."""
    base_video: bytes | None
    """The same without it, where that was asked for."""
    prompt: str
    """As it was given to the model, trigger included."""
    request: GenerationRequest
    """All values that were used, drawn seed included."""
    shift: float

    @property
    def settings(self) -> dict[str, Any]:
        """How to make the clip again."""
        asked = self.request.model_dump(exclude={"compare"})
        return {**asked, "prompt": self.prompt, "shift": self.shift, "versions": versions()}


class Generator:
    """A base with an adapter in, loaded once; one request at a time."""

    def __init__(
        self,
        pipe: WanPipeline,
        settings: ServingSettings,
        prompt_filter: PromptFilter | None,
        frame_filter: FrameFilter | None,
    ) -> None:
        self.pipe = pipe
        self.settings = settings
        self.prompt_filter = prompt_filter
        self.frame_filter = frame_filter
        self.shift = float(pipe.scheduler.config.flow_shift)
        # Strengths are the pipeline's state: two requests at once would get each other's.
        self.lock = threading.Lock()

    def check(self, table: Mapping[str, Any]) -> GenerationRequest:
        """A request that may be made: valid, within the limits, and past the prompt filter.

        Raises:
            InputError: `Refused` from the prompt filter, or what is wrong with the request.
        """
        request = parse_request(table, self.settings)
        if self.prompt_filter is not None:
            self.prompt_filter.check(self.composed(request.prompt))
        return request

    def composed(self, prompt: str) -> str:
        """The prompt as training composed captions."""
        return compose(prompt, self.settings.trigger or "", self.settings.template)

    def generate(self, table: Mapping[str, Any]) -> Made:
        """Make what is asked for.

        Raises:
            InputError: as `check`; `Refused` from the frame filter; and for a clip that memory cannot hold.
        """
        request = self.check(table)
        with self.lock:
            try:
                clip = self.clip(request)
                base = self.clip(request, with_adapter=False) if request.compare else None
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise InputError(
                    "this machine's memory cannot hold a clip of this size; ask for fewer frames or fewer pixels"
                ) from None
        for made in (clip, base):
            if made is not None and self.frame_filter is not None:
                self.frame_filter.check(made)
        return Made(
            video=as_mp4(clip, request.fps),
            base_video=None if base is None else as_mp4(base, request.fps),
            prompt=self.composed(request.prompt),
            request=request,
            shift=self.shift,
        )

    def clip(self, request: GenerationRequest, with_adapter: bool = True) -> NDArray[np.uint8]:
        """One clip, [F, H, W, 3], through the function that made the training's previews."""
        for expert, strength in ((EXPERTS["high"], request.strength_high), (EXPERTS["low"], request.strength_low)):
            model = getattr(self.pipe, expert.component, None)
            if model is None or ADAPTER_NAME not in getattr(model, "peft_config", {}):
                continue
            if with_adapter:
                model.enable_adapters()
                model.set_adapters(ADAPTER_NAME, strength)
            else:
                model.disable_adapters()
        wanted = Request(prompt=self.composed(request.prompt), seed=request.seed)
        return sample(self.pipe, [wanted], sampling_of(request, self.shift))[0]


def open_generator(settings: ServingSettings, environment: Mapping[str, str]) -> Generator:
    """Open filters, base and adapter.

    Raises:
        InputError: when one of them cannot be had; without its filters nothing is served.
    """
    prompt_filter = open_prompt_filter(environment)
    frame_filter = open_frame_filter(settings.safety, environment)
    for key in ("base", "adapter"):
        if not getattr(settings, key):
            raise InputError(f"no {key} is named; put {key!r} into settings.json, or set {ENVIRONMENT[key]}")
    folder = adapter_source(settings.adapter)
    # Read for what it says of itself, and so that a damaged one is told of before the base is fetched.
    facts = read_adapters(folder)[0].about
    settings = with_facts(settings, facts)
    shift = settings.sampling.shift if "shift" in settings.sampling.model_fields_set else None
    pipe = load_pipeline(settings.base, folder, shift=shift, revision=settings.revision)
    return Generator(pipe, settings, prompt_filter, frame_filter)


def with_facts(settings: ServingSettings, facts: Mapping[str, str]) -> ServingSettings:
    """Settings with what the adapter's files say, where the settings say nothing.

    That is its trigger, the size, length and rate of the clips that it was trained on, and the commit of its base.
    """
    changes: dict[str, Any] = {}
    if settings.trigger is None:
        changes["trigger"] = facts.get("trigger", "")
    if settings.revision is None and facts.get("base") == settings.base:
        changes["revision"] = facts.get("base_revision")
    width, _, height = facts.get("resolution", "").partition("x")
    trained = {"width": width, "height": height, "num_frames": facts.get("frames"), "fps": facts.get("fps")}
    said = settings.sampling.model_fields_set
    if said & {"width", "height"}:
        trained |= {"width": None, "height": None}
    added = {key: value for key, value in trained.items() if value and key not in said}
    if added:
        sampling = {**settings.sampling.model_dump(include=said), **added}
        try:
            changes["sampling"] = SamplingSettings.model_validate(sampling)
            parse_request({"prompt": "a"}, settings.model_copy(update=changes))
        except (ValidationError, InputError):
            # Trained on what cannot be asked for here, such as clips beyond the limits.
            changes.pop("sampling", None)
    return settings.model_copy(update=changes)


def as_mp4(clip: NDArray[np.uint8], fps: float) -> bytes:
    """A clip as the bytes of an mp4 file."""
    with tempfile.TemporaryDirectory(prefix="wan-finetune-") as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip, fps)
        return path.read_bytes()


def content_name(video: bytes) -> str:
    """A file name that says nothing about a prompt."""
    return f"{hashlib.sha256(video).hexdigest()[:16]}.mp4"
