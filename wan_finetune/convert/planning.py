"""What a conversion will do: its parts, the files it will write and the bytes they take, before one is written."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ..errors import InputError
from ..experts import HIGH, LOW
from .autoencoder import autoencoder_part, is_autoencoder
from .denoiser import denoiser_part, is_denoiser, read_config
from .parts import Part
from .pipeline_files import flow_shift
from .recognition import DIFFUSERS_PARTS, Denoiser, find_denoisers, find_rest
from .shards import Shard, plan_shards
from .text_encoder import SPIECE, is_text_encoder, text_encoder_part
from .tokenizer import MAIN_FILE, require_tokenizer, tokenizer_files, tokenizer_from_spiece
from .weights import Weights, collect

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}
SAFE_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
"""Files of a diffusers folder that are taken over: no pickle, no code."""
SMALL_FILES_BYTES = 64 << 20
"""Room for configurations, tables and the tokenizer."""


class ConvertSettings(BaseModel):
    """What `wan-finetune convert` is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path
    """Folder or file of the original checkpoint."""
    out: Path
    """The diffusers folder to be; it must not exist."""
    high: Path | None = None
    """File of the high-noise expert, where the checkpoint's folder does not show it."""
    low: Path | None = None
    """File of the low-noise expert."""
    text_encoder: Path | None = None
    """File of the UMT5 encoder."""
    vae: Path | None = None
    """File of the autoencoder."""
    tokenizer: Path | None = None
    """Folder of the tokenizer."""
    components_from: Path | None = None
    """Diffusers folder for text encoder, tokenizer and autoencoder that are not given."""
    dtype: Literal["bf16", "fp16", "fp32", "keep"] = "bf16"
    """Of denoisers and text encoder. Time path, norms and modulation are fp32 always, and so is the autoencoder,
    except with `keep`, which leaves each weight what it is and unpacks fp8 to bf16."""
    max_shard_bytes: int = 5 * 10**9
    """Largest file of weights; a single weight may be larger."""
    flow_shift: float | None = None
    """Of the scheduler; None takes the official one of the model."""
    verify: bool = True
    """Read everything back and hold the models against the checkpoint, before the folder gets its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A conversion in all its files."""

    parts: list[Part]
    shards: dict[str, list[Shard]]
    """Of each part's folder."""
    dtypes: dict[str, torch.dtype | None]
    """Of each part's folder: what `plan_shards` was asked for."""
    copies: dict[str, Path]
    """Files taken over as they are, by their new place."""
    spiece: Part | None
    """The text encoder in whose file the tokenizer lies."""
    components: Path | None
    shift: float

    @property
    def denoisers(self) -> list[Part]:
        return [part for part in self.parts if part.class_name == "WanTransformer3DModel"]

    def weight_files(self) -> Iterator[tuple[str, Part, Shard]]:
        """Every file of weights: its place, its part, itself."""
        for part in self.parts:
            for shard in self.shards[part.folder]:
                yield f"{part.folder}/{shard.file_name}", part, shard

    def bytes_by_file(self) -> dict[str, int]:
        """What each large file will take."""
        made = {name: shard.num_bytes for name, _, shard in self.weight_files()}
        return made | {name: path.stat().st_size for name, path in self.copies.items()}

    def inputs(self) -> dict[str, Path]:
        """Every file that is read, by the part that it is for and its own name: no folder of this machine."""
        paths = {f"{part.folder}: {path.name}": path for part in self.parts for path in part.weights.files}
        return paths | {f"{Path(name).parent}: {path.name}": path for name, path in self.copies.items()}


def make_plan(settings: ConvertSettings) -> Plan:
    """Look at every file's table, derive configurations and names, and refuse what cannot be converted.

    Raises:
        InputError: says which file is at fault and what to do.
    """
    denoisers = find_denoisers(settings.checkpoint, settings.high, settings.low)
    folders = (HIGH.component, LOW.component)
    parts = [one_denoiser(found, folder) for found, folder in zip(denoisers, folders, strict=False)]
    require_alike(parts)
    text_encoder, vae, tokenizer = find_rest(
        settings.checkpoint,
        text_encoder=settings.text_encoder,
        vae=settings.vae,
        tokenizer=settings.tokenizer,
        components=settings.components_from,
    )
    spiece = None
    if text_encoder:
        weights = checked(text_encoder, "text encoder", is_text_encoder)
        parts.append(text_encoder_part(weights))
        if SPIECE in weights.extras and tokenizer is None:
            spiece = parts[-1]
    if vae:
        parts.append(autoencoder_part(checked(vae, "autoencoder", is_autoencoder)))
    dtype = DTYPES[settings.dtype]
    dtypes = {part.folder: torch.float32 if part.folder == "vae" and dtype else dtype for part in parts}
    plan = Plan(
        parts=parts,
        shards={part.folder: plan_shards(part, dtypes[part.folder], settings.max_shard_bytes) for part in parts},
        dtypes=dtypes,
        copies=planned_copies(settings.components_from, {part.folder for part in parts}, tokenizer, spiece),
        spiece=spiece,
        components=settings.components_from,
        shift=settings.flow_shift or flow_shift(parts[: len(denoisers)]),
    )
    require_text_width(plan)
    check_tokenizer(plan)
    return plan


