"""Keeps only the inputs of a unit, or those and its costly results, and computes the rest again in backward."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "diffpipe::padded_attention",
)
# Keys from which attention's result is worth keeping: what it takes rises with their number, the size of the result does not.
LONG = 1024


def recompute(forward: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """``forward`` that computes its activations again in backward; values and gradients stay as they are.

    Non-reentrant: the reentrant kind gives no gradient when only adapters inside train.

    Args:
        policy: "block" keeps only what goes in; "selective" keeps the results of long attention too.
    """
    contexts: Any = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if policy == "selective" else {}

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # By position: what goes in by keyword is not saved as autograd saves tensors, and so would not be offloaded.
        leaves, tree = tree_flatten((args, kwargs))

        def again(*given: Any) -> Any:
            args, kwargs = tree_unflatten(list(given), tree)
            return forward(*args, **kwargs)

        try:
            return checkpoint(again, *leaves, use_reentrant=False, **contexts)
        except BaseException as fault:
            # What checkpoint turned on is turned off when its frame goes, which the fault would hold: behind what was turned on before it.
            traceback.clear_frames(fault.__traceback__)
            raise

    return recomputed


def kind_of(unit: nn.Module) -> str:
    """What ``memory.recompute_kinds`` calls a unit: its class's name, before which torch puts FSDP once it is sharded."""
    return type(unit).__name__.removeprefix("FSDP")


def is_attention(op: Any) -> bool:
    """Whether an operation is one of torch's attention kernels, or ours."""
    return hasattr(op, "name") and op.name().removeprefix("aten::").partition(".")[0] in ATTENTION


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    costly = is_attention(op) and args[1].shape[-2] >= LONG
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
