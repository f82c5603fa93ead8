"""What a VAE holds in memory while it decodes, found by having it decode fake latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from diffpipe.models.base import DiffusionModel
from diffpipe.models.encoders import halve_tiles, tile_side
from diffpipe.pipeline.cut import Fakes, signature_of
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.ledger import Ledger


@dataclass(frozen=True)
class Decoding:
    """A sample's way from latents to pixels.

    Attributes:
        weights: bytes of the VAE's.
        taken: bytes held beside them at most.
        halved: how often the sides of its tiles were halved.
        tile: pixels along the side of a tile; None where it decodes the sample whole.
    """

    weights: int
    taken: int
    halved: int
    tile: int | None


def measure_decoding(model: DiffusionModel, frames: int, height: int, width: int, halved: int) -> Decoding | None:
    """How ``decode_media`` goes for a sample of these dims in pixels; None where tiles cannot be halved so often."""
    decoder, fakes, ledger = model.blank_decoder(), Fakes(torch.device("cpu")), Ledger()
    vae = decoder.vae
    if not all(halve_tiles(vae) for _ in range(halved)):
        return None
    fakes.fill(vae)
    latents = fakes.tensor(model.blank_media(frames, height, width)["latents"][None])
    with fakes.mode, torch.no_grad(), ledger:
        for tensor in [*vae.parameters(), *vae.buffers()]:
            ledger.number(tensor)
        weights = ledger.peak = ledger.live
        vae.decoder.forward = _remembered(vae.decoder.forward, ledger)
        for name in [n for n in ("blend_v", "blend_h", "blend_t") if hasattr(vae, n)]:
            setattr(vae, name, lambda before, tile, extent: tile)  # row by row, in place: nothing to hold, and much to wait for
        as_on_cuda(model.decode_media)(decoder, latents)
    side = tile_side(vae)
    return Decoding(weights, ledger.peak - weights, halved, side if side is not None and side < max(height, width) else None)


def _remembered(forward: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    """``forward`` that runs once for each kind of tile; for others like it what comes out, and what it leaves in lists, is made anew."""
    known: dict[Any, tuple[int, Any]] = {}

    def remembering(*args: Any, **kwargs: Any) -> Any:
        kind = _kind(args, kwargs)
        lists = [x for x in (*args, *kwargs.values()) if isinstance(x, list)]
        highest = ledger.peak
        if kind not in known:
            start = ledger.peak = ledger.live
            out = forward(*args, **kwargs)
            with ledger.pause():
                known[kind] = ledger.peak - start, _like((out, lists))
            ledger.peak = max(ledger.peak, highest)
            return out
        taken, made = known[kind]
        ledger.peak = max(highest, ledger.live + taken)
        out, left = made
        for mine, then in zip(lists, left, strict=True):
            mine[:] = [old if _kind(old) == _kind(new) else _like(new) for old, new in zip_longest(mine[: len(then)], then)]
        return _like(out)

    return remembering


def _kind(*given: Any) -> Any:
    """What decides how a call goes, holding none of it: what a call replaces in its lists is to be let go."""
    leaves, tree = tree_flatten(given)
    return tree, signature_of(leaves)


def _like(made: Any) -> Any:
    return tree_map_only(Tensor, lambda x: torch.empty_strided(x.size(), x.stride(), dtype=x.dtype), made)
