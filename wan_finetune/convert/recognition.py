"""What lies where in a checkpoint: the folders of Wan's authors, ComfyUI's files, parts of a diffusers folder.

Files are told apart by the names of their tensors. The two experts have the same names, so of those the file's name
decides, and where it does not the user is asked.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .autoencoder import is_autoencoder
from .denoiser import is_denoiser
from .parts import listed
from .tensor_files import open_tensors, read_header
from .text_encoder import is_text_encoder
from .tokenizer import MAIN_FILE
from .weights import PREFIXES

EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
COMFYUI_FOLDERS = ("", "diffusion_models", "unet", "text_encoders", "clip", "vae")
"""Where ComfyUI keeps models, below its own `models/`."""
TOKENIZER_FOLDER = "google/umt5-xxl"
TEXT_ENCODER_PTH, VAE_PTH = "models_t5*.pth", "Wan2.1_VAE.pth"
HIGH_OR_LOW = re.compile(r"(?:^|[^a-z])(high|low)(?=$|[^a-z]|noise)")
DIFFUSERS_PARTS = ("text_encoder", "tokenizer", "vae")


@dataclass(frozen=True, slots=True)
class Denoiser:
    """Files of one denoiser, and its original configuration."""

    files: tuple[Path, ...]
    config: Path | None = None


def find_denoisers(checkpoint: Path, high: Path | None, low: Path | None) -> tuple[Denoiser, ...]:
    """The denoiser of a checkpoint, or its two experts, high noise first.

    Raises:
        InputError: none, too many, or not told apart.
    """
    if (high is None) != (low is None):
        given, other = ("--high", "--low") if high else ("--low", "--high")
        raise InputError(f"{given} is given without {other}; a pipeline of two experts needs both files")
    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: no such file or folder")
    if high and low:
        if high.resolve() == low.resolve():
            raise InputError(f"{high}: is given as both experts; each has its own file")
        for wrong, file in (("low", high), ("high", low)):
            if expert_in_name(file) == wrong:
                raise InputError(f"{file}: is the {wrong}-noise expert by its name; are --high and --low swapped?")
        return Denoiser((high,)), Denoiser((low,))
    if checkpoint.is_file():
        if side := expert_in_name(checkpoint):
            raise InputError(
                f"{checkpoint}: is the {side}-noise expert of two by its name; give both: "
                f"wan-finetune convert {checkpoint.parent or '.'} OUT --high FILE --low FILE"
            )
        return (Denoiser((checkpoint,)),)
    if (checkpoint / "model_index.json").is_file():
        raise InputError(f"{checkpoint}: is a diffusers folder already; use it as it is")
    present = [name for name in EXPERT_FOLDERS if (checkpoint / name).is_dir()]
    if len(present) == 1:
        (absent,) = set(EXPERT_FOLDERS) - set(present)
        raise InputError(f"{checkpoint}: has {present[0]}/ but no {absent}/; fetch the rest of the checkpoint")
    if present:
        return tuple(original_denoiser(checkpoint / name) for name in EXPERT_FOLDERS)
    if (checkpoint / INDEX).is_file() or (checkpoint / INDEX.removesuffix(".index.json")).is_file():
        return (original_denoiser(checkpoint),)
    return denoisers_by_name(checkpoint)


def original_denoiser(folder: Path) -> Denoiser:
    """A folder as Wan's authors publish a denoiser: shards with an index, or one file.

    Raises:
        InputError: a shard that the index names is not there, or holds other weights than the index says.
    """
    config = folder / "config.json"
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
            wrong = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{folder / INDEX}: is no index of shards; fetch it again") from None
        if wrong:
            raise InputError(f"{folder / INDEX}: {wrong[0]!r} is no file name")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise InputError(f"{folder}: {listed(absent)} of {len(names)} shards not there; fetch the rest")
        holds = {name: set(open_tensors(folder / name).tensors) for name in names}
        for key, name in places.items():
            if key not in holds[name]:
                raise InputError(f"{folder / name}: does not hold {key}, as the index says; are the files mixed up?")
        files = [folder / name for name in names]
    else:
        single = folder / INDEX.removesuffix(".index.json")
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: holds no safetensors file; fetch it again")
    return Denoiser(tuple(files), config if config.is_file() else None)


def denoisers_by_name(folder: Path) -> tuple[Denoiser, ...]:
    """Single files in a folder (ComfyUI's): the two experts by their names, or the only denoiser."""
    files = [file for file in comfyui_files(folder) if is_denoiser(names_in(file))]
    sides = {side: [file for file in files if expert_in_name(file) == side] for side in ("high", "low", None)}
    if not files:
        raise InputError(
            f"{folder}: holds no checkpoint that is known: no {' and '.join(EXPERT_FOLDERS)}, no {INDEX}, and no "
            f"safetensors file of a denoiser{unreadable(folder)}"
        )
    if len(sides["high"]) == len(sides["low"]) == 1 and not sides[None]:
        return Denoiser((sides["high"][0],)), Denoiser((sides["low"][0],))
    if len(files) == 1 and sides[None]:
        return (Denoiser((files[0],)),)
    names = listed(file.name for file in files)
    raise InputError(
        f"{folder}: which file is which expert cannot be told from {names}; the experts hold the same names, so give "
        "--high FILE --low FILE, or one file instead of the folder for a model with one denoiser"
    )


def expert_in_name(file: Path) -> str | None:
    """`high` or `low`, where a file's name says one of them and not the other."""
    said = set(HIGH_OR_LOW.findall(file.name.lower()))
    return said.pop() if len(said) == 1 else None


def comfyui_files(folder: Path) -> list[Path]:
    """Safetensors files of a folder, and of those that ComfyUI has below it."""
    found = (file for name in COMFYUI_FOLDERS for file in sorted((folder / name).glob("*.safetensors")))
    return [file for file in found if file.is_file()]


def unreadable(folder: Path) -> str:
    """What to add to a message that nothing was found: files that may be what was looked for, but are damaged."""
    damaged = []
    for file in comfyui_files(folder):
        try:
            read_header(file)
        except InputError:
            damaged.append(file.name)
    return f" ({listed(damaged)} cannot be read as safetensors; fetch again)" if damaged else ""


def names_in(file: Path) -> set[str]:
    """Names of a safetensors file's tensors, without ComfyUI's prefix; none of a file that is damaged."""
    try:
        header, _ = read_header(file)
    except InputError:
        return set()
    names = set()
    for name in header:
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        names.add(name)
    return names


def find_rest(
    checkpoint: Path,
    *,
    text_encoder: Path | None,
    vae: Path | None,
    tokenizer: Path | None,
    components: Path | None,
) -> tuple[Path | None, Path | None, Path | None]:
    """Text encoder, autoencoder and tokenizer: as given, else as found beside the denoisers.

    With `components`, a diffusers folder, nothing is looked for: what is not given comes from there.

    Raises:
        InputError: more than one of a kind.
    """
    if components is not None:
        for part in DIFFUSERS_PARTS:
            if not (components / part).is_dir():
                raise InputError(f"--components-from {components}: has no {part}/, so it is no diffusers folder of Wan")
        return text_encoder, vae, tokenizer
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if text_encoder is None:
        candidates = sorted(folder.glob(TEXT_ENCODER_PTH))
        candidates = candidates or [file for file in comfyui_files(folder) if is_text_encoder(names_in(file))]
        text_encoder = only(candidates, folder, "text encoder", "--text-encoder", f"{TEXT_ENCODER_PTH} or umt5_xxl_*")
    if vae is None:
        candidates = sorted(folder.glob(VAE_PTH))
        candidates = candidates or [file for file in comfyui_files(folder) if is_autoencoder(names_in(file))]
        vae = only(candidates, folder, "autoencoder", "--vae", f"{VAE_PTH} or wan_2.1_vae.safetensors")
    if tokenizer is None and (folder / TOKENIZER_FOLDER / MAIN_FILE).is_file():
        tokenizer = folder / TOKENIZER_FOLDER
    return text_encoder, vae, tokenizer


def only(candidates: Sequence[Path], folder: Path, what: str, option: str, usual: str) -> Path:
    """The one candidate."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(
            f"{folder}: holds no {what} ({usual}){unreadable(folder)}; give {option} FILE, or take it from a diffusers "
            "folder with --components-from FOLDER"
        )
    raise InputError(f"{folder}: more than one {what}: {listed(file.name for file in candidates)}; give {option} FILE")
