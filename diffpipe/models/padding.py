"""Attention that leaves padding out by kernels that take no mask, which those that take one are two to three times as slow as."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


class Processor:
    """A diffusers attention processor of blocks that attend to a caption with padding and to what it describes.

    Attributes:
        packs: whether padding is left out by ``diffpipe::padded_attention``; else torch's own function gets a mask.
    """

    def __init__(self) -> None:
        from diffusers.models.embeddings import apply_rotary_emb

        self.packs = False
        self._turn: Any = apply_rotary_emb

    def placed(self, x: Tensor, places: Any) -> Tensor:
        """Queries or keys, B N H D, turned by where they are."""
        return self._turn(x, places, sequence_dim=1)

    @staticmethod
    def heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of what the block is about, B N H D."""
        query, key, value = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return attn.norm_q(query), attn.norm_k(key), value

    @staticmethod
    def caption_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the caption, where it has layers of its own."""
        query, key, value = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        return attn.norm_added_q(query), attn.norm_added_k(key), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention.

        Args:
            query, key, value: B N H D.
            mask: B 1 N N or B 1 1 N, true where the key of the last dim is no padding; the same for all queries that are none, as the last
                one is. What padding attends to reaches nothing else.

        Returns:
            B N (H D).
        """
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if mask is None or not self.packs:
            out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            if torch.is_autocast_enabled(query.device.type):
                kind = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(kind), key.to(kind), value.to(kind)
            out = torch.ops.diffpipe.padded_attention(query, key, value, mask[:, 0, -1])[0]
        return out.transpose(1, 2).flatten(2)


def install(denoiser: Any, kind: type[Processor]) -> None:
    """Give a denoiser's blocks processors."""
    for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
        block.attn.set_processor(kind())


def processors(module: nn.Module) -> list[Processor]:
    """Those of a denoiser."""
    found = (getattr(part, "processor", None) for part in module.modules())
    return [each for each in found if isinstance(each, Processor)]


@torch.library.custom_op("diffpipe::padded_attention", mutates_args=(), device_types="cpu")
def padded_attention(query: Tensor, key: Tensor, value: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of all queries to the keys that are no padding.

    Args:
        query, key, value: B H N D, of one type; queries may be more or fewer than keys.
        attended: B N of the keys; true for at least one of each sample.

    Returns:
        The result, B H N D, and the logarithm of each query's sum of exponentials, H (B N), float32.
    """
    out, total = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=_bias(query, attended))
    return _by_rows(out), total.transpose(0, 1).reshape(query.shape[1], -1).contiguous()


@torch.library.custom_op("diffpipe::padded_attention_backward", mutates_args=(), device_types="cpu")
def padded_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; those of padding's keys and values are zeros."""
    batch, heads, count, _ = query.shape
    totals = total.view(heads, batch, count).transpose(0, 1)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    mine, of_keys, of_values = backward(gradient, query, key, value, out, totals, 0.0, False, attn_mask=_bias(query, attended))
    return _by_rows(mine), _by_rows(of_keys), _by_rows(of_values)


@padded_attention.register_kernel("cuda")
def _on_cuda(query: Tensor, key: Tensor, value: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    packed, sizes = _packed(query, key, value, attended, _places(attended))
    out, total, *_ = aten._flash_attention_forward(*packed, *sizes, 0.0, False, False)
    return out.unflatten(0, (len(query), -1)).transpose(1, 2), total


@padded_attention_backward.register_kernel("cuda")
def _back_on_cuda(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    places, there = _places(attended), attended.flatten()[:, None, None]
    packed, sizes = _packed(query, key, value, attended, places)
    random = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # nothing is dropped
    mine, of_keys, of_values = aten._flash_attention_backward(_rows(gradient), *packed, _rows(out), total, *sizes, 0.0, False, *random)
    # The kernel writes no gradients behind the last key that is attended to.
    of_keys, of_values = (torch.where(there, g.index_select(0, places), 0) for g in (of_keys, of_values))
    mine, of_keys, of_values = (g.unflatten(0, (len(query), -1)).transpose(1, 2) for g in (mine, of_keys, of_values))
    return mine, of_keys, of_values


def _packed(query: Tensor, key: Tensor, value: Tensor, attended: Tensor, places: Tensor) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Rows (B N) H D of each, the keys and values that are attended to in front, sample by sample; and where each sample's begin, those of
    queries and of keys, with the most that one may have of each."""
    batch, _, count, _ = query.shape
    most = key.shape[2]
    keys, values = (torch.empty_like(rows).index_copy_(0, places, rows) for rows in (_rows(key), _rows(value)))
    ends = attended.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    begins = torch.arange(0, (batch + 1) * count, count, dtype=torch.int32, device=query.device)
    return (_rows(query), keys, values), (begins, nn.functional.pad(ends, (1, 0)), count, most)


def _places(attended: Tensor) -> Tensor:
    """Where each of B N rows goes: those attended to in front, in their order."""
    flat = attended.flatten()
    front = flat.cumsum(0)
    return torch.where(flat, front - 1, front[-1] + flat.logical_not().cumsum(0) - 1)


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _bias(query: Tensor, attended: Tensor) -> Tensor:
    bias = torch.zeros_like(attended, dtype=query.dtype).masked_fill_(attended.logical_not(), -torch.inf)
    return bias[:, None, None].expand(-1, 1, query.shape[2], -1)


def _by_rows(x: Tensor) -> Tensor:
    """In memory that is laid out B N H D, whatever kernel wrote it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@padded_attention.register_fake
def _shapes(query: Tensor, key: Tensor, value: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_by_rows(query), query.new_empty((query.shape[1], query.shape[0] * query.shape[2]), dtype=torch.float32)


@padded_attention_backward.register_fake
def _back_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_by_rows(query), _empty_by_rows(key), _empty_by_rows(value)


def _empty_by_rows(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _back(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.diffpipe.padded_attention_backward(gradient, *ctx.saved_tensors), None)


padded_attention.register_autograd(_back, setup_context=_keep)


@register_flop_formula(torch.ops.diffpipe.padded_attention)
def _flops(query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.diffpipe.padded_attention_backward)
def _back_flops(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
