"""Recompute, offload, streaming and compile change memory and time, never numbers; planned streams bring what is needed in time."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from diffpipe.config.schema import Config, MemoryConfig
from diffpipe.errors import ConfigError, ShortageError
from diffpipe.models import MODELS, make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.build import build
from diffpipe.pipeline.memory.arena import ROUNDS, START, Load, Place, Share, Use, make_plan, room_to_settle, smallest_room, steady_plans
from diffpipe.pipeline.memory.compiling import graphs
from diffpipe.pipeline.memory.shortage import explained
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.schedule import Microbatches, Pipeline
from tests.families import drawn, frames_of, microbatch

Toys = Callable[[str], Path]
POLICIES: dict[str, dict[str, Any]] = {
    "block": {"recompute": "block"},
    "every-second": {"recompute": "block", "recompute_every": 2},
    "selective": {"recompute": "selective"},
    "offload": {"recompute": "block", "offload": True, "offload_threshold": 0.001},
    "offload-all": {"recompute": "none", "offload": True, "offload_threshold": 0.001},
    "swap-all": {"recompute": "block", "swap": "all"},
    "swap-all-kept": {"recompute": "none", "swap": "all"},
    "swap-2": {"recompute": "block", "swap": 2},
    "layer-order": {"recompute": "block", "order": "layer"},
    "everything": {"recompute": "selective", "swap": "all", "offload": True, "offload_threshold": 0.001},
}


def config_of(family: str, checkpoint: Path, adapter: dict[str, Any] | None, memory: dict[str, Any], **more: Any) -> Config:
    raw = {
        "run": {"steps": 1},
        "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
        "adapter": adapter,
        "data": {"folders": [{"path": "unused"}]},
        "memory": memory,
        **more,
    }
    return Config.model_validate(raw)


Step = tuple[float, dict[str, Tensor], float]


def built(config: Config, model: DiffusionModel, mesh: Mesh) -> Pipeline:
    """A pipeline whose adapters do something."""
    pipeline = build(config, model, mesh)
    with torch.no_grad():
        for name, p in pipeline.module.named_parameters():
            if p.requires_grad and config.adapter is not None:
                p.copy_(drawn(name, p.shape))
    return pipeline


def batch_of(model: DiffusionModel, number: int, count: int = 2) -> Microbatches:
    return [microbatch(model, seed=10 * number + j, count=1, frames=frames_of(model)) for j in range(count)]


def step_of(pipeline: Pipeline, batch: Microbatches) -> Step:
    """Loss, gradients and evaluation loss of a step."""
    loss = pipeline.train(batch).item()
    gradients = {n: p.grad.clone() for n, p in pipeline.module.named_parameters() if p.grad is not None}
    pipeline.module.zero_grad()
    return loss, gradients, pipeline.evaluate(batch[:1]).item()


def steps_of(config: Config, count: int = 2, rounds: int = 3) -> list[Step]:
    """Some steps: the second and third go by what the first did."""
    model = make_model(config.model, config.objective)
    with open_mesh(config.mesh) as mesh:
        pipeline = built(config, model, mesh)
        return [step_of(pipeline, batch_of(model, i, count)) for i in range(rounds)]


def same(got: list, expected: list) -> None:
    for (loss, gradients, evaluated), (want, wanted, held) in zip(got, expected, strict=True):
        assert loss == want and evaluated == held
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, wanted[name]), name


@pytest.fixture(scope="module")
def plain(toys: Toys) -> Callable[[str], list]:
    """What a family's steps give when everything is kept."""
    done: dict[str, list] = {}

    def get(family: str) -> list:
        if family not in done:
            done[family] = steps_of(config_of(family, toys(family), {"rank": 4}, {"recompute": "none"}))
        return done[family]

    return get


# The others are parts of these, and enough where families differ in kind.
EVERYWHERE = ("every-second", "everything", "layer-order", "offload-all", "swap-2", "swap-all-kept")


@pytest.mark.parametrize(
    ("family", "policy"), [(f, p) for f in sorted(MODELS) for p in sorted(POLICIES) if p in EVERYWHERE or f in ("flux", "sdxl", "wan")]
)
def test_no_policy_changes_a_number(toys: Toys, plain: Callable[[str], list], family: str, policy: str) -> None:
    same(steps_of(config_of(family, toys(family), {"rank": 4}, POLICIES[policy])), plain(family))


