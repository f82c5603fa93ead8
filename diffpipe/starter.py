"""A first config from a few answers, which the planner has found to fit the card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffpipe.config.load import validate
from diffpipe.config.reference import commented_yaml
from diffpipe.errors import ConfigError, DiffpipeError
from diffpipe.metrics import GIB
from diffpipe.models import model_class
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.memory.cards import CARDS
from diffpipe.plan import Plan, make_plan

USED = 0.93  # part of what is printed on a card that steps may hold: the driver and CUDA take the rest


@dataclass(frozen=True)
class Answers:
    """What a first config depends on.

    Attributes:
        model: what model.path says; None for the released one, of which nothing is here.
        data: folder of media.
        controls: folder of control pictures, for families that take them.
        gigabytes: of the card.
        full: whether all weights train.
        resolution: side of a square, in pixels.
        frames: counts of clips; 1 is for pictures.
    """

    family: str
    model: str | None
    data: str
    controls: str | None
    gigabytes: float
    full: bool
    resolution: int
    frames: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Start:
    """A config and what it takes.

    Attributes:
        text: of the config's file, with what each key means.
    """

    text: str
    plan: Plan


def usual_resolution(family: type[DiffusionModel]) -> int:
    """The side that a family is usually trained at."""
    return 512 if family.geometry.fps else 1024


def usual_frames(family: type[DiffusionModel]) -> tuple[int, ...]:
    """Pictures, and clips of about two seconds where the family takes videos."""
    return (1, family.geometry.frames(33)) if family.geometry.fps else (1,)


def start(answers: Answers) -> Start:
    """The plainest config that fits the card.

    Raises:
        DiffpipeError: when an answer is wrong, or nothing fits.
    """
    family = model_class(answers.family)
    if family.takes_controls and answers.controls is None:
        raise ConfigError(f"{answers.family} makes each picture from a control picture", where="--controls", fix="name their folder")
    least = int(answers.gigabytes * USED)
    if least < 1:
        raise ConfigError(f"{answers.gigabytes:g} GB", where="--card", expected="the card's memory in GB, such as 24")
    card = min(CARDS, key=lambda c: abs(c.memory / GIB - answers.gigabytes * USED))
    fault: DiffpipeError | None = None
    for memory in _ways(answers.full):
        raw = keys_of(answers) | {"memory": {"budget": f"{least}GiB", **memory, "compile": False}}
        try:
            plan = make_plan(validate(raw, "the answers"), card.name)
        except DiffpipeError as found:
            if found.where != "memory.budget":
                raise
            fault = found
            continue
        return Start(commented_yaml(raw, _head(answers)), plan)
    assert fault is not None
    raise fault


def _ways(full: bool) -> Iterator[dict[str, Any]]:
    """Memory sections to try, the plainest first.

    Weights that do not train are kept as they are, else in fewer bits. Activations are moved to host memory only where what goes into
    blocks is all that is kept, since all of a large model would be more than most hosts have.
    """
    for quantize in ("none",) if full else ("none", "fp8", "nf4"):
        for more in ({"offload": False}, {"recompute": "block"}):
            yield {**({} if quantize == "none" else {"quantize": quantize}), **more}


def keys_of(answers: Answers) -> dict[str, Any]:
    """The config's keys but those of memory, in the schema's order."""
    family = model_class(answers.family)
    flow = family.process == "rectified flow"
    folder = {"path": answers.data, **({"controls": answers.controls} if answers.controls else {})}
    return {
        "output_dir": "runs",
        "run": {"steps": 2000},
        "batch": {"micro": 1, "accumulate": 1},
        "model": {
            "family": answers.family,
            "path": answers.model,
            **({"trainable_dtype": "bfloat16"} if answers.full else {}),
        },
        **({"objective": {"shift": 3.0 if family.geometry.fps else "resolution"}} if flow else {}),
        **({} if answers.full else {"adapter": {"rank": 16}}),
        "optimizer": {"kind": "adamw8bit-kahan", "lr": 1e-5, "clip": None} if answers.full else {"kind": "adamw", "lr": 1e-4},
        "schedule": {"warmup": 50},
        "data": {
            "resolutions": [answers.resolution],
            **({"frames": list(answers.frames)} if family.geometry.fps else {}),
            "folders": [folder],
        },
        "checkpoint": {"every_minutes": 30},
        "export": {"every_steps": 500, "formats": ["diffusers", "comfyui"]},
    }


def _head(answers: Answers) -> list[str]:
    what = f"{'All weights' if answers.full else 'A LoRA'} of {model_class(answers.family).title}"
    return [
        f"{what} on a card of {answers.gigabytes:g} GB. Every other key is in configs/reference.yaml.",
        "Put a caption beside each file, in a .txt file of the same name.",
    ]
