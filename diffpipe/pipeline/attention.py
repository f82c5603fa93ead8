"""Which attention kernels a run takes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl

from diffpipe.errors import ConfigError
from diffpipe.models.padding import padded_attention

# Versions of FlashAttention-4 whose functions torch 2.11 to 2.13 call as they are; later ones give more results.
FA4 = (Version("4.0.0b4"), Version("4.0.0b18"))
FLASH = (8, 0)  # compute capability from which torch has flash attention
HOPPER, BLACKWELL = 9, 10  # compute capabilities that torch gives to FlashAttention-4


class Attention:
    """Takes the attention kernels that were asked for.

    torch prefers cuDNN's on Hopper and later cards, but at some lengths, layouts and masks their backward pass has given NaN from
    finite inputs (pytorch/pytorch#196678; torch 2.11 to 2.13), and values that are wrong (benchmarks/RESULTS.md): they are taken as
    long as their gradients are finite, or steps cannot be repeated.

    Args:
        kind: as ``model.attention``.
        repeats: whether a step can be repeated: not where weights move in its backward pass.

    Attributes:
        retreated: whether cuDNN's kernels were given up.

    Raises:
        ConfigError: when the kernels cannot be had.
    """

    def __init__(self, kind: str, device: torch.device, repeats: bool = True) -> None:
        self.cudnn, self.repeats, self.retreated = kind == "cudnn", repeats, False
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)
        check_attention(kind, device)
        if kind == "fa4":
            activate_flash_attention_impl("FA4")
        elif current_flash_attention_impl() is not None:
            restore_flash_attention_impl()

    def retreat(self) -> bool:
        """Take cuDNN's kernels no more; whether they may have been in use, and a step without them is worth a try."""
        if not self.cudnn or not self.repeats:
            return False
        self.cudnn, self.retreated = False, True
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.compiler.reset()  # which kernel runs is part of what was compiled
        return torch.cuda.is_available()


def check_attention(kind: str, device: torch.device) -> None:
    """Raise where a device cannot have the kernels of ``model.attention``.

    Raises:
        ConfigError: with what to do.
    """
    why = lacks_fa4(device) if kind == "fa4" else None
    if why is not None:
        raise ConfigError(f"fa4, {why[0]}", where="model.attention", expected="sdpa, cudnn or fa4", fix=why[1])


def packs(kind: str, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a card of this compute capability leaves padding out of attention rather than mask it: flash attention takes 16 bits, from
    Ampere on; cuDNN's kernels are as fast with a mask."""
    return kind != "cudnn" and dtype.itemsize == 2 and capability >= FLASH


def packs_here(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device does, and its kernels give what torch's own function gives with a mask."""
    if device.type != "cuda":
        return packs(kind, dtype, FLASH)  # as a card would, whose runs are tried on the CPU
    if not packs(kind, dtype, torch.cuda.get_device_capability(device)) or not torch.backends.cuda.is_flash_attention_available():
        return False
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, gradient = torch.randn(4, 2, 4, 200, 128, generator=generator, device=device, dtype=dtype)
    attended = torch.ones(2, 200, dtype=torch.bool, device=device)
    attended[0, 150:] = attended[1, 20:60] = False

    def both_ways(attend: Callable[..., Tensor]) -> list[Tensor]:
        given = [x.clone().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            out = attend(*given)
        return [out, *torch.autograd.grad(out, given, gradient)]

    try:
        found = both_ways(lambda *given: padded_attention(*given, attended)[0])
    except RuntimeError:  # of a kernel that has no such form
        return False
    wanted = both_ways(lambda *given: nn.functional.scaled_dot_product_attention(*given, attn_mask=attended[:, None, None]))
    return all(torch.allclose(x, y, rtol=0.05, atol=0.05) for x, y in zip(found, wanted, strict=True))


def lacks_fa4(device: torch.device) -> tuple[str, str] | None:
    """Why a device cannot have FlashAttention-4, and what to do; None where it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (HOPPER, BLACKWELL):
        return "which runs on cards of compute capability 9 and 10 alone (H100, H200, B200)", "set model.attention: sdpa"
    install = "pip install 'diffpipe[fa4]'"
    try:
        found = Version(metadata.version("flash-attn-4"))
    except metadata.PackageNotFoundError:
        return "whose package is missing", install
    if not FA4[0] <= found <= FA4[1]:
        return f"of whose package {found} is installed, where torch calls {FA4[0]} to {FA4[1]}", install
    return None
