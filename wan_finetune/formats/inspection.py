"""What an adapter file is, in facts: for `wan-finetune inspect`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import Adapter, update_norms
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from ..spec import LORA_TARGETS
from .files import open_adapter
from .keys import shown
from .reading import adapter_files, halves, read_opened, recognised

MOST_TARGETS = 12
"""Targets that are named."""
OTHERS_FACTS = (
    "ss_base_model_version",
    "ss_output_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_learning_rate",
    "ss_optimizer",
    "ss_steps",
    "ss_epoch",
    "ss_num_epochs",
    "ss_timestep_sampling",
    "ss_discrete_flow_shift",
    "ss_training_comment",
    "name",
    "version",
    "training_info",
    "modelspec.architecture",
    "modelspec.title",
    "modelspec.author",
    "modelspec.date",
    "modelspec.trigger_phrase",
    "modelspec.usage_hint",
    "modelspec.license",
    "modelspec.merged_from",
)
"""What of other tools' metadata (kohya's `ss_*`, ai-toolkit's, ModelSpec) helps to tell a file."""
OURS = "wan-finetune"


@dataclass(frozen=True)
class Inspection:
    """A file that was found sound."""

    path: Path
    format: str
    adapter: Adapter
    norms: Mapping[str, float]
    """Module -> Frobenius norm of its update."""
    made_by: str
    metadata: Mapping[str, str]
    """Another tool's facts."""

    @property
    def kind(self) -> str:
        parts = [name for name, is_so in {"DoRA": self.adapter.dora, "rsLoRA": self.adapter.rslora}.items() if is_so]
        return ", ".join(parts) or "LoRA"

    @property
    def strongest(self) -> str:
        """The module with the largest update."""
        return max(self.norms, key=lambda module: self.norms[module])


def inspect(path: Path, expert: ExpertName | None = None, alpha: float | None = None) -> Inspection:
    """Read a file, whole, and say what it is.

    Raises:
        InputError: it is not sound; the message says why.
    """
    opened = open_adapter(path)
    adapter = read_opened(opened, expert, alpha)
    others = {
        name: shown(opened.metadata[name])
        for name in OTHERS_FACTS
        if opened.metadata.get(name) and "toolkit" not in adapter.about
    }
    return Inspection(
        path=path,
        format=recognised(opened).name,
        adapter=adapter,
        norms=update_norms(adapter),
        made_by=maker(adapter, opened.metadata),
        metadata=others,
    )


def maker(adapter: Adapter, metadata: Mapping[str, str]) -> str:
    """Which program wrote a file, as far as it says."""
    if toolkit := adapter.about.get("toolkit"):
        return toolkit
    if "wan_finetune" in metadata:
        return OURS
    if software := metadata.get("software"):
        return f"{software_name(software)} (metadata: software)"
    if "lora_config" in metadata:
        return "finetrainers (metadata: lora_config)"
    if any(name.startswith("ss_") for name in metadata):
        return "a kohya-style trainer such as musubi-tuner (metadata: ss_*)"
    if "lora_adapter_metadata" in metadata:
        return "diffusers (metadata: lora_adapter_metadata)"
    return "not said"


def software_name(text: str) -> str:
    """ai-toolkit writes its name and version as JSON."""
    try:
        said = json.loads(text)
        return shown(" ".join(str(said[name]) for name in ("name", "version") if name in said), 60)
    except (ValueError, TypeError, RecursionError):
        return shown(text, 60)


def inspect_all(
    source: Path, expert: ExpertName | None = None, alpha: float | None = None
) -> list[Inspection | InputError]:
    """Every adapter file of a path, those for ComfyUI beside others too, with what is wrong where one is not sound.

    Args:
        expert: whose files; and whose one is that does not say it.

    Raises:
        InputError: there are none.
    """
    results: list[Inspection | InputError] = []
    files = adapter_files(source)
    if source.is_dir() and (beside := files[0][1].parent / "comfyui").is_dir():
        files += adapter_files(beside)
    files = [(found, path) for found, path in files if found is None or expert in (None, found)]
    if expert and not files:
        raise InputError(f"{source}: has no adapter of {EXPERTS[expert].title}")
    for found, path in files:
        wanted = found or expert
        try:
            results += [inspect(path, each, alpha) for each in ([wanted] if wanted else halves(path))]
        except InputError as error:
            results.append(error)
    return results


def as_lines(found: Inspection, *, layers: bool = False) -> list[str]:
    """What is said of a file, a line each, names to the right."""
    adapter = found.adapter
    targets = [*adapter.targets[:MOST_TARGETS], *(["..."] if len(adapter.targets) > MOST_TARGETS else [])]
    facts = {
        "format": found.format,
        "kind": found.kind,
        "expert": "single" if adapter.expert == "single" else f"{adapter.expert} noise",
        "goes into": EXPERTS[adapter.expert].component,
        "rank": ", ".join(f"{rank}" for rank in adapter.ranks_used),
        "alpha": ", ".join(f"{alpha:g}" for alpha in adapter.alphas_used),
        "modules": f"{len(found.norms)} ({', '.join(targets)})",
        "update norm": f"{min(found.norms.values()):.3g} to {found.norms[found.strongest]:.3g} ({found.strongest})",
        "made by": found.made_by,
        **adapter.about,
        **found.metadata,
    }
    lines = [f"{name:>16}  {value}" for name, value in facts.items()]
    lines += [f"{'note':>16}  {note}" for note in adapter.assumed]
    return [*lines, *(layer_table(found.norms) if layers else [])]


def layer_table(norms: Mapping[str, float]) -> list[str]:
    """Update norms, a row a block and a column a Linear; `-` where there is no LoRA."""
    table: dict[int, dict[str, float]] = {}
    for module, norm in norms.items():
        _, block, target = module.split(".", 2)
        table.setdefault(int(block), {})[target] = norm
    present = {target for row in table.values() for target in row}
    targets = [target for target in LORA_TARGETS if target in present] + sorted(present - set(LORA_TARGETS))
    widths = {target: max(len(target), 8) for target in targets}
    lines = ["block  " + "  ".join(f"{target:>{widths[target]}}" for target in targets)]
    for number, row in sorted(table.items()):
        cells = (f"{row[target]:.3g}" if target in row else "-" for target in targets)
        padded = (f"{cell:>{widths[target]}}" for cell, target in zip(cells, targets, strict=True))
        lines.append(f"{number:>5}  " + "  ".join(padded))
    return lines


def as_json(found: Inspection, *, layers: bool = False) -> dict[str, Any]:
    """The same for programs."""
    adapter = found.adapter
    said: dict[str, Any] = {
        "file": str(found.path),
        "sane": True,
        "format": found.format,
        "kind": found.kind,
        "expert": adapter.expert,
        "component": EXPERTS[adapter.expert].component,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "ranks": adapter.ranks_used,
        "alphas": adapter.alphas_used,
        "assumed": list(adapter.assumed),
        "modules": len(found.norms),
        "targets": list(adapter.targets),
        "update_norm": {"least": min(found.norms.values()), "most": max(found.norms.values())},
        "made_by": found.made_by,
        "facts": dict(adapter.about),
        "metadata": dict(found.metadata),
    }
    return {**said, "layers": dict(found.norms)} if layers else said
