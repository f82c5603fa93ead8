"""From noise to latents: the loop of a diffusers pipeline, whose denoiser is the cut model as it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffpipe.config.schema import PreviewConfig
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.memory.ledger import Ledger
from diffpipe.pipeline.schedule import Pipeline

Tensors = Mapping[str, Tensor]


class Interrupted(Exception):
    """A sample was given up, on all ranks that made it."""


@dataclass(frozen=True)
class Conditions:
    """What one sample is made from.

    Attributes:
        seed: decides its noise.
        frames, height, width: in pixels.
        text, negative, shown: what the model cached of the prompt, of what it is guided away from and of its picture, without a first
            dim B; None or empty without one.
    """

    seed: int
    frames: int
    height: int
    width: int
    text: Tensors
    negative: Tensors | None
    shown: Tensors


class Denoiser(nn.Module):
    """Stands where a diffusers pipeline has its denoiser: answers for its attributes, and has the stages predict.

    Args:
        released: the denoiser that it stands for, on meta.
        predict: takes the arguments of a call by name, and gives a prediction.
    """

    def __init__(self, released: nn.Module, device: torch.device, predict: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        # Not as attributes: what is released is no part of this module.
        self.__dict__.update(released=released, device=device, predict=predict, call=inspect.signature(released.forward))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["released"], name)

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes in and goes out; the stages compute in their own."""
        return torch.float32

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        given = self.call.bind(*args, **kwargs).arguments
        own = {n: v for n, v in given.items() if v is not None and n != "return_dict" and not n.endswith("attention_kwargs")}
        return (self.predict(own),)


class Loop:
    """From noise to latents as the released pipeline goes, by its own loop, scheduler and guidance: only its denoiser is another.

    Nothing of the pipeline is in memory but latents and embeddings.

    Args:
        predict: takes the inputs of ``forward`` for one call that the loop makes of its denoiser, one guidance branch a time; gives what
            the model makes of them along the first dim.
    """

    def __init__(self, model: DiffusionModel, device: torch.device, predict: Callable[[list[dict[str, Any]]], Tensor]) -> None:
        self.model, self.device, self.predict = model, device, predict
        self.loop = model.make_sampler(Denoiser(model.released_denoiser(), device, self._predict))
        self.shown: Tensors = {}  # of the last sample

    def run(self, wanted: Conditions, config: PreviewConfig, stepped: Callable[[int], None] = lambda number: None) -> Tensor:
        """Latents as ``encode_media`` gives them, first dim 1, on the CPU.

        Args:
            stepped: told behind each step of the scheduler how many are done.
        """
        model = self.model
        blank = model.blank_media(wanted.frames, wanted.height, wanted.width)["latents"][None]
        noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(wanted.seed))
        rows = model.align([dict(row) for row in (wanted.text, wanted.negative) if row is not None])
        text, *negative = [self._batch(row) for row in rows]
        self.shown = self._batch(wanted.shown)

        def behind(loop: Any, number: int, time: Any, latents: dict[str, Any]) -> dict[str, Any]:
            stepped(number + 1)
            return latents

        (made,) = self.loop(
            **model.conditions(text, negative[0] if negative else None, self.shown),
            **({"num_frames": wanted.frames} if model.geometry.fps else {}),
            **({} if config.guidance is None else {"guidance_scale": config.guidance}),
            height=wanted.height,
            width=wanted.width,
            num_inference_steps=config.steps,
            latents=model.pack(noise),
            generator=torch.Generator().manual_seed(wanted.seed),
            callback_on_step_end=behind,
            callback_on_step_end_tensor_inputs=[],  # for any, the loop would keep all that it holds until the next step is over
            output_type="latent",
            return_dict=False,
        )
        return model.unpack(made, blank).cpu()

    def _batch(self, row: Tensors) -> dict[str, Tensor]:
        """A sample's tensors with a first dim B, on the device; embeddings in float32, as ``prepare`` gives them."""
        return {n: (t.float() if t.is_floating_point() else t)[None].to(self.device) for n, t in row.items()}

    def _predict(self, call: dict[str, Any]) -> Tensor:
        return self.predict([self.model.inputs_of(one, self.shown) for one in _split(call)])


class Sampler:
    """Samples latents with the weights as they are, one guidance branch at a time; every stage of a pipeline runs the same loop.

    Args:
        tick: called behind each prediction.
    """

    def __init__(self, model: DiffusionModel, pipeline: Pipeline, tick: Callable[[], None] = lambda: None) -> None:
        self.pipeline, self.tick = pipeline, tick
        self.loop = Loop(model, pipeline.mesh.device, self._predict)
        self.stop: Callable[[], bool] = lambda: False  # of the last sample

    def sample(
        self,
        wanted: Conditions,
        config: PreviewConfig,
        stop: Callable[[], bool] = lambda: False,
        stepped: Callable[[int], None] = lambda number: None,
    ) -> Tensor:
        """As ``Loop.run``.

        Args:
            stop: whether to give it up; asked before each prediction, and enough on any rank that computes with this one.

        Raises:
            torch.OutOfMemoryError: on every stage of the pipeline.
            Interrupted: where it was given up.
        """
        self.stop = stop
        return self.loop.run(wanted, config, stepped)

    def _predict(self, microbatches: list[dict[str, Any]]) -> Tensor:
        if self.pipeline.mesh.any_partner(self.stop()):
            raise Interrupted
        made = self.pipeline.predict(microbatches)
        self.tick()
        return made


@dataclass(frozen=True)
class Asked:
    """What a sample first has predicted.

    Attributes:
        microbatches: inputs of ``forward``, one for each guidance branch that goes through the stages together.
        bytes: held by the loop meanwhile, these among them.
    """

    microbatches: list[dict[str, Any]]
    bytes: int


def first_asked(model: DiffusionModel, wanted: Conditions, config: PreviewConfig) -> Asked:
    """What the loop asks the stages for, found by running it that far on the CPU; it asks for the like at every step."""
    found: list[Asked] = []

    def predict(microbatches: list[dict[str, Any]]) -> Tensor:
        found.append(Asked(microbatches, ledger.live))
        raise Interrupted

    loop, ledger = Loop(model, torch.device("cpu"), predict), Ledger()
    with suppress(Interrupted), ledger:
        loop.run(wanted, config)
    return found[0]


def _split(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A call of several samples, the branches of guidance, as calls of one each."""
    count = len(next(v for v in call.values() if isinstance(v, Tensor)))
    for i in range(count):
        yield tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) and x.ndim and len(x) == count and count > 1 else x, call)
