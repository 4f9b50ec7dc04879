"""Blocks that live in the host's memory and take turns in two places on the device.

A streamed block always comes to the same one of two slots, by its turn's parity. When it is called, in the forward pass
or when a checkpoint runs it again in the backward pass, the block whose turn is next sets out for the other slot, on a
copy stream, while this one computes. All frozen weights of a block are one flat piece of pinned memory, so that a turn
is one copy. LoRA weights stay on the device: they are small, and the optimizer writes them.

Why the other slot is free then: whatever used it was given to the device before this block, and the copy waits for
that. In the backward pass a block is run again only when everything of the blocks behind it has been given out. Without
checkpointing autograd would keep views of a slot that other weights have since overwritten: settings refuse it, and
each departure counts as a change in place, so that autograd itself stops. bitsandbytes keeps such a view in any case,
out of autograd's sight; as a block's slot never changes, it shows the right weights when they are needed.

diffusers' group offloading does not serve: it moves every parameter of a block, LoRA included, back to copies in the
host's memory that were made at the start, under gradients that are on the device.

On a CPU the same code copies at once. No GPU has run it yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

ALIGNMENT_BYTES = 256
"""Each tensor starts at a multiple of this, as the allocator's own do."""


def streamed_indices(num_blocks: int, stream_blocks: int) -> list[int]:
    """Which blocks are streamed: spread evenly, so that blocks between them hide the copies."""
    count = min(stream_blocks, num_blocks)
    return [turn * num_blocks // count for turn in range(count)]


@dataclass(slots=True)
class StreamedBlock:
    """A block's frozen weights: in the host's memory, and as they lie in its slot."""

    module: nn.Module
    host: Tensor
    """All frozen weights, one after the other, as bytes."""
    parameters: list[nn.Parameter]
    at_home: list[Tensor]
    """Views of `host`, one a parameter."""
    on_device: list[Tensor]
    """Views of the slot, likewise."""
    arrived: "torch.cuda.Event | None" = None


@dataclass(slots=True)
class Counts:
    """What has been moved since the start."""

    copies: int = 0
    misses: int = 0
    """Turns that found their block away, and not under way."""
    bytes: int = 0
    seen_on_device: set[int] = field(default_factory=set)


class BlockStream:
    """Streams some blocks of a model, from construction to `close`."""

    def __init__(self, model: "WanTransformer3DModel", stream_blocks: int, device: torch.device) -> None:
        chosen = [model.blocks[i] for i in streamed_indices(len(model.blocks), stream_blocks)]
        self.copies_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for block in chosen:
            move_what_stays(block, device)
        layouts = [frozen_layout(block) for block in chosen]
        size = max(layout[-1] for _, layout in layouts)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in chosen[:2]]
        self.blocks = [
            bind(block, parameters, offsets, self.slots[turn % 2], pinned=device.type == "cuda")
            for turn, (block, (parameters, offsets)) in enumerate(zip(chosen, layouts, strict=True))
        ]
        self.in_slot: list[int | None] = [None for _ in self.slots]
        self.last = -1
        self.counts = Counts()
        self.hooks = [
            block.module.register_forward_pre_hook(self.turn_of(turn)) for turn, block in enumerate(self.blocks)
        ]

    def turn_of(self, turn: int) -> Any:
        """The hook of the block with this turn."""

        @torch.compiler.disable
        def begin(module: nn.Module, arguments: Any) -> None:
            self.begin(turn)

        return begin

    def begin(self, turn: int) -> None:
        """Called before a block computes: it is on the device afterwards, and the next one on its way."""
        if self.in_slot[turn % 2] != turn:
            self.counts.misses += 1
            self.fetch(turn)
        if (arrived := self.blocks[turn].arrived) is not None:
            torch.cuda.current_stream().wait_event(arrived)
        following = self.following(turn)
        self.last = turn
        if following is not None and self.in_slot[following % 2] != following:
            self.fetch(following)

    def following(self, turn: int) -> int | None:
        """Whose turn is likely next. A wrong guess costs time, nothing else."""
        final = len(self.blocks) - 1
        if final == 0:
            return None
        forward = turn == 0 or (turn != final and turn > self.last)
        return turn + 1 if forward else turn - 1

    def fetch(self, turn: int) -> None:
        """Copy a block into its slot; the one that was there goes home."""
        slot = turn % 2
        if (occupant := self.in_slot[slot]) is not None:
            self.send_home(occupant)
        block, target = self.blocks[turn], self.slots[slot][: self.blocks[turn].host.numel()]
        if self.copies_stream is None:
            target.copy_(block.host)
        else:
            # All that may read the slot's last weights has been given to this stream before.
            self.copies_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copies_stream):
                target.copy_(block.host, non_blocking=True)
                block.arrived = self.copies_stream.record_event()
        for parameter, view in zip(block.parameters, block.on_device, strict=True):
            parameter.data = view
        self.in_slot[slot] = turn
        self.counts.copies += 1
        self.counts.bytes += block.host.numel()

    def send_home(self, turn: int) -> None:
        """Point a block's parameters at the host's memory, where their values have been all the time."""
        block = self.blocks[turn]
        for parameter, view in zip(block.parameters, block.at_home, strict=True):
            parameter.data = view
            torch.autograd.graph.increment_version(parameter)
        self.in_slot[turn % 2] = None

    def close(self) -> None:
        """Stop streaming; the blocks are in the host's memory then."""
        for hook in self.hooks:
            hook.remove()
        if self.copies_stream is not None:
            torch.cuda.synchronize(self.slots[0].device)
        for turn in self.in_slot:
            if turn is not None:
                self.send_home(turn)
        for block in self.blocks:
            unpin(block.host)
        self.slots = []


