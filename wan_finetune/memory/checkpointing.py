"""What the backward pass has at hand: the policy of each block's activations, chosen anew for every step's bucket.

It sits at diffusers' seam, `enable_gradient_checkpointing(gradient_checkpointing_func=...)`, so blocks are called as
diffusers calls them, and is torch's non-reentrant checkpoint in each policy but `none`. Self-attention is the one
operator that costs more to run again than to keep: 3.5 instead of 4.5 attention forwards a step for 10 KB a token and
block. `ATTENTION_KERNELS` are those whose output can be kept. Of others, and of attention put together from matrix
products, nothing would be kept, so `selective` refuses them instead of being `full` in silence.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..errors import InputError
from .lean import Lean
from .offloading import InputOffload
from .settings import MemorySettings, Policy

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

ATTENTION_KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attn_forward",
    "_flash_attn_3_forward",
)
"""Operators, by name, whose first two arguments are the query and the key."""


class Checkpointing:
    """Runs a model's blocks under the policy that is in use."""

    def __init__(self, model: "WanTransformer3DModel", settings: MemorySettings, device: torch.device) -> None:
        self.settings = settings
        self.policy: Policy = settings.checkpointing
        self.offload = InputOffload(device)
        self.kept_attentions = 0
        self.lean = Lean(model.blocks if settings.policies != {"none"} else [])
        model.enable_gradient_checkpointing(gradient_checkpointing_func=self.run)

    def use(self, bucket: str) -> None:
        """Take the policy of a bucket, such as 832x480x81; costs a look-up."""
        self.policy = self.settings.policy(bucket)

    def run(self, block: nn.Module, hidden_states: Tensor, *others: Any) -> Tensor:
        """One block's forward pass; what it keeps for the backward pass is the policy's."""
        self.lean.on = self.policy != "none"
        if self.policy == "none":
            return block(hidden_states, *others)
        if self.policy == "offloaded":
            with self.offload.of(hidden_states):
                return checkpoint(block.__call__, hidden_states, *others, use_reentrant=False)
        if self.policy == "full":
            return checkpoint(block.__call__, hidden_states, *others, use_reentrant=False)
        kept = self.kept_attentions
        contexts = partial(create_selective_checkpoint_contexts, self.keep_self_attention)
        result = checkpoint(block.__call__, hidden_states, *others, use_reentrant=False, context_fn=contexts)
        if self.kept_attentions == kept:
            raise InputError(
                'memory.checkpointing = "selective": this attention kernel is none whose output can be kept; set '
                'model.attention = "native" or "_native_cudnn", or memory.checkpointing = "full"'
            )
        return result

    def keep_self_attention(self, context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        """torch's question for every operator of a block: keep its output?"""
        name = operator._schema.name.rpartition("::")[2] if hasattr(operator, "_schema") else ""
        # Cross-attention's keys are the 512 rows of text: cheap to run again.
        if name in ATTENTION_KERNELS and arguments[0].shape == arguments[1].shape:
            self.kept_attentions += not context.is_recompute
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def keep_lora_inputs_as_they_are(model: nn.Module) -> None:
    """Stop PEFT from making an fp32 copy of every LoRA input, which autocast turns back into the precision it had.

    Only for a forward pass under autocast: without it, the matrix product of an input in bf16 and a weight in fp32
    fails. The values do not change: bf16 to fp32 and back is exact, and an fp32 input is cast by autocast alike.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
