"""Trains tiny models under settings drawn at random of memory and optimizer sections, against the same without any of them.

    python -m benchmarks.policies [--minutes 10] [--seed 0] [--compile]

Of every family, under a LoRA and in full, three steps of one to three microbatches with an evaluation behind each: losses, weights (frozen
ones too) and optimizer state must be the same bit for bit; near to each other where blocks are compiled, or three
microbatches are added up in another order. Prints each that is not, with the number that draws it again, and ends with 1 if there are any.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpipe.config.schema import MemoryConfig
from diffpipe.models import MODELS
from diffpipe.pipeline.memory.layer import order_of
from tests.conftest import toy_checkpoint
from tests.pipeline.test_release import Outcome, trained

# By largest difference of a loss and of an element: of sums in another order in bfloat16, stepped in 8 bits; of compiled blocks.
REORDERED, COMPILED = (2e-3, 1e-2), (5e-3, 2e-2)


def drawn(number: int, compiles: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What is trained and how, the memory section's settings, and the optimizer section's."""
    r = random.Random(number)
    adapter = r.choice([{"rank": 4}, {"rank": 4}, None])
    kinds = ["adamw", "adamw", "adamw8bit", "adamw8bit-kahan"]
    task: dict[str, Any] = {
        "family": r.choice(sorted(MODELS)),
        "adapter": adapter,
        "count": r.choice([1, 1, 2, 3]),
        "kind": r.choice(kinds),
    }
    task["fixed"] = {"compile": True} if compiles else {}
    if adapter and r.random() < 0.4:
        task["fixed"]["quantize"] = r.choice(["fp8", "fp8-plain", "fp8-block", "fp7", "nf4"])
    memory: dict[str, Any] = {"swap": r.choice([0, 1, 2, 3, "all", "all"])}
    memory["recompute"] = r.choice(["none", "block", "selective", *["parts"] * compiles])
    if memory["swap"] and r.random() < 0.6:
        memory["room"] = r.choice([0.2, 0.5, 1.0, 2.0, 5.0])
    if r.random() < 0.5:
        memory |= {"offload": True, "offload_threshold": r.choice([0.001, 0.01])}
    if r.random() < 0.2:
        memory["recompute_every"] = 2
    if r.random() < 0.4:
        memory["order"] = r.choice(["layer", "microbatch"])
    return task, memory, {key: True for key in ("release", "offload") if r.random() < 0.5}


def difference(got: Outcome, want: Outcome, within: tuple[float, float] | None) -> str | None:
    """What is not the same, or farther apart than it may be."""

    def near(a: Tensor, b: Tensor, most: float) -> bool:
        return (
            torch.equal(a, b) if within is None else bool((a.float() - b.float()).abs().max() <= most * b.float().abs().max().clamp(min=1))
        )

    if not near(torch.tensor(got[0]), torch.tensor(want[0]), within[0] if within else 0):
        return f"losses {got[0]} instead of {want[0]}"
    for ours, theirs in zip(got[2:] if within is None else got[2:3], want[2:], strict=False):
        if ours.keys() != theirs.keys():
            return f"names {sorted(ours.keys() ^ theirs.keys())}"
        for name, value in theirs.items():
            if not near(ours[name].cpu(), value.cpu(), within[1] if within else 0):
                return name
    return None


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--compile", action="store_true", help="compiled blocks, which take longer")
    given = options.parse_args()
    plain: dict[str, Outcome] = {}
    begun, number, wrong = time.monotonic(), given.seed, 0
    with tempfile.TemporaryDirectory() as home:
        while time.monotonic() - begun < 60 * given.minutes:
            task, memory, optimizer = drawn(number, given.compile)
            family, checkpoint = task["family"], toy_checkpoint(task["family"], Path(home))
            fixed, same = task["fixed"], {"count": task["count"], "adapter": task["adapter"], "kind": task["kind"]}
            if repr(task) not in plain:
                plain[repr(task)] = trained(family, checkpoint, {**fixed, "recompute": "none"}, range(3), **same)
            got = trained(family, checkpoint, {**fixed, **memory}, range(3), **same, **optimizer)
            reordered = order_of(MemoryConfig.model_validate({**fixed, **memory})) == "layer" and task["count"] > 2
            found = difference(got, plain[repr(task)], COMPILED if given.compile else REORDERED if reordered else None)
            if found is not None:
                wrong += 1
                print(f"{number}: {task}, memory {memory}, optimizer {optimizer}: {found}", flush=True)
            number += 1
    print(f"{number - given.seed} settings, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
