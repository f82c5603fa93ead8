"""Sinks that keep a run's numbers and previews for programs that draw them: TensorBoard, and Weights & Biases where it is asked for."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from diffpipe.config.schema import WandbConfig
from diffpipe.errors import ConfigError, DiffpipeError
from diffpipe.metrics import GIB, EvalRecord, PreviewRecord, RunRecord, Sink, Split, StartRecord, StepRecord, Wish, by_tenth

# Sections of the config that decide what is trained, or how fast.
HYPERPARAMETERS = ("run", "mesh", "batch", "model", "objective", "adapter", "optimizer", "schedule", "data", "memory")
BEST = "eval/best_loss"
BALANCE = "time/balance"
UNITS = {"time": "seconds", "startup": "seconds", "memory": "GiB"}  # by the group of a tag; all in it but the balance
TITLE = 100  # letters of a prompt that head its picture
HISTOGRAM_EVERY = 25  # records
HISTOGRAM_OVER = 2000  # samples
TENTHS = {n: f"{n / 10:.1f}-{(n + 1) / 10:.1f}" for n in range(10)}


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a step by tag, memory in GiB; per stage and rank where there are several."""
    values = {
        "train/loss": record.loss,
        "train/loss_smoothed": record.smoothed,
        f"train/loss/{record.bucket}": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch + 1,
        "train/samples_per_second": record.samples_per_second,
        "time/step": record.step_time,
        "time/left": record.left,
        "memory/host": record.host / GIB,
        "train/skipped": record.skipped,
    }
    values |= {"memory/device": record.device_peak / GIB} if record.device_peak else {}
    values |= {"compile/graphs": record.graphs} if record.graphs else {}
    values |= {f"time/{name}": part for name, part in record.split.parts().items()}
    values |= {f"loss_by_t/{TENTHS[n]}": sum(losses) / len(losses) for n, losses in by_tenth(record.by_time).items()}
    stages = record.stages if len(record.stages) > 1 else {}
    values |= {BALANCE: record.balance} if stages else {}
    for stage, ranks in stages.items():
        values |= {f"time/{name}/stage{stage}": part for name, part in Split.mean([r.split for r in ranks]).parts().items()}
    for number, rank in enumerate(record.ranks if len(record.ranks) > 1 else ()):
        values[f"memory/host/rank{number}"] = rank.host / GIB
        values |= {f"memory/device/rank{number}": rank.device_peak / GIB} if rank.device_peak else {}
    return values


def start_scalars(record: StartRecord) -> dict[str, float]:
    """The same of what came before the first step was over."""
    return {f"startup/{name.replace(' ', '_')}": seconds for name, seconds in record.phases.items()}


def eval_scalars(record: EvalRecord) -> dict[str, float]:
    """The same of an evaluation."""
    by_quantile = {f"eval/{record.name}/loss_q{quantile:g}": loss for quantile, loss in record.by_quantile.items()}
    return {f"eval/{record.name}/loss": record.loss, **by_quantile}


