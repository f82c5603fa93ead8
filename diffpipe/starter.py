"""A first config from a few answers, which the planner has found to fit the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        gpus: cards of that size, one process each.
    """

    family: str
    model: str | None
    data: str
    controls: str | None
    gigabytes: float
    full: bool
    resolution: int
    frames: tuple[int, ...] = (1,)
    gpus: int = 1


@dataclass(frozen=True)
class Start:
    """A config and what it takes.

    Attributes:
        text: of the config's file, with what each key means.
    """

    text: str
    plan: Plan


def launcher(gpus: int) -> str:
    """The command that starts diffpipe on so many cards of one machine."""
    return "diffpipe" if gpus == 1 else f"torchrun --nproc_per_node={gpus} -m diffpipe"


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
    for raw in candidates(answers):
        try:
            plan = make_plan(validate(raw, "the answers"), card.name)
        except DiffpipeError as found:
            if found.where != "memory.budget":
                raise
            fault = found
            continue
        return Start(written(answers, raw), plan)
    assert fault is not None
    raise fault


def candidates(answers: Answers) -> Iterator[dict[str, Any]]:
    """Whole configs to try, the plainest first."""
    for mesh, memory in _ways(answers.gpus, answers.full):
        budget = f"{int(answers.gigabytes * USED)}GiB"
        yield keys_of(answers, mesh) | {"memory": {"budget": budget, **memory, "compile": False}}


def written(answers: Answers, raw: Mapping[str, Any]) -> str:
    """A config as the text of its file, with what each key means."""
    return commented_yaml(raw, _head(answers))


def _ways(gpus: int, full: bool) -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
    """Mesh and memory sections to try, the plainest first.

    On several cards an adapter's frozen weights stay on them: each has all, else a part in as few stages as will do; weights that train
    are sharded. Only where that does not fit, as on one card, weights stream.
    """
    alone = {"offload": False}
    if gpus > 1 and full:
        yield from (({"shard": gpus}, memory) for memory in (alone, {"recompute": "block"}))
    elif gpus > 1:
        yield from ((_staged(n, gpus), {"swap": 0, **alone}) for n in range(1, gpus + 1) if gpus % n == 0)
    # Weights that do not train are kept as they are, else in fewer bits. Activations are moved to host memory only where what goes into
    # blocks is all that is kept, since all of a large model would be more than most hosts have.
    for quantize in ("none",) if full else ("none", "fp8", "nf4"):
        for more in (alone, {"recompute": "block"}):
            yield _staged(gpus, gpus), {**({} if quantize == "none" else {"quantize": quantize}), **more}


def _staged(stages: int, gpus: int) -> dict[str, int]:
    """The mesh section of so many stages on all cards, without what is 1."""
    return {axis: count for axis, count in (("stages", stages), ("replicate", gpus // stages)) if count > 1}


def keys_of(answers: Answers, mesh: Mapping[str, int]) -> dict[str, Any]:
    """The config's keys but those of memory, in the schema's order; microbatches fill the pipeline."""
    family = model_class(answers.family)
    flow = family.process == "rectified flow"
    stages = mesh.get("stages", 1)
    folder = {"path": answers.data, **({"controls": answers.controls} if answers.controls else {})}
    return {
        "output_dir": "runs",
        "run": {"steps": 2000},
        **({"mesh": dict(mesh)} if mesh else {}),
        "batch": {"micro": 1, "accumulate": 2 * stages if stages > 1 else 1},
        "model": {
            "family": answers.family,
            "path": answers.model,
            **({"trainable_dtype": "bfloat16"} if answers.full else {}),
        },
        **({"objective": {"shift": 3.0 if family.geometry.fps else "resolution"}} if flow else {}),
        **({} if answers.full else {"adapter": {"rank": 16}}),
        "optimizer": _optimizer(answers.full, "shard" in mesh),
        "schedule": {"warmup": 50},
        "data": {
            "resolutions": [answers.resolution],
            **({"frames": list(answers.frames)} if family.geometry.fps else {}),
            "folders": [folder],
        },
        "checkpoint": {"every_minutes": 30},
        "export": {"every_steps": 500, "formats": ["diffusers", "comfyui"]},
    }


def _optimizer(full: bool, sharded: bool) -> dict[str, Any]:
    """Weights that train are bfloat16, in which small steps must not be lost; 8-bit state is scaled by more than a shard may hold."""
    if not full:
        return {"kind": "adamw", "lr": 1e-4}
    small = {"kind": "adamw", "rounding": "stochastic"} if sharded else {"kind": "adamw8bit-kahan"}
    return {**small, "lr": 1e-5, "clip": None}


def _head(answers: Answers) -> list[str]:
    what = f"{'All weights' if answers.full else 'A LoRA'} of {model_class(answers.family).title}"
    cards = "a card" if answers.gpus == 1 else f"{answers.gpus} cards"
    return [
        f"{what} on {cards} of {answers.gigabytes:g} GB. Every other key is in configs/reference.yaml.",
        f"Start it with: {launcher(answers.gpus)} train THIS_FILE",
        "Put a caption beside each file, in a .txt file of the same name.",
    ]
