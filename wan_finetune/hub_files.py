"""What of an adapter's or a run's folder goes to the Hub: an allow-list, each file checked before any is sent."""

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapters import Adapter
from .errors import InputError
from .experts import EXPERTS, ExpertName
from .formats.reading import read_file
from .sampling import SamplingSettings

BESIDE = ("comfyui",)
"""Folders beside the adapter with the same adapter in another format."""
MANIFEST = Path("samples", "final", "adapter", "manifest.json")
"""In a run's folder: how the final samples were made."""
CLIP_NAME = re.compile(r"(\d{2,}-\d+)-(base|adapter)\.mp4")
PATHS = re.compile(r"(?<![\w.:/])(?:/(?:home|Users|root|mnt|data|workspace|work|tmp|var|opt|scratch)/|[A-Za-z]:\\)\S+")
"""What looks like a place on somebody's machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One prompt and seed, with the adapter and, where it was sampled, with the base alone."""

    prompt: str
    seed: int
    adapter: Path
    base: Path | None


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """What there is to publish of a folder."""

    adapter_folder: Path
    adapters: Sequence[Adapter]
    beside: Mapping[str, Path] = field(default_factory=dict)
    """Name in the repository -> a file of the same adapter in another format."""
    clips: Sequence[Clip] = ()
    sampling: SamplingSettings
    """What the clips were made with, or may be."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Figures of `evaluation.json`: numbers under their names, nothing else."""
    held_out: Mapping[ExpertName, tuple[float, float]] = field(default_factory=dict)
    """Expert -> held-out loss of the base and with the adapter, as it was at the adapter's step."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """The run's `config.toml`; the card takes an allow-list of it."""

    @property
    def about(self) -> dict[str, str]:
        """Facts of the adapters' files; both experts' where they agree, else the first's."""
        return {key: value for adapter in reversed(self.adapters) for key, value in adapter.about.items()}

    @property
    def experts(self) -> tuple[ExpertName, ...]:
        return tuple(adapter.expert for adapter in self.adapters)


def read_artefacts(folder: Path, sampling: SamplingSettings | None = None) -> Artefacts:
    """Read and check what a folder has to publish.

    Args:
        folder: an adapter folder, or a run's folder with `adapter/`.
        sampling: what the adapter is sampled with, where no clips say it.

    Raises:
        InputError: there is no adapter, or it is of the wrong expert; or that or what a run has beside it is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give an adapter folder, or a run's folder such as runs/NAME")
    run = folder if (folder / "adapter").is_dir() else None
    adapter_folder = folder / "adapter" if run else folder
    found = [expert for expert in EXPERTS.values() if (adapter_folder / expert.file_name).is_file()]
    if not found or len(found) > 2 or (len(found) == 2 and "single" in {expert.name for expert in found}):
        names = ", ".join(expert.file_name for expert in EXPERTS.values())
        raise InputError(f"{folder}: holds no adapter to push; of {names} it has {len(found)}")
    adapters, beside = [], {}
    for expert in found:
        adapters.append(read_file(adapter_folder / expert.file_name, expert.name))
        for name in BESIDE:
            file = adapter_folder / name / expert.file_name
            if file.is_file():
                read_file(file, expert.name)
                beside[f"{name}/{expert.file_name}"] = file
    clips: list[Clip] = []
    evaluation: dict[str, Any] = {}
    held_out: dict[ExpertName, tuple[float, float]] = {}
    configuration: dict[str, Any] = {}
    if run:
        with damage_told(run / MANIFEST):
            clips, manifest = read_clips(run / MANIFEST)
            sampling = sampling_of(manifest, adapters[0]) if manifest else sampling
        evaluation = numbers(read_json(run / "evaluation.json"))
        with damage_told(run / "validation.jsonl"):
            held_out = read_held_out(run / "validation.jsonl", adapters)
        with damage_told(run / "config.toml"):
            configuration = read_configuration(run / "config.toml")
    return Artefacts(
        adapter_folder=adapter_folder,
        adapters=adapters,
        beside=beside,
        clips=clips,
        sampling=sampling or sampling_of({}, adapters[0]),
        evaluation=evaluation,
        held_out=held_out,
        configuration=configuration,
    )


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """What cannot be read of a run's file is told of as such."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is not as a run writes it; make it again, or remove it") from None


def sampling_of(manifest: Mapping[str, Any], adapter: Adapter) -> SamplingSettings:
    """The settings of the clips, or those that are usual for the base with what the adapter says of itself."""
    known: dict[str, Any] = {}
    if adapter.expert == "single":
        known |= {"guidance_scale": 5.0, "guidance_scale_2": 5.0, "shift": 5.0}
    for fact, key in (("sampling_shift", "shift"), ("fps", "fps")):
        if fact in adapter.about:
            known[key] = float(adapter.about[fact])
    said = manifest.get("sampling", {})
    return SamplingSettings.model_validate(
        known | {key: value for key, value in said.items() if key in SamplingSettings.model_fields}
    )


