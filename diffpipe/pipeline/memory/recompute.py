"""Keeps only the inputs of a unit, or those and its costly results, and computes the rest again in backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Attention: the dearest thing in a block at video lengths, and its result is as small as the block's input.
COSTLY = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def recompute(forward: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """``forward`` that computes its activations again in backward; values and gradients stay as they are.

    Non-reentrant: the reentrant kind gives no gradient when only adapters inside train.

    Args:
        policy: "block" keeps only what goes in; "selective" keeps attention's results too.
    """
    contexts: Any = partial(create_selective_checkpoint_contexts, _policy) if policy == "selective" else None

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if contexts is None:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return recomputed


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().removeprefix("aten::").partition(".")[0] if hasattr(op, "name") else ""
    return CheckpointPolicy.MUST_SAVE if name in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
