"""Sinks that keep a run's numbers for programs that draw them."""

from __future__ import annotations

from pathlib import Path

from diffpipe.metrics import GIB, EvalRecord, Sink, Split, StepRecord


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a step by tag, memory in GiB; per stage and rank where there are several."""
    values = {
        "train/loss": record.loss,
        "train/loss_smoothed": record.smoothed,
        f"train/loss/{record.bucket}": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "train/samples_per_second": record.samples_per_second,
        "time/step": record.step_time,
        "time/left": record.left,
        "memory/device": record.device_peak / GIB,
        "memory/host": record.host / GIB,
        "compile/graphs": record.graphs,
    }
    values |= {f"time/{name}": part for name, part in record.split.parts().items()}
    stages = record.stages if len(record.stages) > 1 else {}
    for stage, ranks in stages.items():
        values |= {f"time/{name}/stage{stage}": part for name, part in Split.mean([r.split for r in ranks]).parts().items()}
    for number, rank in enumerate(record.ranks if len(record.ranks) > 1 else ()):
        values |= {f"memory/device/rank{number}": rank.device_peak / GIB, f"memory/host/rank{number}": rank.host / GIB}
    return values


class TensorBoardSink(Sink):
    """Scalars for TensorBoard.

    Args:
        folder: where its event files go.
        resumed_at: the step a resumed run goes on from; what was written after it is hidden.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)

    def step(self, record: StepRecord) -> None:
        for tag, value in scalars(record).items():
            self.writer.add_scalar(tag, value, record.step)

    def evaluation(self, record: EvalRecord) -> None:
        self.writer.add_scalar(f"eval/{record.name}/loss", record.loss, record.step)
        for quantile, loss in record.by_quantile.items():
            self.writer.add_scalar(f"eval/{record.name}/loss_q{quantile:g}", loss, record.step)

    def close(self) -> None:
        self.writer.close()
