"""The [memory] table."""

from typing import Literal

from ..settings import Settings

Checkpointing = Literal["none", "full"]


class MemorySettings(Settings):
    """What is traded for memory."""

    checkpointing: Checkpointing = "full"
    """Activations in the forward pass. `none` keeps all; `full` keeps each block's input and recomputes the rest."""