def move_what_stays(block: nn.Module, device: torch.device) -> None:
    """Bring to the device what is not streamed: LoRA weights, and the scales of quantised weights."""
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
        elif (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)
    for name, buffer in list(block.named_buffers()):
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, buffer.to(device))


def frozen_layout(block: nn.Module) -> tuple[list[nn.Parameter], list[int]]:
    """A block's frozen parameters, and where each starts in a flat piece of memory; the total comes last."""
    parameters = [parameter for parameter in block.parameters() if not parameter.requires_grad]
    offsets = [0]
    for parameter in parameters:
        offsets.append(-(-(offsets[-1] + parameter.nbytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return parameters, offsets


def bind(
    module: nn.Module, parameters: list[nn.Parameter], offsets: Sequence[int], slot: Tensor, pinned: bool
) -> StreamedBlock:
    """Move a block's frozen weights into one flat piece of the host's memory."""
    host = torch.empty(offsets[-1], dtype=torch.uint8)
    at_home: list[Tensor] = []
    on_device: list[Tensor] = []
    for parameter, offset in zip(parameters, offsets, strict=False):
        for memory, views in ((host, at_home), (slot, on_device)):
            flat = memory[offset : offset + parameter.nbytes].view(parameter.dtype)
            views.append(flat.view(parameter.shape))
        at_home[-1].copy_(parameter.data)
        parameter.data = at_home[-1]
    if pinned:
        pin(host)
    return StreamedBlock(module, host, parameters, at_home, on_device)


def pin(host: Tensor) -> None:
    """Lock memory for direct copies. torch's own allocator would round each block up to a power of two."""
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)
    if int(error) != 0:
        raise MemoryError(
            f"{host.numel() / 2**30:.2f} GiB of the host's memory could not be locked (CUDA error {int(error)}); "
            "lower memory.stream_blocks, or raise the limit of locked memory (ulimit -l)"
        )


def unpin(host: Tensor) -> None:
    """Undo `pin`."""
    if torch.cuda.is_available() and host.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
