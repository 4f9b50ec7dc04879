"""PEFT's own format: a folder an expert, with `adapter_config.json`, for `PeftModel.from_pretrained`."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import Expert, ExpertName
from ..facts import kept, metadata_of
from .assembling import assemble
from .files import Opened
from .format import FileFormat

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20


def encode(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """fp32, by the names of a `PeftModel` around the transformer."""
    tensors = {f"{PREFIX}{name}": value for name, value in adapter.weights.items()}
    return tensors, {**metadata_of(adapter, "diffusers"), "expert": adapter.expert}


def config_text(adapter: Adapter) -> dict[str, str]:
    """`adapter_config.json`: what says the adapter, and the base by its public name if it has one."""
    base = kept(adapter.about).get("base", "")
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if "/" in base else None,
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
        **adapter.peft_config(),
    }
    return {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}


def decode(opened: Opened, expert: ExpertName | None, alpha: float | None) -> Adapter:
    """Ours or what `save_pretrained` of PEFT wrote; without the settings beside it, alpha is the rank."""
    return assemble(opened, expert, alpha, read_config(opened.path.with_name(CONFIG)), CONFIG)


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's settings; empty where there are none.

    Raises:
        InputError: they are damaged, or of another method than LoRA.
    """
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            config = json.loads(stream.read(MAX_CONFIG_BYTES))
        method = config["peft_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path}: no settings of PEFT's; copy it from where the adapter came from") from None
    if method != "LORA":
        raise InputError(f"{path}: is of PEFT's method {str(method)[:20]!r}; only LORA is read here")
    return dict(config)


def file_name(expert: Expert) -> str:
    """`high_noise/adapter_model.safetensors`: PEFT wants a folder of its own for each."""
    folder = "single" if expert.name == "single" else f"{expert.name}_noise"
    return f"{folder}/{WEIGHTS}"


FORMAT = FileFormat(
    name="peft", prefixes=(PREFIX,), encode=encode, decode=decode, beside=config_text, file_name=file_name
)
write, read = FORMAT.write, FORMAT.read
