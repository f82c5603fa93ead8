"""Settles what a config leaves to be chosen, once the buckets that train are known: the mesh first, then what each stage keeps."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from diffpipe.config.schema import Config
from diffpipe.data.buckets import Bucket
from diffpipe.data.cache import writing_to
from diffpipe.durable import write_durably
from diffpipe.encoder import cache_folder
from diffpipe.forecast import Forecast, dims, open_forecast
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.calibrate import Seconds, keys, measure, sizes
from diffpipe.pipeline.memory.cards import Card, find_card
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.placement import Placement, Placer, whole
from diffpipe.pipeline.rehearsal import Dims
from diffpipe.prompts import Prompt


class Outlook:
    """What a run will be like.

    Attributes:
        config: the run's, with mesh and memory sections settled by ``settle``.
        forecast: of this rank's stage, None where nothing limits it.
        lines: what was chosen, why, and what is foreseen, for a person.
        warnings: of all ranks.

    Args:
        prompts: of the previews, or of samples.
    """

    def __init__(self, config: Config, model: DiffusionModel, mesh: Mesh, prompts: Sequence[Prompt] = ()) -> None:
        self.config, self.model, self.mesh, self.prompts = config, model, mesh, prompts
        self.forecast: Forecast | None = None
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def settle(self, buckets: Collection[Bucket]) -> None:
        """Choose for these buckets; every rank calls this.

        Raises:
            DiffpipeError: when the model cannot be cut so, or a bucket cannot fit, or a preview that would end the run.
        """
        if self.mesh.stages > 1:
            placement = self._placed([dims(b) for b in buckets])
            self.config = self.config.model_copy(update={"mesh": placement.mesh})
            self.lines += placement.lines()
        with self._forecast() as forecast:
            if forecast is not None:
                forecast.settle(buckets)
                if self.prompts:
                    forecast.foresee(self.prompts, decodes=self.mesh.reporter)

    def settle_samples(self) -> None:
        """Choose for samples alone, when nothing trains; every rank calls this.

        Raises:
            DiffpipeError: when a sample cannot fit and would end the others too.
        """
        with self._forecast() as forecast:
            if forecast is not None:
                forecast.settle_samples(self.prompts, decodes=self.mesh.reporter)

    @contextmanager
    def _forecast(self) -> Iterator[Forecast | None]:
        try:
            self.forecast = forecast = open_forecast(self.config, self.model, self.mesh)
            yield forecast
            if forecast is not None:
                self.config = forecast.config
                self.lines += forecast.lines()
        finally:  # on every rank, also where others go on
            told = self.mesh.exchange(list(self.forecast.warnings()) if self.forecast is not None else [])
            self.warnings = list(dict.fromkeys(warning for each in told for warning in each))

    def _placed(self, buckets: Sequence[Dims]) -> Placement:
        config, mesh, card = self.config, self.mesh, find_card(None, self.mesh.device)
        limits = self._limits()
        measured = self._measured(sizes(buckets), card) if config.mesh.split == "time" else None
        return mesh.decide(lambda: Placer(config, self.model, card, buckets, limits, measured).place())

    def _limits(self) -> list[int] | None:
        """By stage, what it may hold: the least of its ranks."""
        config, mesh = self.config, self.mesh
        free = torch.cuda.mem_get_info(mesh.device)[0] if mesh.device.type == "cuda" else None
        own = config.mesh.memory[mesh.stage] if config.mesh.memory is not None else config.memory.budget or free
        told = mesh.exchange(own)
        if None in told:
            return None
        return [min(told[stage * mesh.replicas : (stage + 1) * mesh.replicas]) for stage in range(mesh.stages)]

    def _measured(self, buckets: Sequence[Dims], card: Card) -> list[Mapping[Dims, Sequence[Seconds]]]:
        """By stage and bucket how long its device takes for each unit; what was measured before is not again."""
        file = Path(cache_folder(self.config)) / "times.json"
        known = self.mesh.decide(lambda: read_times(file))
        device, all_units = self.mesh.device, whole(self.config, self.model, card)
        fresh = measure(all_units, buckets, device, known)
        together = {key: t for each in self.mesh.exchange(fresh) for key, t in each.items()}
        if together:
            self.mesh.decide(lambda: write_times(file, {**known, **together}))
        self.lines.append(f"mesh.split: measured {len(together)} kinds of units, {len(known)} were known ({file})")
        known = {**known, **together}
        own = {bucket: [known[key] for key in keys(all_units, bucket, device)] for bucket in buckets}
        return self.mesh.exchange(own)[:: self.mesh.replicas]


def read_times(file: Path) -> dict[str, Seconds]:
    """Seconds of units' passes by what decides them; a missing or damaged file costs time only."""
    try:
        return {key: (float(ahead), float(back)) for key, (ahead, back) in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_times(file: Path, times: Mapping[str, Seconds]) -> None:
    """Keep what was measured.

    Raises:
        DiffpipeError: when the file cannot be written.
    """
    with writing_to(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, json.dumps(times).encode())
