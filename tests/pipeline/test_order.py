"""The passes that are planned are those that torch's schedules run, and take as long as their formulas say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffpipe.pipeline.order import Pass, in_flight, passes_of
from diffpipe.pipeline.schedule import OF_SPANS
from diffpipe.pipeline.simulate import simulate

TORCHS: dict[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, **OF_SPANS}


class Recorded(PipelineStage):
    """Writes down its passes as a schedule runs them."""

    def __init__(self, seen: list[Pass], number: int, spans: int) -> None:
        flat = torch.empty(1, 2, device="meta", requires_grad=True)
        given = () if number == 0 else (flat,)
        module = First() if number == 0 else nn.Linear(2, 2)
        super().__init__(module, number, spans, torch.device("cpu"), input_args=given, output_args=flat)
        self.seen = seen

    def forward_one_chunk(self, number: int, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(Pass("ahead", self.stage_index, number))
        return super().forward_one_chunk(number, *args, **kwargs)

    def backward_one_chunk(self, number: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> Any:
        self.seen.append(Pass("back" if full_backward else "inputs", self.stage_index, number))
        return super().backward_one_chunk(number, *args, full_backward=full_backward, **kwargs)

    def backward_weight_one_chunk(self, number: int, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(Pass("weights", self.stage_index, number))
        return super().backward_weight_one_chunk(number, *args, **kwargs)


class First(nn.Module):
    """Takes nothing from any stage before it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2))

    def forward(self) -> torch.Tensor:
        return self.weight * 2


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets this process be any rank of a world that is not there."""
    # torch's stages ask their neighbours whether all know their shapes: a fake world says neither yes nor no.
    monkeypatch.setattr(dist, "recv", lambda tensor, *args, **kwargs: tensor.fill_(1))

    def be(rank: int, world: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield be
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("schedule", "stages", "spans", "microbatches"),
    [
        ("gpipe", 3, 1, 2),
        ("1f1b", 2, 1, 2),
        ("1f1b", 4, 1, 7),
        ("eager-1f1b", 2, 1, 4),
        ("eager-1f1b", 4, 1, 8),
        ("eager-1f1b", 4, 1, 3),
        ("interleaved", 2, 2, 3),
        ("interleaved", 4, 3, 8),
        ("interleaved", 3, 2, 2),
        ("interleaved", 4, 2, 10),
        ("zero-bubble", 2, 2, 4),
        ("zero-bubble", 4, 1, 8),
        ("zero-bubble", 3, 2, 2),
    ],
)
def test_passes_are_in_the_order_in_which_torch_runs_them(ranks: Any, schedule: str, stages: int, spans: int, microbatches: int) -> None:
    for rank, planned in enumerate(passes_of(schedule, stages, spans, microbatches)):
        ranks(rank, stages)
        seen: list[Pass] = []
        held = [Recorded(seen, number, stages * spans) for number in range(rank, stages * spans, stages)]
        single = schedule in ("gpipe", "1f1b")
        given = held[0] if single else held
        made = TORCHS[schedule](given, microbatches, loss_fn=lambda out, target: out.sum(), scale_grads=False)
        made.step(target=torch.arange(microbatches) if rank == stages - 1 else None, losses=[] if rank == stages - 1 else None)
        assert seen == planned, (rank, seen, planned)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (4, 8), (8, 32), (512, 1024)])
def test_one_forward_one_backward_idles_as_its_formula_says(stages: int, microbatches: int) -> None:
    course = simulate(passes_of("1f1b", stages, 1, microbatches), [1.0] * stages, [2.0] * stages)
    assert course.seconds == pytest.approx(3.0 * (microbatches + stages - 1))
    assert course.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert course.balance == 1


@pytest.mark.parametrize(("stages", "spans", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 16), (64, 2, 128)])
def test_interleaving_divides_what_idles_by_the_spans(stages: int, spans: int, microbatches: int) -> None:
    parts = stages * spans
    course = simulate(passes_of("interleaved", stages, spans, microbatches), [1 / spans] * parts, [2 / spans] * parts)
    assert course.seconds == pytest.approx(3.0 * (microbatches + (stages - 1) / spans))


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (8, 32)])
def test_zero_bubble_idles_while_weights_have_none_of_their_gradients(stages: int, microbatches: int) -> None:
    # ZB-H1: (p - 1) of what forward and both halves take, less twice the half that can wait.
    course = simulate(passes_of("zero-bubble", stages, 1, microbatches), [1.0] * stages, [2.0] * stages)
    assert course.seconds == pytest.approx(3.0 * microbatches + (stages - 1) * 1.0)


def test_all_microbatches_go_ahead_before_any_comes_back_in_gpipe() -> None:
    course = simulate(passes_of("gpipe", 4, 1, 8), [1.0] * 4, [2.0] * 4)
    assert course.seconds == pytest.approx(3.0 * 11)
    assert [in_flight(passes) for passes in passes_of("gpipe", 4, 1, 8)] == [8] * 4


def test_a_stage_holds_fewer_microbatches_the_later_it_is() -> None:
    assert [in_flight(passes) for passes in passes_of("1f1b", 4, 1, 8)] == [4, 3, 2, 1]
    assert [in_flight(passes) for passes in passes_of("eager-1f1b", 4, 1, 8)] == [7, 5, 3, 1]
    assert [in_flight(passes) for passes in passes_of("interleaved", 4, 2, 8)] == [11, 9, 7, 5]


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 8), (4, 8), (8, 64)])
def test_eager_1f1b_waits_for_links_at_its_ends_alone(stages: int, microbatches: int) -> None:
    def late(schedule: str) -> float:
        passes = passes_of(schedule, stages, 1, microbatches)
        return simulate(passes, [1.0] * stages, [2.0] * stages, [0.1] * (stages - 1)).seconds - 3.0 * (microbatches + stages - 1)

    assert late("eager-1f1b") == pytest.approx(0.2 * (stages - 1))  # the first microbatch's way ahead, and the last one's way back
    assert late("1f1b") > 2 * late("eager-1f1b")


def test_a_slow_stage_makes_the_others_wait() -> None:
    course = simulate(passes_of("1f1b", 2, 1, 8), [1.0, 3.0], [2.0, 6.0])
    assert course.busy == (24.0, 72.0)
    assert course.seconds == pytest.approx(72 + 1 + 2)
    assert course.balance == pytest.approx(48 / 72)


def test_what_crosses_takes_its_time_where_nothing_hides_it() -> None:
    course = simulate(passes_of("1f1b", 2, 1, 2), [1.0, 1.0], [1.0, 1.0], [0.5])
    assert course.seconds == pytest.approx(simulate(passes_of("1f1b", 2, 1, 2), [1.0, 1.0], [1.0, 1.0]).seconds + 2 * 0.5)