def one_denoiser(found: Denoiser, folder: str) -> Part:
    """A denoiser's files as a part.

    Raises:
        InputError: files of something else.
    """
    weights = collect(found.files)
    names = set(weights.tensors)
    if not is_denoiser(names):
        raise InputError(f"{found.files[0]}: {what_else(names)}")
    return denoiser_part(weights, folder, found.config)


def what_else(names: set[str]) -> str:
    """What a file is that is no original denoiser."""
    if any(name.startswith("condition_embedder.") for name in names):
        return "has diffusers' names already; its folder needs no conversion"
    if any(part in name for name in names for part in (".lora_A", ".lora_B", ".lora_down", ".lora_up")):
        return "is a LoRA, not a model; wan-finetune inspect says which"
    if is_text_encoder(names):
        return "is a text encoder; give it as --text-encoder"
    if is_autoencoder(names):
        return "is an autoencoder; give it as --vae"
    return f"is no Wan denoiser ({min(names, default='nothing')!r} is its first name)"


def checked(path: Path, what: str, is_so: Callable[[set[str]], bool]) -> Weights:
    """Weights of a file that must be of one kind."""
    weights = collect([path], extras=(SPIECE,))
    if not is_so(set(weights.tensors)):
        raise InputError(f"{path}: is no {what} of Wan ({min(weights.tensors, default='nothing')!r} is its first name)")
    return weights


def require_alike(denoisers: list[Part]) -> None:
    """Two experts have one configuration.

    Raises:
        InputError: they differ.
    """
    if len(denoisers) == 2 and denoisers[0].config != denoisers[1].config:
        first, second = (part.config for part in denoisers)
        key = next(key for key in first if first[key] != second[key])
        raise InputError(
            f"{denoisers[0].weights.files[0]} and {denoisers[1].weights.files[0]}: are not two experts of one model: "
            f"{key} is {first[key]} and {second[key]}"
        )


def require_text_width(plan: Plan) -> None:
    """The denoisers read what the text encoder writes.

    Raises:
        InputError: another text encoder's.
    """
    wanted = plan.denoisers[0].config["text_dim"]
    configs = {part.weights.files[0]: part.config for part in plan.parts if part.folder == "text_encoder"}
    if taken := plan.copies.get("text_encoder/config.json"):
        configs[taken] = read_config(taken)
    for source, config in configs.items():
        if config.get("d_model") != wanted:
            raise InputError(
                f"{source}: gives {config.get('d_model')} channels, the denoiser reads {wanted}; it is another "
                "model's text encoder"
            )


def check_tokenizer(plan: Plan) -> None:
    """The tokenizer is one, which is better known now than when hours of writing are done.

    Raises:
        InputError: it is damaged, or another model's.
    """
    if plan.spiece is not None:
        tokenizer_from_spiece(plan.spiece.weights.extras[SPIECE], plan.spiece.config["vocab_size"])
    for name, path in plan.copies.items():
        if name == f"tokenizer/{MAIN_FILE}":
            require_tokenizer(path.parent)


def planned_copies(
    components: Path | None, made: set[str], tokenizer: Path | None, spiece: Part | None
) -> dict[str, Path]:
    """Files that are taken over: the tokenizer's, and those of a diffusers folder.

    Raises:
        InputError: there is no tokenizer, or a part holds pickles only.
    """
    copies = {}
    if tokenizer:
        copies = {f"tokenizer/{path.name}": path for path in tokenizer_files(tokenizer)}
    elif spiece is None and components is None:
        raise InputError(
            "there is no tokenizer (google/umt5-xxl/) beside the checkpoint; give --tokenizer FOLDER, or take it from "
            "a diffusers folder with --components-from FOLDER"
        )
    for part in DIFFUSERS_PARTS if components else ():
        if part in made or (part == "tokenizer" and (tokenizer or spiece)):
            continue
        assert components is not None
        files = {f"{part}/{path.name}": path for path in (components / part).iterdir() if path.suffix in SAFE_SUFFIXES}
        if part != "tokenizer" and not any(name.endswith(".safetensors") for name in files):
            raise InputError(f"--components-from {components}: {part}/ holds no safetensors file")
        copies |= files
    return copies


def require_space(plan: Plan, parent: Path, finished: set[str]) -> None:
    """The disk has room for what is still to be written.

    Raises:
        InputError: it has not.
    """
    needed = SMALL_FILES_BYTES + sum(size for name, size in plan.bytes_by_file().items() if name not in finished)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"{parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room")
