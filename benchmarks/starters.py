"""The configs that come with diffpipe for every family: what `diffpipe init` writes for cards of usual sizes.

python -m benchmarks.starters                       # writes them anew from the choices in them, as after a change of the schema
python -m benchmarks.starters --plan [FAMILY ...]   # chooses anew, and prints the least that each can hold
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffpipe.config.load import validate
from diffpipe.config.schema import bytes_of
from diffpipe.durable import write_durably
from diffpipe.metrics import GIB
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.plan import buckets_of, make_plan
from diffpipe.starter import Answers, candidates, usual_frames, usual_resolution, written

HOME = Path(__file__).resolve().parent.parent / "configs"
LARGEST = "H200"  # card that whatever is asked for fits on
DECIDED = "mesh", "memory"  # sections that a plan decides


@dataclass(frozen=True)
class Kind:
    """Of a config: what trains on which cards."""

    gigabytes: int
    gpus: int = 1
    full: bool = False

    @property
    def name(self) -> str:
        cards = f"{self.gpus}x" if self.gpus > 1 else ""
        return f"{'full' if self.full else 'lora'}_{cards}{self.gigabytes}gb"


KINDS = Kind(12), Kind(24), Kind(80), Kind(24, gpus=2), Kind(24, gpus=4), Kind(80, gpus=4, full=True)


def starters() -> Iterator[tuple[Path, Answers]]:
    """Every file with what it answers."""
    for name in sorted(MODELS):
        family = model_class(name)
        controls = "controls" if family.takes_controls else None
        for kind in KINDS:
            size = usual_resolution(family), usual_frames(family)
            yield HOME / name / f"{kind.name}.yaml", Answers(name, None, "data", controls, kind.gigabytes, kind.full, *size, kind.gpus)


def chosen(file: Path, answers: Answers) -> str | None:
    """The text of the candidate that a file holds; None where it holds none."""
    held = yaml.safe_load(file.read_text(encoding="utf-8"))
    fitting = (raw for raw in candidates(answers) if all(raw.get(name) == held.get(name) for name in DECIDED))
    return next((written(answers, raw) for raw in fitting), None)


def least(raw: dict[str, Any]) -> int:
    """The least that a config's stages can hold in its dearest bucket, in bytes, of what it leaves to be chosen.

    Whether a choice fits is known far sooner than which is the fastest.
    """
    config = validate(raw, "the answers")
    buckets, _ = buckets_of(config, make_model(config.model, config.objective))
    dearest = max(buckets, key=lambda b: (b.frames * b.height * b.width, b))
    size = [dearest.width, dearest.height, *([dearest.frames] if dearest.frames > 1 else [])]
    smallest = {"recompute": "block", "recompute_every": 1, "swap": 0 if config.mesh.shard > 1 else "all", "offload": True}
    memory = {key: value for key, value in (smallest | raw["memory"]).items() if key != "budget"}
    mesh = {axis: count for axis, count in raw.get("mesh", {}).items() if axis != "replicate"}  # which hold the same
    return _held(json.dumps(raw | {"data": raw["data"] | {"sizes": [size]}, "memory": memory, "mesh": mesh}))


@cache
def _held(raw: str) -> int:
    plan = make_plan(validate(json.loads(raw), "the answers"), LARGEST)
    return max(estimate.peak for stage in plan.stages for estimate in stage.buckets.values())


def fits(raw: dict[str, Any]) -> bool:
    """Whether anything that a config leaves open keeps its budget."""
    return least(raw) <= bytes_of(raw["memory"]["budget"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("families", nargs="*")
    options.add_argument("--plan", action="store_true")
    given = options.parse_args()
    for file, answers in starters():
        if given.families and answers.family not in given.families:
            continue
        if given.plan:
            raw = next(raw for raw in candidates(answers) if fits(raw))
            text = written(answers, raw)
            print(
                f"{file.relative_to(HOME)}: {least(raw) / GIB:.1f} GiB of {raw['memory']['budget']}, mesh {raw.get('mesh', {})}", flush=True
            )
        else:
            text = chosen(file, answers)
            assert text is not None, f"{file} is of no choice that there is: --plan {answers.family}"
        file.parent.mkdir(exist_ok=True)
        write_durably(file, text.encode())


if __name__ == "__main__":
    main()
