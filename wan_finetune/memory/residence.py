"""Which frozen experts are on the device, and reading the next one while this one still trains."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..experts import EXPERTS, ExpertName
from .loading import load_base, read_weights
from .quantization import check_installed
from .settings import MemorySettings
from .streaming import streamed_indices

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

UNKNOWN_BYTES_A_SECOND = 200e6
"""What a disk is trusted to give before it was measured: a network disk's rate."""


def strip(model: "WanTransformer3DModel") -> None:
    """Make a trained model the frozen base again: no adapter, no autocast around its forward pass.

    PEFT's wrappers go as well, so that the next adapter meets the modules that a fresh load would have.
    """
    from accelerate.utils import extract_model_from_parallel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.delete_adapters(list(getattr(model, "peft_config", {})))
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model.disable_gradient_checkpointing()
    model.requires_grad_(False).eval()


def drained(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All tensors; each is given away, so that none is held once it has been moved."""
    while tensors:
        name = next(iter(tensors))
        yield name, tensors.pop(name)


class BaseExperts:
    """The frozen bases of a run, given out one at a time."""

    def __init__(
        self, base: Path, settings: MemorySettings, dtype: torch.dtype, device: torch.device, attention: str = "native"
    ) -> None:
        check_installed(settings.quantization)
        self.base, self.settings, self.dtype, self.device, self.attention = base, settings, dtype, device, attention
        self.kept: dict[ExpertName, WanTransformer3DModel] = {}
        self.reading: tuple[ExpertName, Reading] | None = None
        self.rate = UNKNOWN_BYTES_A_SECOND
        self.in_use: ExpertName | None = None

    def take(self, expert: ExpertName) -> "WanTransformer3DModel":
        """The expert: frozen, without an adapter, on the device but for blocks that are to be streamed."""
        self.in_use = expert
        if expert in self.kept:
            return self.kept[expert]
        tensors = None
        if self.reading is not None and self.reading[0] == expert:
            reading, self.reading = self.reading[1], None
            tensors = reading.result()
            self.rate = self.bytes_of(expert) / max(reading.seconds, 1e-3)
        self.drop_reading()
        folder, home = self.folder(expert), torch.device("cpu")
        streamed: set[str] = set()
        if self.settings.stream_blocks:
            count = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_layers"])
            streamed = {str(index) for index in streamed_indices(count, self.settings.stream_blocks)}

        def placement(name: str) -> torch.device:
            parts = name.split(".")
            return home if parts[0] == "blocks" and parts[1] in streamed else self.device

        source = drained(tensors) if tensors is not None else None
        model = load_base(folder, self.dtype, self.settings.quantization, placement, self.device, source)
        if self.attention != "native":
            model.set_attention_backend(self.attention)
        if self.settings.resident == "both":
            self.kept[expert] = model
        return model

    def release(self, expert: ExpertName) -> None:
        """A stretch of this expert is over. A kept one loses its adapter and goes on living; another one's last
        reference must be dropped by the caller as well."""
        self.in_use = None
        if expert in self.kept:
            strip(self.kept[expert])

    def prepare_next(self, expert: ExpertName) -> None:
        """Begin to read an expert into the host's memory; returns at once, and a second call does nothing."""
        if expert in self.kept or (self.reading is not None and self.reading[0] == expert):
            return
        self.drop_reading()
        self.reading = expert, Reading(self.folder(expert), self.dtype, self.settings)

    def is_time_for(self, expert: ExpertName, seconds_left: float) -> bool:
        """Whether reading should begin, so that it ends with the current stretch, which has so long to go."""
        if expert in self.kept or expert == self.in_use:
            return False
        return seconds_left <= 1.25 * self.bytes_of(expert) / self.rate

    def close(self) -> None:
        """Give all memory back."""
        self.drop_reading()
        self.kept.clear()

    def folder(self, expert: ExpertName) -> Path:
        return self.base / EXPERTS[expert].component

    def bytes_of(self, expert: ExpertName) -> int:
        return sum(file.stat().st_size for file in self.folder(expert).glob("*.safetensors"))

    def drop_reading(self) -> None:
        if self.reading is not None:
            self.reading[1].cancel()
            self.reading = None


class Reading(threading.Thread):
    """An expert's tensors on their way from the disk into the host's memory, cast already."""

    def __init__(self, folder: Path, dtype: torch.dtype, settings: MemorySettings) -> None:
        super().__init__(name="read next expert", daemon=True)
        self.folder, self.dtype, self.settings = folder, dtype, settings
        self.tensors: dict[str, Tensor] = {}
        self.error: BaseException | None = None
        self.cancelled = False
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            for name, tensor in read_weights(self.folder, self.dtype, self.settings.quantization):
                if self.cancelled:
                    return
                self.tensors[name] = tensor
        except Exception as error:
            self.error = error  # told of where the expert is asked for
        self.seconds = time.monotonic() - began

    def result(self) -> dict[str, Tensor]:
        """All tensors, once they are there.

        Raises:
            whatever reading raised.
        """
        self.join()
        if self.error is not None:
            raise self.error
        return self.tensors

    def cancel(self) -> None:
        """Stop soon, and wait for it."""
        self.cancelled = True
        self.join()
        self.tensors.clear()
