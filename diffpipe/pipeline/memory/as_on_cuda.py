"""Lets fake tensors of the CPU go the way that tensors on a CUDA device go: its types under autocast, its fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# What autocast computes in float32 on CUDA and not on the CPU (torch's AT_FORALL_FP32), as far as diffusion models use it.
FLOAT32 = frozenset(
    {
        *("exp", "log", "reciprocal", "rsqrt", "pow", "__pow__", "__rpow__", "softplus", "softmax", "log_softmax", "layer_norm"),
        *("group_norm", "norm", "cumsum", "cumprod", "prod", "sum", "cosine_similarity", "l1_loss", "smooth_l1_loss", "huber_loss"),
        *("mse_loss", *["rms_norm"] * torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")),  # torch 2.12
    }
)
Attend = nn.functional.scaled_dot_product_attention


def as_on_cuda(forward: Callable[..., Any], fused: bool = True) -> Callable[..., Any]:
    """``forward`` as CUDA would compute it; what is computed again in backward goes the same way.

    Fake tensors of a CUDA device would do the same, but torch builds without CUDA end the process at their first gradient.

    Args:
        fused: keep torch's fused kernels whole; torch.compile takes some apart.
    """

    def forwarded(*args: Any, **kwargs: Any) -> Any:
        with _AsOnCuda(fused):
            return forward(*args, **kwargs)

    return forwarded


class _AsOnCuda(TorchFunctionMode):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        cast = torch.is_autocast_enabled("cpu")
        if func is Attend:
            return _attention(*args, **kwargs)
        if cast and name in FLOAT32:
            args, kwargs = tree_map(_to_float, (args, kwargs))
        if name == "rms_norm" and self.fused and len({x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}) == 1:
            return _rms_norm(*args, **kwargs)  # of several types torch takes it apart
        return func(*args, **kwargs)


def _to_float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch takes on CUDA: flash where there is no mask and the type has 16 bits, else the memory-efficient one."""
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    ops = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256:
        width = query.shape[-1]
        if width % 8:
            query, key, value = (nn.functional.pad(x, (0, 8 - width % 8)) for x in (query, key, value))
        return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0][..., :width]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return ops._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _RmsNorm(torch.autograd.Function):
    """What CUDA's fused kernel keeps: its input, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, rows: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(rows, dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RmsNorm.apply(x, weight, x.shape[: x.ndim - len(shape)])
