"""A model with its LoRA, made to fit: checkpointing, streamed blocks, and no copies that training does not need."""

from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from .checkpointing import Checkpointing, keep_lora_inputs_as_they_are
from .settings import MemorySettings
from .streaming import BlockStream

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


class Fitting:
    """What [memory] does to an expert between the injection of its LoRA and the end of its stretch.

    The model must not be moved afterwards: streamed blocks stay in host memory, and so does, until it is sharded, what
    has its home there.
    """

    def __init__(
        self,
        model: "WanTransformer3DModel",
        settings: MemorySettings,
        device: torch.device,
        *,
        autocast: bool,
        home: torch.device | None = None,
    ) -> None:
        self.checkpointing = Checkpointing(model, settings, device)
        if autocast:
            keep_lora_inputs_as_they_are(model)
        self.stream = BlockStream(model, settings.stream_blocks, device) if settings.stream_blocks else None
        if self.stream is None:
            model.to(home or device)
        # Each process has read the same file. DDP would send the base from the first to all others, in dtypes that
        # its backends may not know, and ask for it on the device.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)

    def use(self, bucket: str) -> None:
        """Take the checkpointing policy of the bucket that comes next, such as 832x480x81."""
        self.checkpointing.use(bucket)

    @property
    def note(self) -> str:
        """What a person should know of how it went; empty where all is as planned."""
        lean = self.checkpointing.lean
        if lean.formula_holds or not lean.hooked:
            return ""
        return (
            "the installed diffusers' block is not the one that was checked: it runs as it is, and takes about a fifth "
            "more memory for activations than train.plan says"
        )

    def close(self) -> None:
        """Leave the blocks as they were, end streaming and give its pinned memory back."""
        self.checkpointing.lean.close()
        if self.stream is not None:
            self.stream.close()
            self.stream = None
