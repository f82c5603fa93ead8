"""The picture of a run fits the terminal it is drawn on, and says what matters most."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from diffpipe.cli.chart import Series, chart
from diffpipe.cli.dashboard import Dashboard
from diffpipe.cli.picture import ABOVE, Painter, picture
from diffpipe.metrics import GIB, EvalRecord, Place, RankRecord, RunRecord, Split, StepRecord

SPLIT = Split(data=0.1, compute=1.4, stall=0.2, bubble=0.2, communication=0.1)


def shown(width: int, height: int, stages: int = 2, replicas: int = 1, encoding: str = "utf-8") -> tuple[Dashboard, list[str]]:
    """A dashboard after 40 steps, and what it draws."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=True, width=width, height=height, legacy_windows=False, color_system=None)
    board = Dashboard(console)
    places = tuple(Place(s, r, "a card", 12 * GIB, 64 * GIB) for s in range(stages) for r in range(replicas))
    config = {"preview": {"prompts": ["a cat"]}}
    board.begin(RunRecord("20260101-120000", "Wan2.1, LoRA of rank 16", places, config), lambda wish: None)
    ranks = tuple(RankRecord(p.stage, p.replica, SPLIT, (10 + p.stage) * GIB, 3 * GIB) for p in places)
    for n in range(40):
        pairs = tuple((i / 10 + 0.05, 1.0 + i) for i in range(10))
        board.step(StepRecord(n + 1, 400, 0, False, 2.0 - n / 40, 2.1, "81x480x832", 1e-4, 0.5, 8, 2.0, 720.0, pairs, ranks))
    board.evaluation(EvalRecord(0, "held-out", 2.5))
    board.evaluation(EvalRecord(40, "held-out", 1.5))
    board.best(40, 1.5)
    board.written("checkpoint", Path("checkpoints/step-00000040"))
    board.written("preview", Path("previews/step-00000038"))
    board.warn("the data's order starts anew")
    assert board.view is not None
    board.close()
    board.doing("step 41, bucket 81x480x832")
    with console.capture() as captured:
        console.print(picture(board.view, console, console.options))
    return board, captured.get().splitlines()


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (60, 16), (200, 60)])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (4, 2), (8, 4), (64, 2)])
def test_no_line_is_longer_than_the_terminal_and_notes_keep_their_place(size: tuple[int, int], mesh: tuple[int, int]) -> None:
    _, lines = shown(*size, *mesh)
    assert {len(line) for line in lines} == {size[0]}
    assert len(lines) <= size[1] - ABOVE


def test_80_columns_hold_all_that_is_asked_of_a_dashboard() -> None:
    _, lines = shown(80, 24)
    text = "\n".join(lines)
    for wanted in (
        "20260101-120000",
        "Wan2.1, LoRA of rank 16",
        "step 40 of 400   epoch 1   left 0:12:00",
        "loss 1.0250   smoothed 2.1000   █",
        "lr 0.0001   grad norm 0.5   s/step 2.000   samples/s 4",
        "now step 41, bucket 81x480x832",
        "5%       70%     10%      10%     5%   10.00 of 12.0   3.00 of 64",
        "11.00 of 12.0",
        "checkpoint step-00000040",
        "export none yet",
        "preview step-00000038",
        "eval held-out 1.5000",
        "best checkpoint 1.5000   at step 40",
        "warning: the data's order starts anew",
    ):
        assert wanted in text


def test_a_warning_is_read_whole_and_lines_break_between_words() -> None:
    board, _ = shown(80, 24)
    assert board.view is not None
    console, path = board.live.console, "/" + 90 * "p"
    told = "preview 1 of step 30 is left out (4 so far): memory: the memory of cuda:0 ran out in decoding preview 1, 1x1024x1024"
    with console.capture() as captured:
        board.warn(f"{told}\n  fix: smaller preview.width")
        board.note(f"preview {path}")
        console.print(picture(board.view, console, console.options))
    first, second, fix, note, folded, *drawn = (line.strip(" │") for line in captured.get().splitlines())
    assert (f"{first} {second}", fix) == (f"warning: {told}", "fix: smaller preview.width")
    assert (note, folded) == ("preview", path), "a path is left to the terminal to break"
    assert drawn[-4] == "1 earlier warning in log.txt" and f"{drawn[-3]} {drawn[-2]}" == f"warning: {told}"


def test_a_tall_terminal_shows_the_curve_and_the_losses_by_t_and_bucket_too() -> None:
    tall, small = ("\n".join(shown(120, height)[1]) for height in (40, 24))
    for more in ("0.0-0.1", "10.0000", "bucket 81x480x832 1", "1.0250 "):
        assert more in tall
    assert "0.0-0.1" not in small


def test_more_ranks_than_lines_are_shown_by_stage_with_the_largest_memory() -> None:
    _, lines = shown(80, 24, 4, 8)
    rows = [line.split() for line in lines if "of 12.0" in line]
    assert [row[1:3] for row in rows] == [[str(n), "x8"] for n in range(4)]
    _, lines = shown(80, 24, 64, 2)
    rows = [line for line in lines if "of 12.0" in line]
    assert any(f"and {64 - len(rows)} more" in line for line in lines), "and by stage, those that fit, where stages are too many too"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_skipped_step_is_in_no_curve_and_no_mean(loss: float) -> None:
    board, _ = shown(120, 40)
    assert board.view is not None
    before = dict(board.view.buckets)
    board.step(replace(board.view.recent[-1], loss=loss))
    board.evaluation(EvalRecord(41, "held-out", loss))
    assert all(map(math.isfinite, [*board.view.losses.values, *board.view.last_losses])) and board.view.buckets == before
    drawn = "\n".join(line.plain for line in Painter(board.view, 116, 35, False).lines())
    assert f"loss {loss:.4f}" in drawn and "1.0250 " in drawn


def test_a_console_without_utf_8_is_drawn_on_in_ascii() -> None:
    _, lines = shown(80, 24, encoding="cp437")
    assert lines and "".join(lines).isascii()


def test_memory_beyond_its_limit_is_red() -> None:
    board, _ = shown(80, 24, 4)
    assert board.view is not None
    rows = Painter(board.view, 76, 20, False).ranks(10)[1:]
    styles = [str(row.spans[0].style) if row.spans else str(row.style) for row in rows]
    assert ["red" in style for style in styles] == [False, False, False, True]


def test_a_chart_has_its_largest_value_full_and_its_smallest_a_sliver() -> None:
    assert chart([0.0, 1.0, 2.0], 3) == ["▁▅█"]
    assert chart([0.0, 1.0, 2.0], 3, 2) == [" ▁█", "▁██"]
    assert chart([1.0, 3.0], 1) == ["▁"], "columns are means where values are more"
    assert chart([], 5, 2) == ["", ""]
    assert chart([0.0, math.nan, 1.0, math.inf, 2.0], 3) == ["▁▅█"], "what is not finite is left out"


def test_a_series_keeps_its_shape_in_bounded_memory() -> None:
    series = Series(most=8)
    for n in range(1000):
        series.add(float(n))
    assert len(series.values) < 8
    assert series.values == sorted(series.values) and series.values[0] < 200 < 800 < series.values[-1]
