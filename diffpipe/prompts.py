"""The prompts of a config, each with its size, its seed and where the cache has what it is sampled from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffpipe.config.schema import Config, PromptConfig
from diffpipe.data.buckets import Bucket, make_buckets
from diffpipe.data.cache import Cache, key_of
from diffpipe.data.dataset import Sample
from diffpipe.data.files import File
from diffpipe.data.media import PIXELS
from diffpipe.encoder import Task, text_key
from diffpipe.errors import ConfigError
from diffpipe.models.base import DiffusionModel
from diffpipe.sampling import Conditions


@dataclass(frozen=True)
class Prompt:
    """One preview to make.

    Attributes:
        text: what it shows.
        negative: what it is guided away from; None where the family needs no text for that.
        text_key, negative_key, image_key: of the cache's entries.
    """

    text: str
    negative: str | None
    seed: int
    bucket: Bucket
    image: File | None
    text_key: str
    negative_key: str | None
    image_key: str | None

    def tasks(self) -> list[Task]:
        """The entries that the cache must have."""
        tasks = [Task(self.text_key, "text", text=self.text)]
        if self.negative_key is not None:
            tasks.append(Task(self.negative_key, "negative", text=self.negative or ""))
        if self.image is not None and self.image_key is not None:
            shown = Sample(self.image, (), self.bucket, 1.0, self.image_key, ())
            tasks.append(Task(self.image_key, "media", shown))
        return tasks

    def conditions(self, cache: Cache) -> Conditions:
        """What it is sampled from, mapped from the cache."""
        return Conditions(
            self.seed,
            self.bucket.frames,
            self.bucket.height,
            self.bucket.width,
            cache[self.text_key],
            None if self.negative_key is None else cache[self.negative_key],
            {} if self.image_key is None else cache[self.image_key],
        )

    def blank(self, model: DiffusionModel) -> Conditions:
        """Zeros in their place, texts as long as they are kept: known before anything is encoded."""
        dims = (self.bucket.frames, self.bucket.height, self.bucket.width)
        negative = None if self.negative_key is None else model.blank_text()
        return Conditions(self.seed, *dims, model.blank_text(), negative, model.blank_media(*dims) if model.takes_image else {})


class Prompts:
    """All prompts of a run, in order, and the cache that holds what they are sampled from."""

    def __init__(self, entries: Sequence[Prompt], cache: Cache) -> None:
        self.entries, self._cache = entries, cache

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Prompt:
        return self.entries[number]

    def conditions(self, number: int) -> Conditions:
        """What a prompt is sampled from, mapped from disk."""
        return self.entries[number].conditions(self._cache)

    def keys(self) -> set[str]:
        """The cache keys of everything that they need."""
        return set(entries_of(self.entries))


def read_prompts(config: Config, model: DiffusionModel) -> list[Prompt]:
    """The prompts of ``preview``, in order.

    Raises:
        ConfigError: when the family cannot be sampled, or not as a prompt says.
        CheckpointError: when the model's folder lacks what it is sampled with.
    """
    if config.preview.prompts and model.guided is None:
        raise ConfigError(
            f"{model.name} cannot be sampled yet", where="preview.prompts", fix="take them out; `diffpipe models` tells which families can"
        )
    if config.preview.prompts:
        model.load_scheduler()  # for its faults, before anything large is loaded
    return [_read(i, prompt, config, model) for i, prompt in enumerate(config.preview.prompts)]


def _read(number: int, given: PromptConfig, config: Config, model: DiffusionModel) -> Prompt:
    where, whole = f"preview.prompts.{number}", config.preview
    negative = whole.negative if given.negative is None else given.negative
    if negative is not None and model.guided != "classifier-free":
        key = f"{where}.negative" if given.negative is not None else "preview.negative"
        raise ConfigError(f"{model.name} has no use for it: its guidance is distilled", where=key, fix="take it out")
    negative = model.no_prompt if negative is None else negative
    bucket = _bucket(where, given, config, model)
    image = image_key = None
    if (given.image is not None) != model.takes_image:
        told = f"{model.name} needs a picture to begin from" if model.takes_image else f"{model.name} has no use for it"
        raise ConfigError(told, where=f"{where}.image", fix="name a file" if model.takes_image else "take it out")
    if given.image is not None:
        image = File(given.image)
        try:
            digest = image.digest()
        except OSError as fault:
            raise ConfigError(f"cannot be read: {fault.strerror or fault}", where=f"{where}.image: {image}") from fault
        image_key = key_of("media", digest, f"{bucket} centre pixels {PIXELS}", model.identity("media"))
    return Prompt(
        text=given.prompt,
        negative=negative,
        seed=whole.seed if given.seed is None else given.seed,
        bucket=bucket,
        image=image,
        text_key=text_key(given.prompt, model),
        negative_key=None if negative is None else key_of("negative", negative, model.identity("text")),
        image_key=image_key,
    )


def _bucket(where: str, given: PromptConfig, config: Config, model: DiffusionModel) -> Bucket:
    shape, usual = model.geometry, _usual(config, model)
    sides: dict[str, int] = {}
    for name in ("frames", "height", "width"):
        own, whole = getattr(given, name), getattr(config.preview, name)
        sides[name] = own or whole or getattr(usual, name)
        key = f"{where}.{name}" if own else f"preview.{name}"
        valid = shape.frames(sides[name]) if shape.fps else 1
        if name == "frames" and sides[name] != valid:
            expected = f"{shape.temporal} k + 1 for {model.name}" if shape.fps else f"1, for {model.name} makes pictures"
            raise ConfigError(f"{sides[name]} frames", where=key, expected=expected, fix=f"set it to {valid}")
        if name != "frames" and sides[name] % shape.multiple:
            fitting = max(1, round(sides[name] / shape.multiple)) * shape.multiple
            raise ConfigError(
                f"{sides[name]} pixels", where=key, expected=f"a multiple of {shape.multiple} for {model.name}", fix=f"set it to {fitting}"
            )
    return Bucket(**sides)


def _usual(config: Config, model: DiffusionModel) -> Bucket:
    """The squarest bucket of the data's largest resolution, at its longest."""
    sizes = make_buckets(config.data, model.geometry).groups[-1]
    height, width = min(sizes, key=lambda size: (abs(math.log(size[1] / size[0])), -size[0]))
    return Bucket(max(sizes[height, width], default=1) if model.geometry.fps else 1, height, width)


def entries_of(prompts: Sequence[Prompt]) -> dict[str, Task]:
    """Every entry that prompts need, by key."""
    return {task.key: task for prompt in prompts for task in prompt.tasks()}
