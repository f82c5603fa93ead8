"""Where a UNet may be cut: its units in order, and what skips from the way down to the way up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def unet_units(config: Mapping[str, Any]) -> Iterator[str]:
    """Resnets, attentions and samplers of a UNet2DConditionModel in the order its ``forward`` calls them."""
    deepest = len(config["block_out_channels"]) - 1
    for side, count in (("down", config["layers_per_block"]), ("up", config["layers_per_block"] + 1)):
        for level, kind in enumerate(config[f"{side}_block_types"]):
            block = f"{side}_blocks.{level}"
            for i in range(count):
                yield f"{block}.resnets.{i}"
                if "CrossAttn" in kind:
                    yield f"{block}.attentions.{i}"
            if level < deepest:
                yield f"{block}.{side}samplers.0"
        if side == "down":
            yield from ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")


@dataclass(frozen=True)
class Skips:
    """Which units' outputs cross the border before a unit: the newest, and those that a resnet beyond it takes.

    On the way down the output of every resnet (of the attention after it, where one is) and of every downsampler is kept after
    ``conv_in``'s; each resnet on the way up takes the newest that is left.

    Attributes:
        takers: of each unit whose output is kept, the unit that takes it.
    """

    takers: Mapping[int, int]

    @classmethod
    def of(cls, units: Sequence[str]) -> Skips:
        """The skips between units, which may have something before their names."""
        kept = [i for i, u in enumerate(units) if "down_blocks." in u and (".resnets." not in u or ".attentions." not in units[i + 1])]
        takers = [i for i, u in enumerate(units) if "up_blocks." in u and ".resnets." in u]
        return cls(dict(zip(reversed(kept), takers, strict=False)))  # the last takes conv_in's, which is no unit's

    def __call__(self, border: int) -> tuple[int, ...]:
        return (*(i for i in range(border - 1) if self.takers.get(i, -1) >= border), border - 1)
