"""`diffpipe init`: the questions, and the config that their answers make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

import typer

from diffpipe.errors import ConfigError, told_of_disk, typed

T = TypeVar("T")
WIDTH = 72  # of a question, behind which its usual answer stands


def init_command(output: Path, given: Mapping[str, Any], usual: bool) -> None:
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    if output.exists():
        raise ConfigError("is there already", where=str(output), fix="name another file, or delete it")
    if not output.absolute().parent.is_dir():
        raise ConfigError("its folder is not there", where=str(output), fix="make it, or name another file")
    from diffpipe.durable import write_durably
    from diffpipe.starter import launcher, start

    answers = ask(Questions(given, usual))
    cards = f"{answers.gpus} x " if answers.gpus > 1 else ""
    print(f"planning {answers.family} for {cards}{answers.gigabytes:g} GB ...", flush=True)
    made = start(answers)
    with told_of_disk("cannot be written", where=str(output), fix="name another file", kind=ConfigError):
        write_durably(output, made.text.encode())
    for line in (*made.plan.lines, *(reason for stage in made.plan.stages for reason in stage.reasons)):
        print(f"  {line}")
    name = typed(output)
    print(f"{output} is written; look at the data with `diffpipe inspect {name}`, then `{launcher(answers.gpus)} train {name}`")
    if answers.model is None:
        print(f"it names no model yet: write its folder into {output} as model.path before you train")


class Questions:
    """Answers by options first, then by the person.

    Args:
        given: answers of options by name, None where there is none.
        usual: whether to take what is usual instead of asking.
    """

    def __init__(self, given: Mapping[str, Any], usual: bool) -> None:
        self.given, self.usual = given, usual

    def ask(self, name: str, text: str, usual: Any, read: Callable[[Any], T]) -> T:
        """The answer to one question, asked again until ``read`` takes it.

        Raises:
            ConfigError: for an option that ``read`` refuses, and where nobody answers.
        """
        if self.given[name] is not None or self.usual:
            return read(usual if self.given[name] is None else self.given[name])
        while True:
            try:
                answer = typer.prompt(fill(text, WIDTH, break_on_hyphens=False), default=usual)
            except typer.Abort:
                raise ConfigError("no answer", where=f"--{name}", fix=f"give --{name}, or --yes for what is usual") from None
            try:
                return read(answer)
            except ConfigError as fault:
                print(fault)


def ask(questions: Questions):
    """All that a first config depends on."""
    from diffpipe.models import MODELS, model_class
    from diffpipe.starter import Answers, usual_frames, usual_resolution

    name = questions.ask("family", f"Model family ({', '.join(sorted(MODELS))})", "flux", lambda given: model_class(given).name)
    family = model_class(name)
    videos = family.geometry.fps is not None
    return Answers(
        family=name,
        model=questions.ask("model", "Folder or file of the model, or hf:OWNER/NAME@REVISION (empty: not here yet)", "", _place),
        data=questions.ask("data", f"Folder of {'videos and ' if videos else ''}pictures", "data", str),
        controls=questions.ask("controls", "Folder of control pictures", "controls", str) if family.takes_controls else None,
        gigabytes=questions.ask("card", "Memory of the card in GB", _here(), _number("card", float)),
        gpus=questions.ask("gpus", "How many such cards", _cards(), _number("gpus", int)),
        full=questions.ask("train", "Train a LoRA or all weights (lora, full)", "lora", _full),
        resolution=questions.ask("resolution", "Side of a square picture in pixels", usual_resolution(family), _number("resolution", int)),
        frames=questions.ask("frames", "Frame counts of clips", ",".join(map(str, usual_frames(family))), _frames) if videos else (1,),
    )


def _place(given: str) -> str | None:
    from diffpipe.models.blueprint import HUB
    from diffpipe.toy import SCHEME

    place = given.strip()
    if place and not place.startswith((HUB, SCHEME)) and not Path(place).expanduser().exists():
        raise ConfigError(f"{place}: no such file or folder", where="--model", expected="one that is here, or hf:OWNER/NAME@REVISION")
    return place or None


def _full(given: str) -> bool:
    if given not in ("lora", "full"):
        raise ConfigError(repr(given), where="--train", expected="lora or full")
    return given == "full"


def _number(name: str, kind: Callable[[Any], T]) -> Callable[[Any], T]:
    def read(given: Any) -> T:
        try:
            value = kind(given)
        except ValueError:
            raise ConfigError(repr(given), where=f"--{name}", expected="a number") from None
        if not value > 0:  # pyright: ignore[reportOperatorIssue]
            raise ConfigError(repr(given), where=f"--{name}", expected="a number above 0")
        return value

    return read


def _frames(given: str) -> tuple[int, ...]:
    return tuple(_number("frames", int)(part) for part in str(given).split(","))


def _cards() -> int:
    """How many cards there are; 1 where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def _here() -> float:
    """GB of the card that there is; 24 where there is none."""
    import torch

    return round(torch.cuda.get_device_properties(0).total_memory / 1e9) if torch.cuda.is_available() else 24
