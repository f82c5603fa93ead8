"""Linear layers in 7 bits (e3m3), multiplied as fp8 where the card can: an eighth less to hold and to copy than fp8."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.library import Library, register_fake
from torch.utils._triton import has_triton

from diffpipe.models.weights import WeightSource
from diffpipe.pipeline.memory.compiling import allow_many
from diffpipe.pipeline.memory.quantize.fp8 import FP8, Fp8Linear, dequantized
from diffpipe.pipeline.memory.quantize.frozen import empty

# Groups of columns that lie side by side. Of every sixteen codes, one of each group, fourteen bytes are made: so each group is
# found from whole bytes by what is one to all its columns, in one kernel. Of eight groups inductor would compute all for each column.
GROUPS = 16
FOURS, TWOS, ONES = GROUPS // 2, GROUPS // 4, GROUPS // 8  # bytes that hold so many bits of a code
BYTES = FOURS + TWOS + ONES
SMALLEST = 4.0  # of e3m3's normal values, where its largest is e4m3's; values of both are the same from there on
STEP = 0.5  # between the values below
FIRST = 72  # the e4m3 code of SMALLEST
NORMAL = 8  # its e3m3 code: from there on, codes of both run alike
UNIT = 2.0**16  # what float16 takes for a code's bits is smaller by it


class Fp7Linear(Fp8Linear):
    """A weight in e3m3 with a scale for each row: a sign, three bits of exponent, three of mantissa. Its values are those of e4m3 from
    a hundredth of the largest on, and below that evenly spaced: each can be multiplied as e4m3."""

    def __init__(self, inner: nn.Linear, products: bool) -> None:
        super().__init__(inner, products)
        self.codes = empty(inner.out_features, inner.in_features // GROUPS * BYTES, dtype=torch.uint8)

    @staticmethod
    def as_fp8(codes: Tensor, after: Tensor | None) -> Tensor:
        return torch.ops.diffpipe.unpacked(codes, codes if after is None else after, FP8)

    @staticmethod
    def brought_to(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        halves = torch.ops.diffpipe.unpacked(codes, scale, torch.float16)  # the backward pass' scales are others to a compiler
        return dequantized(halves, UNIT * scale, dtype)

    def encoded(self, source: WeightSource, name: str, device: torch.device) -> dict[str, Tensor]:
        # Of e4m3 codes in a file the small ones would be lost: their scales may leave the others' bits unused.
        codes, scale = self.quantized(source.read(name).to(device).float(), name)
        return {"codes": _packed(codes), "scale": scale}

    def rounded(self, weight: Tensor) -> Tensor:
        return torch.where(weight.abs() < SMALLEST, (weight / STEP).round() * STEP, weight).to(FP8)


def fits(inner: nn.Linear) -> bool:
    """Whether a layer's codes fill bytes."""
    return inner.in_features % GROUPS == 0


def _packed(values: Tensor) -> Tensor:
    """Bytes of values of e4m3 that are e3m3's too."""
    bits = values.view(torch.uint8)
    small = (values.float().abs() / STEP).to(torch.uint8)
    codes = torch.where(bits & 127 >= FIRST, (bits & 127) - (FIRST - NORMAL), small).unflatten(1, (GROUPS, -1))
    signs = (bits >> 7).unflatten(1, (GROUPS, -1))
    planes = _together(codes & 15, FOURS, 4), _together(codes >> 4, TWOS, 2), _together(signs, ONES, 1)
    return torch.cat(planes, 1).flatten(1)


def _together(parts: Tensor, count: int, bits: int) -> Tensor:
    """Parts of all groups' codes in so many bytes: that of a group goes with those that lie a multiple of ``count`` from it."""
    whole = torch.zeros_like(parts[:, :count])
    for i in range(GROUPS // count):
        whole |= parts[:, i * count : (i + 1) * count] << bits * i
    return whole


def unpacked(codes: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """What bytes stand for.

    Args:
        after: not read; a compiler must think that the result depends on it, so that it makes it anew for the backward pass.
        dtype: e4m3; or float16, for cards that have none, whose values are smaller by ``UNIT``.
    """
    if not codes.is_cuda or not has_triton():
        return _unpack(codes, dtype)
    allow_many()
    return _unpack_by_kernel(codes, dtype)


def _unpack(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """A code's bits are put where float16 has its sign, the last of its exponent and the first of its mantissa: it reads those of the
    smallest exponent as e3m3 does."""
    planes = codes.unflatten(1, (BYTES, -1)).int()
    columns = []
    for i in range(GROUPS):
        low = planes[:, i % FOURS] >> 4 * (i // FOURS) & 15
        middle = planes[:, FOURS + i % TWOS] >> 2 * (i // TWOS) & 3
        sign = planes[:, FOURS + TWOS + i % ONES] >> i // ONES & 1
        halves = (low << 7 | middle << 11 | sign << 15).to(torch.int16)
        columns.append(halves if dtype == torch.float16 else (halves.view(torch.float16).float() * UNIT).to(dtype).view(torch.uint8))
    return torch.cat(columns, 1).view(dtype)  # as whole numbers: autocast would bring others to its type


# An operation of its own, compiled once for each shape: as a part of compiled blocks, each of their layers would take minutes.
_unpack_by_kernel = torch.compile(_unpack, dynamic=False)
LIBRARY = Library("diffpipe", "FRAGMENT")
LIBRARY.define("unpacked(Tensor codes, Tensor after, ScalarType dtype) -> Tensor")
LIBRARY.impl("unpacked", unpacked, "CompositeExplicitAutograd")


@register_fake("diffpipe::unpacked", lib=LIBRARY)
def _(codes: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] // BYTES * GROUPS, dtype=dtype)
