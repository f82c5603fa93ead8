"""A budget is met at the least time: tighter ones are never faster nor larger, what is set stays, and numbers do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpipe.config.schema import MemoryConfig, PreviewConfig
from diffpipe.data.buckets import Bucket
from diffpipe.errors import ConfigError, DiffpipeError
from diffpipe.forecast import Comparison, Forecast
from diffpipe.models import make_model
from diffpipe.models.wan import Wan
from diffpipe.pipeline.memory.cards import CARDS, find_card
from diffpipe.pipeline.memory.estimate import Estimate
from diffpipe.pipeline.memory.planner import Choice, choose, least, lower
from diffpipe.pipeline.rehearsal import Rehearsal
from diffpipe.prompts import read_prompts
from diffpipe.train import train
from tests.families import CPU, frames_of
from tests.pipeline.test_memory import config_of, same, steps_of
from tests.runs_program import prepared
from tests.test_train import losses

Toys = Callable[[str], Path]
UNITS = 6  # of the tiny Wan


class Planning:
    """The tiny Wan at a bucket whose activations outweigh its weights, on a card slow to copy to."""

    def __init__(self, checkpoint: Path) -> None:
        self.config = config_of("wan", checkpoint, {"rank": 4}, {"offload_threshold": 0.001})
        model = make_model(self.config.model, self.config.objective)
        self.bucket = (frames_of(model), 8 * model.geometry.multiple, 8 * model.geometry.multiple)
        self.rehearsal = Rehearsal(self.config, model, 0, CARDS[-1])

    def judge(self, memory: MemoryConfig) -> Estimate:
        return self.rehearsal.estimate(self.bucket, memory)

    def choose(self, budget: int, **keys: Any) -> Choice | None:
        return choose(MemoryConfig(offload_threshold=0.001, **keys), UNITS, budget, self.judge)


@pytest.fixture(scope="module")
def planning(toys: Toys) -> Planning:
    return Planning(toys("wan"))


def test_a_tighter_budget_is_never_faster_and_never_holds_more(planning: Planning) -> None:
    free, _ = planning.choose(1 << 40), None
    assert free is not None and (free.memory.recompute, free.memory.swap, free.memory.offload) == ("none", 0, False)
    floor = least(planning.config.memory, UNITS, planning.judge).peak
    before, kinds = free, set()
    for budget in range(free.estimate.peak, floor - 1, (floor - free.estimate.peak) // 24):
        choice = planning.choose(budget)
        assert choice is not None and choice.estimate.peak <= budget
        assert choice.estimate.seconds >= before.estimate.seconds and choice.estimate.peak <= before.estimate.peak
        before = choice
        kinds.add((choice.memory.recompute, choice.memory.swap, choice.memory.offload))
    assert len(kinds) > 3
    assert planning.choose(floor - 1) is None


def test_a_step_that_does_not_fit_comes_down_to_the_least_there_is(planning: Planning) -> None:
    memory, peaks = MemoryConfig(offload_threshold=0.001), []
    while True:
        peaks.append(planning.judge(memory).peak)
        lowered = lower(memory, UNITS, planning.judge)
        if lowered is None:
            break
        memory = lowered
    assert peaks == sorted(set(peaks), reverse=True)
    assert peaks[-1] == least(planning.config.memory, UNITS, planning.judge).peak


def test_what_is_chosen_fits_into_host_memory_too(planning: Planning) -> None:
    tight, most = least(planning.config.memory, UNITS, planning.judge).peak, planning.judge(MemoryConfig(recompute="none")).peak
    memory, budget = MemoryConfig(offload_threshold=0.001), (2 * tight + most) // 3
    free = choose(memory, UNITS, budget, planning.judge)
    assert free is not None and free.estimate.host > 0
    less = choose(memory, UNITS, budget, planning.judge, host=free.estimate.host - 1)
    assert less is not None and less.estimate.host < free.estimate.host and less.estimate.seconds >= free.estimate.seconds
    model = make_model(planning.config.model, planning.config.objective)
    bucket = Bucket(*planning.bucket)
    for keys in ({"budget": tight}, {"swap": "all", "offload": True}):
        given = MemoryConfig(offload_threshold=0.001, host_budget=1000, **keys)  # pyright: ignore[reportArgumentType]
        forecast = Forecast(planning.config.model_copy(update={"memory": given}), model, 0, CARDS[-1], 1 << 40)
        with pytest.raises(DiffpipeError, match=r"memory.host_budget: .* needs .* of host memory"):
            forecast.settle([bucket])


def test_what_is_set_stays(planning: Planning) -> None:
    generous = 1 << 40
    for keys in ({"recompute": "block"}, {"recompute": "selective", "recompute_every": 2}, {"swap": 3}, {"offload": True}):
        choice = planning.choose(generous, **keys)
        assert choice is not None
        assert {key: getattr(choice.memory, key) for key in keys} == keys
        assert all(choice.reasons[key] == "set in the config" for key in keys)


def test_each_choice_has_its_reason(planning: Planning) -> None:
    free = planning.choose(1 << 40)
    assert free is not None
    tight = planning.choose(free.estimate.peak - 1)
    assert tight is not None
    assert tight.memory != free.memory
    assert any("too much" in reason for reason in tight.reasons.values())


@pytest.mark.parametrize("text", ["12GiB", "12 GiB", "12884901888", 12884901888, "12288MiB", "12.0GiB", "12G"])
def test_a_budget_is_read_as_people_write_it(text: Any) -> None:
    assert MemoryConfig(budget=text).budget == (12 * 10**9 if text == "12G" else 12 << 30)


@pytest.mark.parametrize("text", ["12 apples", "-3GiB", "0", "GiB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no amount of memory|greater than or equal to 1"):
        MemoryConfig(budget=text)  # pyright: ignore[reportArgumentType]


def test_a_budget_settles_what_build_is_given_and_changes_no_number(toys: Toys) -> None:
    plain = config_of("wan", toys("wan"), {"rank": 4}, {"recompute": "none"})
    model = make_model(plain.model, plain.objective)
    side = 4 * model.geometry.multiple
    bucket = Bucket(frames_of(model), side, side)
    most = Rehearsal(plain, model, 0, CARDS[0]).estimate((frames_of(model), side, side), plain.memory).peak
    asked = config_of("wan", toys("wan"), {"rank": 4}, {"budget": most - (200 << 10), "offload_threshold": 0.001, "swap": "auto"})
    forecast = Forecast(asked, model, 0, CARDS[0], None)
    forecast.settle([bucket])
    assert forecast.config.memory != asked.memory and isinstance(forecast.config.memory.swap, int)
    same(steps_of(forecast.config, rounds=2), steps_of(plain, rounds=2))


def test_a_budget_is_met_or_the_run_ends_before_anything_is_encoded_or_read(tmp_path: Path) -> None:
    config = prepared("wan", "lora", tmp_path, 1)
    with pytest.raises(DiffpipeError) as told:
        train(config.model_copy(update={"memory": MemoryConfig(budget="4MiB")}), resume=None, make_sinks=list)
    fault = told.value
    assert fault.where == "memory.budget"
    assert "bucket 9x64x64 on stage 0 needs" in fault.found and "workspace" in fault.found
    assert "more mesh.stages" in fault.fix
    assert not any(key in fault.fix for key in ("memory.swap", "memory.offload", "memory.recompute"))
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    run = train(config.model_copy(update={"memory": MemoryConfig(budget="4GiB", swap=0)}), resume=None, make_sinks=list)
    log = (run / "log.txt").read_text()
    assert "memory.recompute: none (fits, and is the fastest)" in log and "memory.swap: 0 (set in the config)" in log
    assert len(losses(log)) == 2


def test_the_comparison_is_told_once_a_bucket_after_its_first_steps(planning: Planning) -> None:
    model = make_model(planning.config.model, planning.config.objective)
    forecast = Forecast(planning.config, model, 0, CARDS[0], None)
    comparison, bucket = Comparison(forecast), Bucket(*planning.bucket)
    assert [comparison.due(bucket) for _ in range(5)] == [False, False, True, False, False]
    predicted = forecast.of(bucket).peak
    assert comparison.line(bucket, predicted * 2).endswith("(-50.0%)")


def test_previews_leave_what_is_chosen_and_decode_in_tiles_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = {"prompt": "x", "width": 192, "height": 192, "frames": 5}
    config = prepared("wan", "lora", tmp_path, 1)
    config = config.model_copy(update={"preview": PreviewConfig.model_validate({"prompts": [prompt], "steps": 1})})
    model, bucket = make_model(config.model, config.objective), Bucket(9, 64, 64)

    def foreseen(budget: int) -> Forecast:
        memory = MemoryConfig(budget=budget, swap=0)
        forecast = Forecast(config.model_copy(update={"memory": memory}), model, 0, find_card(None, CPU), None)
        forecast.settle([bucket])
        chosen = forecast.config.memory
        forecast.foresee(read_prompts(config, model), decodes=True)
        assert forecast.config.memory == chosen
        return forecast

    free = foreseen(1 << 40)
    assert free.halved == 0 and not list(free.warnings())
    assert free.previews is not None and free.previews.decoding is not None
    whole = free.previews.decoding.peak
    halved = foreseen(whole - 1)
    assert halved.halved == 1 and halved.previews is not None and halved.previews.decoding is not None
    assert halved.previews.decoding.peak < whole and "decoding in tiles of 128 pixels" in list(halved.lines())[-1]
    # Steps fit into less; then the run trains, tells of it before anything is encoded, and tries.
    budget = int(0.8 * halved.previews.decoding.peak)
    assert free.of(bucket).peak < budget
    decode, sides = Wan.decode_media, []

    def seen(own: Wan, decoder: Any, latents: Any) -> Any:
        sides.append(decoder.vae.tile_sample_min_height)
        return decode(own, decoder, latents)

    monkeypatch.setattr(Wan, "decode_media", seen)
    config = config.model_copy(update={"memory": MemoryConfig(budget=budget), "run": config.run.model_copy(update={"steps": 1})})
    run = train(config, resume=None, make_sinks=list)
    log = (run / "log.txt").read_text()
    told = "warning: a preview for which memory runs out is left out: preview.prompts.0: decoding 5x192x192 on stage 0 needs"
    assert log.index(told) < log.index("train: files")
    assert "memory.budget" in log and "previews of 5x192x192: sampling" in log
    assert sides[-1] == 128 and (run / "previews/step-00000001/00.mp4").exists()


def test_samples_stream_no_more_than_they_must(tmp_path: Path) -> None:
    config = prepared("flux", "lora", tmp_path, 1)
    prompt = {"prompt": "x", "width": 64, "height": 64}
    config = config.model_copy(update={"preview": PreviewConfig.model_validate({"prompts": [prompt], "steps": 1})})
    model = make_model(config.model, config.objective)

    def settled(memory: MemoryConfig, **mesh: int) -> tuple[Forecast, int]:
        changes = {"memory": memory, "mesh": config.mesh.model_copy(update=mesh)}
        forecast = Forecast(config.model_copy(update=changes), model, 0, find_card(None, CPU), None)
        forecast.settle_samples(read_prompts(config, model), decodes=False)
        assert forecast.previews is not None
        return forecast, forecast.previews.sampling.peak

    free, resident = settled(MemoryConfig(budget=1 << 40))
    assert free.config.memory.swap == 0 and not list(free.warnings())
    least, streamed = settled(MemoryConfig(budget=1))
    assert least.config.memory.swap == len(least.rehearsal.units) and streamed < resident
    assert any("sampling 1x64x64 on stage 0 needs" in warning for warning in least.warnings())
    budget = (streamed + resident) // 2
    fitting, held = settled(MemoryConfig(budget=budget))
    swap = fitting.config.memory.swap
    assert isinstance(swap, int) and swap > 0 and held <= budget
    assert next(fitting.lines()).startswith(f"memory.swap: {swap} (sampling 1x64x64 holds")
    assert settled(MemoryConfig(swap=swap - 1))[1] > budget
    assert settled(MemoryConfig(budget=budget), shard=2)[0].config.memory.swap == 0  # what is sharded does not stream
    with pytest.raises(DiffpipeError, match="bucket 1x64x64 on stage 0 needs"):  # a step of training would not fit
        fitting.settle([Bucket(1, 64, 64)])


def test_an_unknown_card_is_an_error_that_lists_the_known_ones() -> None:
    assert find_card("rtx 4090", CPU).name == "RTX 4090"
    with pytest.raises(ConfigError, match=r"no card 'Voodoo 2'[\s\S]*H100"):
        find_card("Voodoo 2", CPU)