def test_each_kind_of_block_may_keep_what_is_best_for_it(toys: Toys) -> None:
    memory = {"offload": True, "offload_threshold": 0.001, "swap": "all"}
    singles = {"recompute_kinds": {"FluxSingleTransformerBlock": "none"}}
    moved, steps = [], []
    for more in ({}, singles, {"recompute": "none"}):
        config = config_of("flux", toys("flux"), {"rank": 4}, {**memory, **more})
        model = make_model(config.model, config.objective)
        with open_mesh(config.mesh) as mesh:
            pipeline = built(config, model, mesh)
            steps.append([step_of(pipeline, batch_of(model, i)) for i in range(2)])
            assert pipeline.memory.offload is not None
            moved.append(pipeline.memory.offload.moved)
        same(steps[-1], steps[0])
    assert moved[0] < moved[1] < moved[2]


def test_a_kind_of_block_that_a_model_has_not_is_named_with_those_it_has(toys: Toys) -> None:
    config = config_of("flux", toys("flux"), {"rank": 4}, {"recompute_kinds": {"FluxDoubleBlock": "none"}})
    model = make_model(config.model, config.objective)
    with open_mesh(config.mesh) as mesh, pytest.raises(ConfigError, match="FluxDoubleBlock") as found:
        build(config, model, mesh)
    assert "FluxSingleTransformerBlock, FluxTransformerBlock" in str(found.value)


