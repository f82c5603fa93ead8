"""Previews: what the prompts of a config become with the weights as they are, as files and for sinks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from diffpipe.config.schema import Config, PreviewConfig
from diffpipe.data.media import write
from diffpipe.encode import prepare_prompts
from diffpipe.errors import DiffpipeError, ShortageError
from diffpipe.metrics import PreviewRecord, Progress, Sinks
from diffpipe.models.base import DiffusionModel
from diffpipe.models.encoders import Encoders, halve_tiles
from diffpipe.pipeline.memory.shortage import SMALLER_PREVIEWS, explained
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.pipeline.watch import Watch
from diffpipe.prompts import Prompt, Prompts
from diffpipe.sampling import Interrupted, Sampler

TASK = "preview steps"  # of the scheduler, which say more than prompts where one takes minutes


def open_prompts(config: Config, model: DiffusionModel, mesh: Mesh, sinks: Sinks, entries: Sequence[Prompt]) -> Prompts:
    """The prompts of previews, encoded first where the cache lacks them."""
    return prepare_prompts(
        config,
        model,
        entries,
        rank=mesh.rank,
        world=mesh.world,
        exchange=mesh.exchange,
        device=mesh.device,
        progress=sinks.progress,
    )


class Previews:
    """Samples all prompts: replicas take turns with them, and the rank that speaks for the run decodes what comes out.

    What cannot be made, for want of memory or of space on the disk, is left out with a warning. Random numbers are those of the
    prompts' seeds; training's are not touched.

    Args:
        watch: is told that ranks get on.
        halved: how often the sides of the VAE's tiles are halved from the start, so that it fits.
    """

    def __init__(
        self,
        config: PreviewConfig,
        model: DiffusionModel,
        pipeline: Pipeline,
        prompts: Prompts,
        sinks: Sinks,
        watch: Watch,
        halved: int = 0,
    ) -> None:
        self.config, self.model, self.mesh, self.prompts, self.sinks, self.watch = config, model, pipeline.mesh, prompts, sinks, watch
        self.sampler = Sampler(model, pipeline, watch.tick)
        self.halved, self.left_out = halved, 0

    def make(self, step: int, folder: Path, stop: Callable[[], bool] = lambda: False) -> list[DiffpipeError]:
        """Write a file for each prompt into ``folder``; all ranks call it.

        Args:
            stop: whether the run is to end, so that the rest is given up.

        Returns:
            Why prompts were left out, on the rank that speaks for the run; nothing on the others.
        """
        with torch.random.fork_rng([self.mesh.device] if self.mesh.device.type == "cuda" else []):
            found: dict[int, Tensor | DiffpipeError] = {}
            for share in self.mesh.exchange(self._sampled(stop)):
                found |= share
            if not self.mesh.reporter:
                return []
            with self.watch.patient():
                written, faults = self._shown(step, found, folder, stop)
        if written + len(faults) < len(self.prompts):
            self.sinks.note(f"previews of step {step} were given up, for the run is to end")
        for number, fault in sorted(faults.items()):
            self.left_out += 1
            self.sinks.warn(f"preview {number} of step {step} is left out ({self.left_out} so far): {fault}")
        if written:
            self.sinks.written("preview", folder)
        return [faults[number] for number in sorted(faults)]

    def _sampled(self, stop: Callable[[], bool]) -> dict[int, Tensor | DiffpipeError]:
        """Latents by the number of the prompt, or why there are none: of this replica's share, on its last stage."""
        mesh, count, steps = self.mesh, len(self.prompts), self.config.steps
        own = list(range(mesh.replica, count, mesh.replicas))
        # Ranks that gather weights together sample as often as each other; what one has too few of, it samples for nothing.
        spare = [0] if mesh.shards > 1 and len(own) < len(range(0, count, mesh.replicas)) else []
        made: dict[int, Tensor | DiffpipeError] = {}
        total = steps * len(own)

        def tell(done: int) -> None:
            if done < total:
                self.sinks.progress(Progress(TASK, done, total))

        for done, number in enumerate(own + spare):
            prompt = self.prompts[number]
            tell(steps * done)
            try:
                with explained(f"preview {number}, {prompt.bucket}, on stage {mesh.stage}", mesh.device, SMALLER_PREVIEWS):
                    latents = self.sampler.sample(
                        self.prompts.conditions(number), self.config, stop, lambda step, before=steps * done: tell(before + step)
                    )
            except Interrupted:
                break
            except ShortageError as fault:
                if mesh.shards > 1:  # the others wait for the weights that this rank was to gather with them
                    raise
                made[number] = copy(fault)  # without the frames of its traceback, which hold what lies on the device
            else:
                made |= {number: latents} if done < len(own) else {}
            _free(mesh.device)
        self.sinks.progress(Progress(TASK, total, total))
        return made if mesh.stage == mesh.stages - 1 else {}

    def _shown(
        self, step: int, found: Mapping[int, Tensor | DiffpipeError], folder: Path, stop: Callable[[], bool]
    ) -> tuple[int, dict[int, DiffpipeError]]:
        """Decode, write and tell of what was sampled; the VAE is in memory only meanwhile.

        Returns:
            How many files there are, and why others could not be.
        """
        count = 0
        faults: dict[int, DiffpipeError] = {}
        decoder: Encoders | None = None
        self.sinks.doing("decoding previews")
        for number, latents in sorted(found.items()):
            prompt = self.prompts[number]
            if stop():
                break
            try:
                if isinstance(latents, DiffpipeError):
                    raise latents
                decoder = decoder or self._decoder()
                torch.manual_seed(prompt.seed)  # some decoders add noise
                (pixels,) = self._decoded(latents, decoder, f"decoding preview {number}, {prompt.bucket}")
                written = write(pixels, self.model.geometry.fps, folder / f"{number:02d}")
            except DiffpipeError as fault:
                faults[number] = copy(fault)
                continue
            count += 1
            height, width = prompt.bucket.height, prompt.bucket.width
            self.sinks.preview(PreviewRecord(step, number, prompt.text, written.path, written.thumbnail, height, width))
        del decoder
        _free(self.mesh.device)
        return count, faults

    def _decoder(self) -> Encoders:
        with explained("loading the VAE for previews", self.mesh.device, SMALLER_PREVIEWS):
            decoder = self.model.load_decoder(self.mesh.device)
        for _ in range(self.halved):
            halve_tiles(decoder.vae)
        return decoder

    def _decoded(self, latents: Tensor, decoder: Encoders, doing: str) -> Tensor:
        """Pixels; in smaller tiles, from then on, where there is no memory for larger ones."""
        while True:
            try:
                with explained(doing, self.mesh.device, SMALLER_PREVIEWS), torch.inference_mode():
                    return self.model.decode_media(decoder, latents)
            except ShortageError:
                if not halve_tiles(decoder.vae):
                    raise
            _free(self.mesh.device)


def _free(device: torch.device) -> None:
    """Give back what training is to have."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
