"""From noise to latents: the loop of a diffusers pipeline, whose denoiser is the cut model as it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffpipe.config.schema import PreviewConfig
from diffpipe.models.base import DiffusionModel
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


class Sampler:
    """Samples latents with the weights as they are, one guidance branch at a time; every stage of a pipeline runs the same loop.

    The released pipeline's own loop, scheduler and guidance: only its denoiser is another. Nothing of it is in memory but latents.

    Args:
        tick: called behind each prediction.
    """

    def __init__(self, model: DiffusionModel, pipeline: Pipeline, tick: Callable[[], None] = lambda: None) -> None:
        self.model, self.pipeline, self.tick = model, pipeline, tick
        self.device = pipeline.mesh.device
        self.loop = model.make_sampler(Denoiser(model.released_denoiser(), self.device, self._predict))
        # Of the last sample.
        self.shown: Tensors = {}
        self.stop: Callable[[], bool] = lambda: False

    def sample(
        self,
        wanted: Conditions,
        config: PreviewConfig,
        stop: Callable[[], bool] = lambda: False,
        stepped: Callable[[int], None] = lambda number: None,
    ) -> Tensor:
        """Latents as ``encode_media`` gives them, first dim 1, on the CPU.

        Args:
            stop: whether to give it up; asked before each prediction, and enough on any rank that computes with this one.
            stepped: told behind each step of the scheduler how many are done.

        Raises:
            torch.OutOfMemoryError: on every stage of the pipeline.
            Interrupted: where it was given up.
        """
        model, self.stop = self.model, stop
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
            output_type="latent",
            return_dict=False,
        )
        return model.unpack(made, blank).cpu()

    def _batch(self, row: Tensors) -> dict[str, Tensor]:
        """A sample's tensors with a first dim B, on the device; embeddings in float32, as ``prepare`` gives them."""
        return {n: (t.float() if t.is_floating_point() else t)[None].to(self.device) for n, t in row.items()}

    def _predict(self, call: dict[str, Any]) -> Tensor:
        if self.pipeline.mesh.any_partner(self.stop()):
            raise Interrupted
        made = self.pipeline.predict([self.model.inputs_of(one, self.shown) for one in _split(call)])
        self.tick()
        return made


def _split(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A call of several samples, the branches of guidance, as calls of one each."""
    count = len(next(v for v in call.values() if isinstance(v, Tensor)))
    for i in range(count):
        yield tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) and x.ndim and len(x) == count and count > 1 else x, call)
