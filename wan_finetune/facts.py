"""What a file says of itself: an allow-list, so that no path, host, user or token gets into one by accident."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .experts import EXPERTS

if TYPE_CHECKING:
    from .adapters import Adapter

ABOUT = "wan_finetune"
"""Metadata key of our own facts, one JSON object."""

NUMBER = r"-?[0-9]{1,9}(\.[0-9]{1,17})?(e-?[0-9]{1,3})?"
HASH = r"[0-9a-f]{8,64}"
FACTS: dict[str, str] = {
    "base": r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?",
    "base_revision": r"[A-Za-z0-9][\w.-]{0,63}",
    # One line of anything, because it is what the user will type into every prompt.
    "trigger": r"[^\x00-\x1f\x7f]{0,200}",
    "steps": r"[0-9]{1,9}",
    "training_shift": NUMBER,
    "sampling_shift": NUMBER,
    "boundary": NUMBER,
    "resolution": r"[0-9]{1,5}x[0-9]{1,5}",
    "frames": r"[0-9]{1,5}",
    "fps": NUMBER,
    "dataset": HASH,
    "configuration": HASH,
    "licence": r"[A-Za-z0-9][\w.+-]{0,63}",
    "toolkit": r"[\w.+-]{1,40} [\w.+-]{1,40}",
    "operation": r"[A-Za-z0-9_ .,:;+*=()-]{1,300}",
}
"""Fact -> what its value may look like. What is not here, or looks otherwise, is not written.

`dataset` and `configuration` are hashes of the samples' content and of the settings that shape an adapter.
"""
NEVER = re.compile(r"hf_[A-Za-z0-9]{16,}|^(/|~|\.\.?/|[A-Za-z]:\\)|://")
"""Looks like a token, a path or an address, whatever the fact."""
DERIVED = ("expert", "component", "rank", "alpha", "targets")
"""Written for other readers; the adapter itself knows them."""

ARCHITECTURES = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2-t2v-a14b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-t2v-1.3b",
}


def kept(about: Mapping[str, str]) -> dict[str, str]:
    """Those facts that may be written, in order."""
    return {
        name: about[name]
        for name in sorted(FACTS.keys() & about.keys())
        if isinstance(about[name], str) and re.fullmatch(FACTS[name], about[name]) and not NEVER.search(about[name])
    }


def metadata_of(adapter: "Adapter", implementation: str) -> dict[str, str]:
    """What every file of ours has in its metadata, for this toolkit and for others.

    Args:
        implementation: whose module names the file has, as ModelSpec wants it: `diffusers`, or the original's address.
    """
    about = {
        "expert": adapter.expert,
        "component": EXPERTS[adapter.expert].component,
        "rank": listed(adapter.ranks_used),
        "alpha": listed(adapter.alphas_used),
        "targets": json.dumps(sorted(adapter.targets)),
        **kept(adapter.about),
    }
    return {"format": "pt", ABOUT: json.dumps(about, ensure_ascii=False), **modelspec(adapter, implementation)}


def modelspec(adapter: "Adapter", implementation: str) -> dict[str, str]:
    """Keys of Stability AI's ModelSpec 1.0.0, which other tools show; undated: equal adapters are equal files."""
    about, expert = kept(adapter.about), EXPERTS[adapter.expert]
    family = "wan2.1" if adapter.expert == "single" else "wan2.2"
    trigger, base = about.get("trigger", ""), about.get("base", family)
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{ARCHITECTURES.get(base, family)}/lora",
        "implementation": implementation,
        "title": f"{trigger or 'LoRA'}: {expert.title} of {base}",
        "usage_hint": f"{expert.title} ({expert.component})" + (f"; start prompts with {trigger!r}" if trigger else ""),
    }
    if trigger:
        spec["trigger_phrase"] = trigger
    if "resolution" in about:
        spec["resolution"] = about["resolution"]
    if "licence" in about:
        spec["license"] = about["licence"]
    if "boundary" in about and adapter.expert != "single":
        boundary = round(1000 * float(about["boundary"]))
        spec["timestep_range"] = f"{boundary},1000" if adapter.expert == "high" else f"0,{boundary}"
    return {f"modelspec.{name}": value for name, value in spec.items()}


def listed(numbers: Iterable[float]) -> str:
    """Numbers as short as they are exact."""
    return ", ".join(repr(int(number) if number == int(number) else number) for number in numbers)
