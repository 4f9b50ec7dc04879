"""The diffusers format: one file an expert, keys under `transformer.`, for `WanPipeline.load_lora_weights`.

diffusers reads both experts' files with the prefix `transformer.`; the second goes in with
`load_into_transformer_2=True`. So the expert is written into the metadata, and `read` refuses the wrong one.
"""

import json

from torch import Tensor

from ..adapters import Adapter
from ..experts import ExpertName
from ..facts import metadata_of
from .assembling import assemble, json_of
from .files import Opened
from .format import FileFormat

CONFIG = "lora_adapter_metadata"
"""Metadata key of PEFT's settings; without it diffusers takes alpha to be the rank."""
FINETRAINERS_CONFIG = "lora_config"
"""Where finetrainers writes them, which diffusers does not read."""


def encode(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """fp32, with the settings that PEFT needs and no more."""
    config = {f"transformer.{key}": value for key, value in adapter.peft_config().items()}
    tensors = {f"transformer.{name}": value for name, value in adapter.weights.items()}
    return tensors, {**metadata_of(adapter, "diffusers"), CONFIG: json.dumps(config, sort_keys=True)}


def decode(opened: Opened, expert: ExpertName | None, alpha: float | None) -> Adapter:
    """Ours, or what `save_lora_weights` of diffusers wrote."""
    key = CONFIG if CONFIG in opened.metadata else FINETRAINERS_CONFIG
    config = {name.removeprefix("transformer."): value for name, value in json_of(opened, key).items()}
    return assemble(opened, expert, alpha, config, f"metadata ({key})")


FORMAT = FileFormat(
    name="diffusers", prefixes=("transformer.", "transformer_1.", "transformer_2."), encode=encode, decode=decode
)
write, read = FORMAT.write, FORMAT.read