def test_a_kind_of_block_is_compiled_once_for_a_bucket_whatever_else_is_done_to_it(toys: Toys) -> None:
    torch.compiler.reset()
    before = graphs()
    memory = {"compile": True, "swap": "all", "offload": True, "offload_threshold": 0.001}
    plain = steps_of(config_of("flux", toys("flux"), {"rank": 4}, {"recompute": "none"}), rounds=3)
    got = steps_of(config_of("flux", toys("flux"), {"rank": 4}, memory), rounds=3)
    # The first block in training, before which nothing trains; the others like it; those of the other kind; either kind in evaluation.
    assert graphs() - before == 5
    for (loss, gradients, evaluated), (want, wanted, held) in zip(got, plain, strict=True):
        assert (loss, evaluated) == pytest.approx((want, held), rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_streamed_weights_of_some_adapted_blocks_follow_what_a_step_does(toys: Toys) -> None:
    # Blocks before the first adapter get no backward pass, which nothing tells beforehand.
    adapter = {"rank": 4, "targets": [r"single_transformer_blocks\.[34]\."]}
    expected = steps_of(config_of("flux", toys("flux"), adapter, {"recompute": "none"}))
    same(steps_of(config_of("flux", toys("flux"), adapter, {"swap": "all"})), expected)


def test_in_layer_order_a_streamed_block_comes_once_for_all_microbatches(toys: Toys) -> None:
    moved = []
    for order in ("microbatch", "layer"):
        config = config_of("flux", toys("flux"), {"rank": 4}, {"swap": "all", "order": order})
        model = make_model(config.model, config.objective)
        with open_mesh(config.mesh) as mesh:
            pipeline = build(config, model, mesh)
            for i in range(3):
                pipeline.train([microbatch(model, seed=10 * i + j, count=1) for j in range(4)])
            stream = pipeline.memory.stream
            assert stream is not None
            moved.append(stream.moved)
    assert moved[1] < 0.3 * moved[0]


def test_what_a_layer_order_of_three_adds_up_is_that_of_any_other_order(toys: Toys) -> None:
    checkpoint = toys("wan")
    expected = steps_of(config_of("wan", checkpoint, {"rank": 4}, {"recompute": "none"}), count=3)
    got = steps_of(config_of("wan", checkpoint, {"rank": 4}, {"swap": "all", "order": "layer"}), count=3)
    for (loss, gradients, evaluated), (want, wanted, held) in zip(got, expected, strict=True):
        assert loss == want and evaluated == held
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_goes_on_by_other_settings_with_the_same_numbers(toys: Toys, plain: Callable[[str], list]) -> None:
    config = config_of("flux", toys("flux"), {"rank": 4}, {"swap": 3})
    model = make_model(config.model, config.objective)
    results = []
    with open_mesh(config.mesh) as mesh:
        pipeline = built(config, model, mesh)
        for i, memory in enumerate(({"swap": 3}, {"swap": "all", "offload": True, "offload_threshold": 0.001}, {"recompute": "none"})):
            if i:
                pipeline.change_memory(MemoryConfig.model_validate(memory))
            results.append(step_of(pipeline, batch_of(model, i)))
    same(results, plain("flux"))


@pytest.mark.parametrize("policy", ["selective", "everything"])
def test_a_step_for_which_there_is_no_memory_leaves_nothing_behind(toys: Toys, plain: Callable[[str], list], policy: str) -> None:
    config = config_of("flux", toys("flux"), {"rank": 4}, POLICIES[policy])
    model = make_model(config.model, config.objective)
    made: list[weakref.ref[Tensor]] = []

    def fall_short(module: nn.Module, given: object, out: tuple[Tensor, Tensor]) -> None:
        made.append(weakref.ref(out[0]))
        if len(made) == 5:
            raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB")

    with open_mesh(config.mesh) as mesh:
        pipeline = built(config, model, mesh)
        hooks = [b.attn.register_forward_hook(fall_short) for n, b in pipeline.module.named_modules() if hasattr(b, "attn")]
        gc.disable()
        try:
            with explained("a step", mesh.device, ()):
                pipeline.train(batch_of(model, 0))
        except ShortageError:
            pipeline.module.zero_grad()
        for hook in hooks:
            hook.remove()
        try:
            pipeline.change_memory(MemoryConfig.model_validate(POLICIES["swap-all"]))
        finally:
            gc.enable()
        assert len(made) == 5 and not any(m() is not None for m in made)
        assert not _get_current_dispatch_mode_stack()
        same([step_of(pipeline, batch_of(model, i)) for i in range(3)], plain("flux"))


def test_more_blocks_than_there_are_is_an_error(toys: Toys) -> None:
    with pytest.raises(ConfigError, match=r"memory\.swap: 99 units for a stage of 6"):
        steps_of(config_of("wan", toys("wan"), {"rank": 4}, {"swap": 99}))


def pipeline_of(config: Config, mesh: Mesh) -> Pipeline:
    return build(config, make_model(config.model, config.objective), mesh)


def test_streamed_weights_take_no_more_of_the_device_than_their_room(toys: Toys) -> None:
    config = config_of("wan", toys("wan"), {"rank": 4}, {"swap": "all"})
    with open_mesh(config.mesh) as mesh:
        stream = pipeline_of(config, mesh).memory.stream
        assert stream is not None
        whole = sum(h.size for h in stream.homes.values())
        assert stream.arena.numel() == max(a + b for a, b in zip(*[iter([h.size for h in stream.homes.values()])] * 2, strict=False))
        assert stream.arena.numel() < 0.4 * whole


# -- plans -----------------------------------------------------------------------------------------------------------


Resident = dict[int, Place]


def simulate(visits: list[Use], sizes: dict[int, int], room: int, resident: Resident, parts: dict[int, int]) -> tuple[int, Resident]:
    """Run a plan as the copies and the computation would, in the order they are queued; gives bytes copied and what stays.

    Each load may begin once its visit ended, each visit once its unit's load ended; no load may touch the bytes of a unit whose
    visit has not ended.
    """
    plan = make_plan(visits, sizes, room, resident, parts)
    memory = dict(resident)
    ended = START
    copied = 0

    def load(one: Load) -> None:
        nonlocal copied
        assert one.after <= ended, "queued copies wait for visits that were queued before them"
        assert one.offset >= 0 and one.offset + sizes[one.unit] <= room
        before = memory.get(one.unit)
        if one.share is Share.REST:
            assert before == Place(one.offset, whole=False), "the rest comes to what is there"
            copied += sizes[one.unit] - parts[one.unit]
        else:
            copied += sizes[one.unit] if one.share is Share.WHOLE else parts[one.unit]
            for unit, place in list(memory.items()):
                if place.offset < one.offset + sizes[one.unit] and one.offset < place.offset + sizes[unit]:
                    last = max((i for i in range(ended + 1) if visits[i].unit == unit), default=START)
                    assert one.after >= last, "a copy overwrites a unit that is still in use"
                    del memory[unit]
        memory[one.unit] = Place(one.offset, one.share is not Share.BACK)

    for i, use in enumerate(visits):
        for one in plan.before[i]:
            load(one)
        place = memory[use.unit]
        assert place.offset == plan.places[i], "the unit lies where the plan says"
        assert place.whole or use.back, "all is there that is read"
        ended = i
        for one in plan.behind[i]:
            load(one)
    assert memory == plan.resident
    assert copied == plan.moved
    return copied, plan.resident


UNITS = st.lists(st.integers(2, 40), min_size=2, max_size=9)


@given(sizes=UNITS, extra=st.integers(0, 200), seed=st.integers(0, 10_000), rounds=st.integers(1, 3))
def test_any_order_of_use_is_planned_so_that_no_copy_harms_what_is_used(sizes: list[int], extra: int, seed: int, rounds: int) -> None:
    by_unit, drawn = dict(enumerate(sizes)), random.Random(seed)
    units = [drawn.randrange(len(sizes)) for _ in range(30)]
    visits = [Use(u, drawn.random() < 0.5) for i, u in enumerate(units) if i == 0 or units[i - 1] != u]
    parts = {unit: drawn.randrange(size) for unit, size in by_unit.items() if drawn.random() < 0.5}
    room, resident = max(sizes) + extra, {}
    for _ in range(rounds):
        _, resident = simulate(visits, by_unit, room, resident, parts)


def step_visits(units: int) -> list[Use]:
    forward = list(range(units))
    return [*(Use(u) for u in forward), *(Use(u, back=True) for u in reversed(forward[:-1]))]


def test_a_step_of_equal_blocks_brings_each_twice_and_less_with_more_room() -> None:
    visits, sizes = step_visits(20), dict.fromkeys(range(20), 10)
    counts = []
    for kept in (2, 5, 10, 19, 20):
        resident: Resident = {}
        for _ in range(3):
            copied, resident = simulate(visits, sizes, 10 * kept, resident, {})
        counts.append(copied // 10)
    # Forward and backward each bring all but what the other left, and with two places one is always being filled.
    assert counts[0] <= 2 * 20 - 2 and counts[-1] == 0
    assert counts == sorted(counts, reverse=True)
    assert counts[2] <= 2 * 20 - 2 * 10 + 2


def test_what_a_backward_pass_does_not_read_is_brought_for_the_forward_pass_alone() -> None:
    visits, sizes, parts = step_visits(20), dict.fromkeys(range(20), 10), dict.fromkeys(range(20), 6)
    for kept, twice in ((2, 16), (5, 10), (10, 0)):
        resident: Resident = {}
        whole: Resident = {}
        for _ in range(3):
            copied, resident = simulate(visits, sizes, 10 * kept, resident, parts)
            most, whole = simulate(visits, sizes, 10 * kept, whole, {})
        # Those that stay from one pass to the other are brought whole, once; the others for each.
        assert (most, copied) == (10 * (20 + twice), 10 * (20 + twice) - 4 * twice)


def test_every_block_is_brought_while_the_one_before_it_is_computed() -> None:
    visits, sizes = step_visits(12), dict.fromkeys(range(12), 10)
    plan = make_plan(visits, sizes, 20, {})
    plan = make_plan(visits, sizes, 20, plan.resident)
    late = [use for use, loads in [*zip(visits, plan.before, strict=True)][1:] if any(load.unit == use.unit for load in loads)]
    assert not late, "nothing is brought when it is due"


@pytest.mark.parametrize(
    ("sizes", "room"), [({n: 298 if n < 19 else 124 for n in range(57)}, 1120), ({n: (7, 116, 46, 72)[n % 4] for n in range(32)}, 360)]
)
def test_where_steps_would_find_weights_elsewhere_by_turns_a_little_less_room_is_used(sizes: dict[int, int], room: int) -> None:
    visits = step_visits(len(sizes))
    turns = list(steady_plans(visits, sizes, room, {}))
    assert len(turns) == ROUNDS and turns[-1].resident != turns[-2].resident
    less = room_to_settle(visits, sizes, room, {})
    assert room * 15 // 16 <= less < room
    *_, before, last = steady_plans(visits, sizes, less, {})
    assert last.resident == before.resident


def test_the_smallest_room_holds_a_block_and_the_one_after_it() -> None:
    assert smallest_room({0: 30, 1: 10, 2: 10}, [0, 1, 2]) == 40