def settings(config: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Every key of a config with its value, as JSON where that is a list or nothing."""
    for name, value in config.items():
        path = f"{key}.{name}" if key else name
        if isinstance(value, Mapping) and value:
            yield from settings(value, path)
        else:
            yield path, value if isinstance(value, bool | int | float | str) else json.dumps(value)


class TensorBoardSink(Sink):
    """Scalars, the loss by t as a histogram, previews, and the config as hyperparameters, for TensorBoard.

    Args:
        folder: where its event files go.
        resumed_at: the step a resumed run goes on from; what was written after it is hidden.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
        self.begun = resumed_at or 0
        self.by_time: deque[tuple[float, float]] = deque(maxlen=HISTOGRAM_OVER)
        self.records = self.last = 0

    def begin(self, run: RunRecord, ask: Callable[[Wish], None]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # In words: TensorBoard shows true as 1.0000.
        config = {key: json.dumps(value) if isinstance(value, bool) else value for key, value in settings(run.config)}
        given = {key: value for key, value in config.items() if key.partition(".")[0] in HYPERPARAMETERS}
        sets = [s["name"] for s in run.config["eval"]["sets"]]
        assert self.writer.file_writer is not None
        # SummaryWriter.add_hparams would make a run of its own beside this one.
        for summary in hparams(given, dict.fromkeys(["train/loss_smoothed", *(f"eval/{n}/loss" for n in sets)], 0.0)):
            self.writer.file_writer.add_summary(summary)
        self.writer.add_text("run", f"{run.name}: {run.trains}", self.begun)
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), self.begun)

    def started(self, record: StartRecord) -> None:
        self._scalars(start_scalars(record), self.begun)

    def step(self, record: StepRecord) -> None:
        self._scalars(scalars(record), record.step)
        self.by_time.extend(record.by_time)
        self.records, self.last = self.records + 1, record.step
        if self.records % HISTOGRAM_EVERY == 0:
            self._histogram()

    def evaluation(self, record: EvalRecord) -> None:
        self._scalars(eval_scalars(record), record.step)

    def best(self, step: int, loss: float) -> None:
        self._scalars({BEST: loss}, step)

    def preview(self, record: PreviewRecord) -> None:
        from tensorboard.compat.proto import summary_pb2

        proto: Any = summary_pb2
        # What SummaryWriter.add_image makes of pixels; it takes no moving pictures.
        image = proto.Summary.Image(height=record.height, width=record.width, colorspace=3, encoded_image_string=record.thumbnail)
        about = proto.SummaryMetadata(
            display_name=shorten(record.prompt, TITLE, placeholder=" ..."),
            summary_description=record.prompt,
            plugin_data=proto.SummaryMetadata.PluginData(plugin_name="images"),
            data_class=proto.DATA_CLASS_BLOB_SEQUENCE,
        )
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(
            proto.Summary(value=[proto.Summary.Value(tag=f"preview/{record.number}", image=image, metadata=about)]), record.step
        )

    def close(self) -> None:
        if self.records % HISTOGRAM_EVERY:
            self._histogram()
        self.writer.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag, headed by their unit too; SummaryWriter.add_scalar takes no heading."""
        from tensorboard.compat.proto import summary_pb2

        proto: Any = summary_pb2
        made, plugin = proto.Summary(), proto.SummaryMetadata.PluginData(plugin_name="scalars")
        for tag, value in values.items():
            unit = UNITS.get(tag.partition("/")[0]) if tag != BALANCE else None
            # Without the class TensorBoard's data server, which it has from its package, leaves the heading out.
            about = proto.SummaryMetadata(
                display_name=f"{tag}, {unit}" if unit else "", plugin_data=plugin, data_class=proto.DATA_CLASS_SCALAR
            )
            made.value.append(proto.Summary.Value(tag=tag, simple_value=value, metadata=about))
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(made, step)

    def _histogram(self) -> None:
        """The mean loss by tenth of t, of the last samples: what stands for a count is a loss."""
        tenths = by_tenth(self.by_time)
        means = [sum(losses) / len(losses) if (losses := tenths.get(n)) else 0.0 for n in range(10)]
        centres = [(n + 0.5) / 10 for n in range(10)]
        self.writer.add_histogram_raw(
            "train/loss_by_t",
            min=0.0,
            max=1.0,
            num=sum(means),
            sum=sum(m * c for m, c in zip(means, centres, strict=True)),
            sum_squares=sum(m * c * c for m, c in zip(means, centres, strict=True)),
            bucket_limits=[(n + 1) / 10 for n in range(10)],
            bucket_counts=means,
            global_step=self.last,
        )


def check_wandb(config: WandbConfig | None) -> None:
    """Whether Weights & Biases can be written to at all.

    Raises:
        ConfigError: when its package or the key is missing.
    """
    if config is None:
        return
    if find_spec("wandb") is None:
        raise ConfigError(
            "the package wandb is not installed", where="metrics.wandb", fix="pip install 'diffpipe[wandb]', or remove the section"
        )
    if os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            "the environment variable WANDB_API_KEY is not set",
            where="metrics.wandb",
            expected="your key in WANDB_API_KEY, and nowhere else",
            fix="export it on the machine of the last stage, or WANDB_MODE=offline to keep the record in the run folder",
        )


class WandbSink(Sink):
    """The same for Weights & Biases; its own files go into the run folder.

    Raises:
        DiffpipeError: when the run cannot be opened there.
    """

    def __init__(self, config: WandbConfig, folder: Path) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or folder.name,
                id=folder.name,
                resume="allow",
                dir=folder,
                # It would otherwise wrap the terminal's output, and send the code of the working folder.
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, save_code=False),
            )
        except wandb.Error as fault:
            raise DiffpipeError(
                f"Weights & Biases cannot be reached: {fault}", where="metrics.wandb", fix="WANDB_MODE=offline, or remove the section"
            ) from fault
        # A resumed run goes back to its checkpoint's step, behind which W&B takes no step of its own count.
        self.run.define_metric("*", step_metric="step")

    def begin(self, run: RunRecord, ask: Callable[[Wish], None]) -> None:
        self.run.config.update(dict(settings(run.config)), allow_val_change=True)
        self.run.notes = run.trains

    def started(self, record: StartRecord) -> None:
        self.run.summary.update(start_scalars(record))

    def step(self, record: StepRecord) -> None:
        self.run.log({"step": record.step, **scalars(record)})

    def evaluation(self, record: EvalRecord) -> None:
        self.run.log({"step": record.step, **eval_scalars(record)})

    def best(self, step: int, loss: float) -> None:
        self.run.log({"step": step, BEST: loss})

    def preview(self, record: PreviewRecord) -> None:
        import wandb

        path = str(record.path)
        shown = wandb.Image(path, caption=record.prompt) if record.path.suffix == ".png" else wandb.Video(path, caption=record.prompt)
        self.run.log({"step": record.step, f"preview/{record.number}": shown})

    def close(self) -> None:
        self.run.finish()