def read_clips(path: Path) -> tuple[list[Clip], dict[str, Any]]:
    """The final samples, base beside adapter, and their manifest, which is at `path`."""
    manifest = read_json(path)
    clips = []
    for each in manifest.get("clips", []):
        file = path.parent / Path(each["file"]).name
        match = CLIP_NAME.fullmatch(file.name)
        if match is None or not file.is_file():
            continue
        base = path.parent.parent / "base" / f"{match[1]}-base.mp4"
        clips.append(
            Clip(prompt=each["prompt"], seed=each["seed"], adapter=file, base=base if base.is_file() else None)
        )
    return clips, manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
        InputError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(value, dict)
    except (ValueError, AssertionError):
        raise InputError(f"{path}: is no JSON object; remove it, or make it again") from None
    return value


def numbers(value: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and tables and lists of them; all else is left out, so that no name or path comes along."""

    def is_number(each: Any) -> bool:
        return isinstance(each, int | float) and not isinstance(each, bool)

    kept: dict[str, Any] = {}
    for key, each in value.items():
        if not re.fullmatch(r"\w{1,60}", key):
            continue
        if isinstance(each, Mapping):
            if inner := numbers(each):
                kept[key] = inner
        elif is_number(each) or (isinstance(each, list) and each and all(is_number(one) for one in each)):
            kept[key] = each
    return kept


def read_held_out(path: Path, adapters: Sequence[Adapter]) -> dict[ExpertName, tuple[float, float]]:
    """Each adapter's validation: the base's loss and its own. Of the step that it is of, which need not be the last."""
    found: dict[ExpertName, tuple[float, float]] = {}
    steps = {adapter.expert: adapter.about.get("steps") for adapter in adapters}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for each in map(json.loads, lines):
        if each["step"] and str(each["step"]) == steps.get(each["expert"]):
            found[each["expert"]] = (each["base_loss"], each["loss"])
    return found


def read_configuration(path: Path) -> dict[str, Any]:
    """The run's tables; empty where there is no file."""
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def repository_files(artefacts: Artefacts, card: str) -> dict[str, Path | bytes]:
    """Name in the repository -> file or content: card, adapters, the same in other formats, clips, figures."""
    files: dict[str, Path | bytes] = {"README.md": card.encode()}
    for adapter in artefacts.adapters:
        name = EXPERTS[adapter.expert].file_name
        files[name] = artefacts.adapter_folder / name
    files |= artefacts.beside
    for clip in artefacts.clips:
        for path in (clip.adapter, clip.base):
            if path is not None:
                files[f"samples/{path.name}"] = path
    if artefacts.evaluation:
        files["evaluation.json"] = json.dumps(artefacts.evaluation, indent=1).encode() + b"\n"
    return files


def is_ours(name: str) -> bool:
    """Whether a file of a repository is of those that a push puts there, and may so be outdated."""
    experts = {expert.file_name for expert in EXPERTS.values()}
    folder, _, file = name.rpartition("/")
    if folder == "":
        return file in experts or file == "evaluation.json"
    return (folder in BESIDE and file in experts) or (folder == "samples" and bool(CLIP_NAME.fullmatch(file)))


def require_no_leak(files: Mapping[str, Path | bytes], secret: str = "") -> None:
    """Whether texts and the headers of weights are free of paths, of this machine's names, and of the token.

    Raises:
        InputError: naming the file and what is in it.
    """
    home, host = os.path.expanduser("~"), socket.gethostname()
    # The root of a container is in every text.
    marks = [mark for mark in (str(Path.cwd()), tempfile.gettempdir(), home) if len(mark) > 3]
    for name, content in files.items():
        text = readable(name, content)
        if secret and secret in text:
            raise InputError(f"{name}: holds this login's token; nothing was pushed. Take it out, and revoke the token")
        found = next((mark for mark in marks if re.search(rf"{re.escape(mark)}(?![\w-])", text)), None)
        # A host's name may be an ordinary word; with a digit, dot or dash in it it is none.
        if found is None and re.search(r"[\d.-]", host) and host in text:
            found = host
        if found is None and (match := PATHS.search(text)):
            found = match[0]
        if found:
            raise InputError(
                f"{name}: holds {found[:80]!r}, which is of this machine; nothing was pushed. Of an adapter, "
                "`wan-finetune export DIR --format diffusers --out NEW` writes one without"
            )


def readable(name: str, content: Path | bytes) -> str:
    """A file's text: of weights the header, of clips nothing."""
    if name.endswith(".mp4"):
        return ""
    if isinstance(content, bytes):
        return content.decode("utf-8", "replace")
    with content.open("rb") as stream:
        if name.endswith(".safetensors"):
            header = stream.read(int.from_bytes(stream.read(8), "little"))
            return header.decode("utf-8", "replace")
        return stream.read().decode("utf-8", "replace")
