"""The experts, and where the parts of a base model lie.

`transformer` is the high-noise expert and `transformer_2` the low-noise one, everywhere: in diffusers, in file
names, in metadata. Some projects have them reversed; here only this module decides. A model with one denoiser, such as
Wan2.1, has a single expert for all noise levels, which is its `transformer`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import InputError
from .weight_files import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel

    from .flow import Interval

ExpertName = Literal["high", "low", "single"]


@dataclass(frozen=True, slots=True)
class Expert:
    """One of a model's denoisers."""

    name: ExpertName
    component: str
    """Attribute and folder in a diffusers pipeline."""
    file_name: str
    """Name of this expert's adapter file."""

    @property
    def title(self) -> str:
        """What a sentence calls it."""
        return "the only expert" if self.name == "single" else f"the {self.name}-noise expert"

    def interval(self, boundary: float | None) -> "Interval":
        """The noise levels at which `WanPipeline` calls this expert: t >= 1000 boundary is the high one's.

        Args:
            boundary: the base's `boundary_ratio`, None with one denoiser.

        Raises:
            InputError: a base of that kind has no such expert.
        """
        from .flow import Interval

        if (boundary is None) != (self.name == "single"):
            has = 'one denoiser, "single"' if boundary is None else 'two, "high" and "low"'
            raise InputError(f"train.experts: the base has no {self.name!r} expert; it has {has}")
        if boundary is None:
            return Interval(0.0, 1.0)
        return Interval(boundary, 1.0) if self.name == "high" else Interval(0.0, boundary)


HIGH = Expert("high", "transformer", "high_noise.safetensors")
LOW = Expert("low", "transformer_2", "low_noise.safetensors")
SINGLE = Expert("single", "transformer", "pytorch_lora_weights.safetensors")
EXPERTS: dict[ExpertName, Expert] = {"high": HIGH, "low": LOW, "single": SINGLE}


def base_folder(base: str, components: Sequence[str] = (), revision: str | None = None) -> Path:
    """The local diffusers folder of a base model: `pocket`, a folder, or a repository of the Hub.

    Of a repository only `model_index.json`, the scheduler and the named components are fetched.

    Raises:
        InputError: when there is no such model, or a component is missing from it.
    """
    if base == "pocket":
        folder = Path(__file__).parent / "pocket" / "model"
    elif Path(base).is_dir():
        folder = Path(base)
    elif base.count("/") == 1 and not base.startswith((".", "/", "~")):
        folder = fetch(base, components, revision)
    else:
        raise InputError(
            f"base model {base!r} is neither a folder nor a Hub repository (user/name); "
            'use "pocket", a diffusers folder, or "Wan-AI/Wan2.2-T2V-A14B-Diffusers"'
        )
    if not (folder / "model_index.json").is_file():
        raise InputError(f"base model {folder} has no model_index.json, so it is not a diffusers pipeline folder")
    for component in components:
        if not (folder / component).is_dir():
            one = '; a model with one denoiser takes train.experts = ["single"] in training'
            hint = one if component == LOW.component else ""
            raise InputError(f"base model {folder} has no {component}/, which this job needs{hint}")
    return folder


def fetch(repository: str, components: Sequence[str], revision: str | None) -> Path:
    """Bring parts of a Hub repository into the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["model_index.json", "scheduler/*", *(f"{component}/*" for component in components)]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"base model {repository!r} could not be had from the Hub ({type(error).__name__}); check the name, "
            "the connection and your login, or give a local diffusers folder"
        ) from error


def boundary_ratio(folder: Path) -> float | None:
    """The noise level at which the pipeline hands over from the high expert to the low one; None with one denoiser."""
    boundary = read_json(folder / "model_index.json").get("boundary_ratio")
    return None if boundary is None else float(boundary)


def fingerprint(folder: Path) -> str:
    """A hash of a component's configuration and weights, so that caches made with another one are not used.

    Of each weight file the size and both ends are read (safetensors keeps its table at the start), which tells any
    two models apart without reading gigabytes.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".model", ".txt"}):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


def load_expert(folder: Path, expert: Expert, dtype: "torch.dtype") -> "WanTransformer3DModel":
    """One expert's base, frozen, in `dtype`; diffusers keeps time path, norms and modulation in fp32."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder, subfolder=expert.component, dtype=dtype)
    return model.requires_grad_(False).eval()
