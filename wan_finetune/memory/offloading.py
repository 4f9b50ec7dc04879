"""Checkpointed block inputs in the host's memory: out in the forward pass, back in time in the backward.

A block's input costs 10.24 KB a token, 12.5 GiB in 40 blocks at 832x480x81. Only inputs are moved, never what attention
keeps: that would be more traffic for each block than its computation can hide. Copies have a stream of their own. On a
CPU the same code copies at once; no GPU has run it yet.
"""

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20
"""torch rounds pinned memory up to a power of two; in pieces of one, 335 MB do not become 512."""


class Parked:
    """One block input, on its way out, in the host's memory, or on its way back."""

    def __init__(self, value: Tensor, before: "Parked | None", copies: "torch.cuda.Stream | None") -> None:
        self.shape, self.dtype, self.device = value.shape, value.dtype, value.device
        self.before = None if before is None else weakref.ref(before)
        self.copies = copies
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        flat = value.contiguous().view(-1).view(torch.uint8)
        self.pieces = [torch.empty_like(p, device="cpu", pin_memory=copies is not None) for p in split(flat)]
        if copies is None:
            copy_all(self.pieces, split(flat))
            return
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            copy_all(self.pieces, split(flat))
        # The allocator must not give the memory away before the copy has read it.
        flat.record_stream(copies)

    def start_back(self) -> None:
        """Begin the way back, if it has not begun."""
        if self.back is not None or not self.pieces:
            return
        flat = torch.empty(self.shape, dtype=self.dtype, device=self.device).view(-1).view(torch.uint8)
        if self.copies is None:
            copy_all(split(flat), self.pieces)
        else:
            # What the allocator gave may still be read by work before this.
            self.copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copies):
                copy_all(split(flat), self.pieces)
                self.arrived = self.copies.record_event()
            flat.record_stream(self.copies)
        self.back = flat.view(self.dtype).view(self.shape)

    def take(self) -> Tensor:
        """The input on its device; the one before it, which comes next, sets out."""
        self.start_back()
        if self.before is not None and (before := self.before()) is not None:
            before.start_back()
        if self.arrived is not None:
            torch.cuda.current_stream().wait_event(self.arrived)
        assert self.back is not None
        return self.back


class InputOffload:
    """Parks the inputs of blocks that are called one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: weakref.ref[Parked] | None = None
        self.parked_bytes = 0
        """Bytes that went out since the start."""

    def of(self, hidden_states: Tensor) -> AbstractContextManager[Any]:
        """Where a checkpoint of a block is called: its `hidden_states` is parked, its other inputs stay, as all share
        them."""

        # Autograd keeps the hooks: one that knew the tensor itself would keep it on the device.
        wanted = storage_of(hidden_states), hidden_states.shape

        def pack(value: Tensor) -> Tensor | Parked:
            if (storage_of(value), value.shape) != wanted:
                return value
            parked = Parked(value, None if self.last is None else self.last(), self.copies)
            self.last = weakref.ref(parked)
            self.parked_bytes += value.nbytes
            return parked

        def unpack(kept: Tensor | Parked) -> Tensor:
            return kept.take() if isinstance(kept, Parked) else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def storage_of(value: Tensor) -> int:
    """Which memory a tensor is in, fake ones included."""
    return value.untyped_storage()._cdata


def split(flat: Tensor) -> tuple[Tensor, ...]:
    """Views of bytes, in pieces."""
    return flat.split(PIECE_BYTES)


def copy_all(targets: Any, sources: Any) -> None:
    """Piece by piece, without waiting where a device can copy by itself."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
