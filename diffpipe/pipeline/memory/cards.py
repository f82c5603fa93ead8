"""What the planner knows of cards: how fast they compute and copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpipe.errors import ConfigError
from diffpipe.metrics import GIB
from diffpipe.pipeline.memory.ledger import Work


@dataclass(frozen=True)
class Card:
    """One kind of card. The rates are what programs reach rather than what data sheets promise.

    Attributes:
        name: as torch.cuda.get_device_name has it, or a part of that.
        memory: bytes that a program may use.
        capability: compute capability; 8.9 and above multiply fp8.
        half: operations a second of 16-bit products; 8-bit ones reach ``eight`` times as many, 32-bit ones ``full``, and
            attention kernels ``attention``.
        bandwidth: bytes a second of its memory.
        link: bytes a second to and from page-locked host memory.
    """

    name: str
    memory: int
    capability: tuple[int, int]
    half: float
    bandwidth: float
    link: float
    eight: float = 1.8
    full: float = 0.1
    attention: float = 0.75

    @property
    def multiplies_fp8(self) -> bool:
        return self.capability >= (8, 9)

    @property
    def workspace(self) -> int:
        """Bytes that cuBLAS takes for each thread that computes, as torch has it: 32 MiB on Hopper and later, 8 MiB and 128 KiB before."""
        return 32 << 20 if self.capability >= (9, 0) else (8 << 20) + (128 << 10)

    @property
    def library(self) -> int:
        """What cuBLAS takes in training, where backward passes have a thread of their own."""
        return 2 * self.workspace

    def seconds(self, work: Work) -> float:
        """How long work takes: as long as the card computes, or as the host needs to queue it."""
        products = work.half + work.full / self.full + work.eight / self.eight + work.attention / self.attention
        return max(products / self.half + work.traffic / self.bandwidth, work.queued * QUEUE)


# Seconds in which a host queues one operation of a block that is not compiled: LoRAs of SDXL, Flux, LTX-Video and Lumina 2 took 49 to 54
# microseconds an operation in benchmarks/RESULTS.md's table of families.
QUEUE = 50e-6
# Rates: of H100 and H200, products and copies as measured (8192^3 products at 790 TFLOP/s; copies beside computation and copies the
# other way at 46 GiB/s, alone at 51.7); of the others three quarters of the data sheet's dense 16-bit tensor rate, and four fifths
# of its bandwidths.
CARDS = (
    Card("H200", 139 * GIB, (9, 0), 790e12, 4.0e12, 46 * GIB, attention=0.65),
    Card("H100", 79 * GIB, (9, 0), 700e12, 2.7e12, 46 * GIB, attention=0.7),
    Card("A100 80GB", 79 * GIB, (8, 0), 234e12, 1.6e12, 24 * GIB),
    Card("A100 40GB", 39 * GIB, (8, 0), 234e12, 1.2e12, 24 * GIB),
    Card("RTX PRO 6000", 94 * GIB, (12, 0), 380e12, 1.4e12, 50 * GIB),
    Card("L40S", 44 * GIB, (8, 9), 270e12, 0.69e12, 24 * GIB),
    Card("RTX 5090", 31 * GIB, (12, 0), 157e12, 1.4e12, 50 * GIB),
    Card("RTX 4090", 23 * GIB, (8, 9), 124e12, 0.8e12, 24 * GIB),
    Card("RTX 3090", 23 * GIB, (8, 6), 53e12, 0.75e12, 24 * GIB),
    Card("RTX 4060 Ti", 15 * GIB, (8, 9), 33e12, 0.23e12, 12 * GIB),
    Card("RTX 3060", 11 * GIB, (8, 6), 19e12, 0.29e12, 24 * GIB),
)
USUAL = "RTX 4090"


def find_card(name: str | None, device: torch.device) -> Card:
    """The card called ``name``; without a name the one that there is, and where there is none the RTX 4090.

    Raises:
        ConfigError: when no card of the table has the name.
    """
    present = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    wanted = name or present or USUAL
    found = next((c for c in CARDS if c.name.lower() in wanted.lower()), None)
    if found is not None:
        return found
    if name is not None:
        raise ConfigError(f"no card {name!r} is known", where="--card", expected=", ".join(c.name for c in CARDS))
    return _unknown(device)


def _unknown(device: torch.device) -> Card:
    """A card that is not in the table, by what torch tells of it: a multiprocessor of its generation does about what others do."""
    told = torch.cuda.get_device_properties(device)
    each = 5.0e12 if (told.major, told.minor) >= (9, 0) else 1.0e12
    return Card(told.name, told.total_memory, (told.major, told.minor), each * told.multi_processor_count, 0.7e12, 12 * GIB)
