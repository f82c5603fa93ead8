"""What the order of samples promises."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpipe.config.schema import CheckpointConfig
from diffpipe.data.buckets import Bucket
from diffpipe.data.sampler import Step, StepSampler
from diffpipe.errors import DiffpipeError
from diffpipe.train import is_due

A, B, C = Bucket(1, 64, 64), Bucket(1, 48, 96), Bucket(17, 64, 64)
BUCKETS = [A] * 13 + [B] * 7 + [C] * 2
REPEATS = [1] * 10 + [3] * 5 + [1] * 7


def sampler(micro: int = 1, accumulate: int = 1, replica: int = 0, replicas: int = 1, seed: int = 0) -> StepSampler:
    return StepSampler(BUCKETS, REPEATS, micro=micro, accumulate=accumulate, seed=seed, replica=replica, replicas=replicas)


def epochs(stream: StepSampler, count: int) -> list[Step]:
    steps: list[Step] = []
    while True:
        step = next(stream)
        if step.epoch >= count:
            return steps
        steps.append(step)


@pytest.mark.parametrize("micro,accumulate,replicas", [(1, 1, 1), (2, 2, 1), (1, 2, 3), (4, 2, 2)])
def test_every_example_is_seen_exactly_once_whatever_the_batch(micro: int, accumulate: int, replicas: int) -> None:
    count = 2 * micro * accumulate * replicas  # after so many epochs no bucket has a leftover
    streams = [sampler(micro, accumulate, r, replicas) for r in range(replicas)]
    seen = Counter(e for s in streams for step in epochs(s, count) for e in step.examples)
    assert set(seen.values()) == {1}
    assert len(seen) == count * sum(REPEATS)
    shown = Counter(e.sample for e in seen)
    assert [shown[i] for i in range(len(BUCKETS))] == [count * r for r in REPEATS]


def test_the_leftover_of_an_epoch_opens_the_next_one() -> None:
    stream = sampler(micro=4)
    first = epochs(stream, 1)
    assert len(first) == 4 + 2  # of 19 examples in A and 11 in B; the 2 in C fill no batch
    seen = {e for step in first for e in step.examples}
    missed = {(s, r) for s, n in enumerate(REPEATS) for r in range(n)} - {(e.sample, e.repeat) for e in seen}
    stream = sampler(micro=4)
    next(stream)
    assert len(stream.left) == len(missed) > 0
    second = [e for step in epochs(sampler(micro=4), 2)[len(first) :] for e in step.examples]
    late = {(e.sample, e.repeat) for e in second if e.epoch == 0}
    assert {(s, r) for s, r in missed if BUCKETS[s] != C} <= late


def test_a_bucket_smaller_than_a_batch_waits_until_epochs_fill_it() -> None:
    stream = StepSampler([C], [1], micro=4, accumulate=2, seed=0)
    steps = list(islice(stream, 2))
    assert [s.epoch for s in steps] == [7, 15]
    assert [e.epoch for e in steps[0].examples] == list(range(8))


def test_what_is_due_every_few_epochs_comes_though_most_of_them_fill_no_batch() -> None:
    stream = StepSampler([A, A, A], [1, 1, 1], micro=4, accumulate=4, seed=0)
    section, due = CheckpointConfig(every_epochs=10), []
    for step in range(1, 10):
        before, found = stream.epochs_over, next(stream)
        assert stream.epochs_over == found.epoch + found.epoch_ends
        due += [stream.epochs_over] * is_due((step - 1, step), (before, stream.epochs_over), section)
    assert due == [11, 22, 32, 43]  # none of the epochs with a step is a multiple of ten


def test_the_stream_does_not_depend_on_how_a_step_is_shared_out() -> None:
    whole = epochs(sampler(micro=1, accumulate=4), 3)
    halves = [epochs(sampler(micro=1, accumulate=2, replica=r, replicas=2), 3) for r in range(2)]
    quarters = [epochs(sampler(micro=2, accumulate=1, replica=r, replicas=2), 3) for r in range(2)]
    for split in (halves, quarters):
        assert [s.examples for s in whole] == [a.examples + b.examples for a, b in zip(*split, strict=True)]


def test_one_step_has_one_bucket() -> None:
    for step in epochs(sampler(micro=2), 3):
        assert {BUCKETS[e.sample] for e in step.examples} == {step.bucket}


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    order = [[e.sample for s in epochs(sampler(), 2) if s.epoch == n for e in s.examples] for n in range(2)]
    assert sorted(order[0]) == sorted(order[1])
    assert order[0] != order[1]
    assert order[0] != [e.sample for s in epochs(sampler(seed=1), 1) for e in s.examples]


def test_the_order_is_the_same_forever() -> None:
    assert [step.examples[0].sample for step in islice(sampler(), 8)] == [13, 3, 16, 12, 2, 1, 15, 14]


def test_the_last_step_of_an_epoch_says_so() -> None:
    steps = epochs(sampler(micro=2), 3)
    ends = [steps[i].epoch != steps[i + 1].epoch for i in range(len(steps) - 1)]
    assert [s.epoch_ends for s in steps] == [*ends, True]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_steps_of_some_epochs_are_known_in_advance(count: int) -> None:
    assert sampler(micro=3).steps_until(count) == len(epochs(sampler(micro=3), count))


@pytest.mark.parametrize("done", [0, 1, 9, 23, 60])
def test_a_resumed_stream_goes_on_exactly(done: int) -> None:
    unbroken = list(islice(sampler(micro=2), 90))
    stopped = sampler(micro=2)
    list(islice(stopped, done))
    resumed = sampler(micro=2)
    assert resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict()))) is None
    assert list(islice(resumed, 90 - done)) == unbroken[done:]


def test_a_stream_resumed_with_another_batch_size_still_shows_each_example_once() -> None:
    stopped = sampler(micro=2)
    before = list(islice(stopped, 7))
    resumed = sampler(micro=3, replicas=1)
    assert resumed.load_state_dict(stopped.state_dict()) is None
    foreseen = resumed.steps_until(6)
    list_of_steps = list(islice(resumed, 4))
    again = sampler(micro=3)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    rest = epochs(again, 6)
    assert foreseen == 4 + len(rest)
    seen = Counter(e for step in before + list_of_steps + rest for e in step.examples)
    assert set(seen.values()) == {1}
    assert len(seen) + len(again.left) >= 6 * sum(REPEATS) - 3 * 3
    assert all(len(s.examples) == 3 for s in rest)


def test_changed_samples_begin_a_new_epoch_and_tell() -> None:
    stopped = sampler()
    list(islice(stopped, 5))
    other = StepSampler([A] * 4, [1] * 4, micro=1, accumulate=1, seed=0)
    note = other.load_state_dict(stopped.state_dict())
    assert note and "epoch 2" in note
    assert [other.steps_until(count) for count in (1, 2, 3)] == [0, 4, 8]
    assert {e.sample for e in (x for s in epochs(other, 2) for x in s.examples)} == {0, 1, 2, 3}


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DiffpipeError, match="no sample"):
        StepSampler([], [], micro=1, accumulate=1, seed=0)


# -- for any data and any batch --------------------------------------------------------------------------------------

REPEAT = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
DATA = st.lists(st.tuples(st.sampled_from([A, B, C]), REPEAT), min_size=1, max_size=30)


@given(items=DATA, micro=st.integers(1, 3), accumulate=st.integers(1, 3), replicas=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_showing_comes_once_and_on_time_for_any_data(
    items: list[tuple[Bucket, float]], micro: int, accumulate: int, replicas: int, seed: int
) -> None:
    buckets, repeats = [b for b, _ in items], [r for _, r in items]
    make = lambda r: StepSampler(  # noqa: E731
        buckets, repeats, micro=micro, accumulate=accumulate, seed=seed, replica=r, replicas=replicas
    )
    streams = [make(r) for r in range(replicas)]
    wanted = streams[0].steps_until(4)
    seen: Counter = Counter()
    for _ in range(wanted):
        steps = [next(s) for s in streams]
        assert len({s.bucket for s in steps}) == 1 and len({s.epoch for s in steps}) == 1
        for step in steps:
            assert len(step.examples) == micro * accumulate
            assert all(buckets[e.sample] == step.bucket and e.epoch <= step.epoch for e in step.examples)
            seen.update(step.examples)
    assert all(n == 1 for n in seen.values())
    assert all(e.epoch < 4 for e in seen), "four epochs hold nothing of the fifth"
    late = streams[0].left if wanted else []
    shown = Counter(e.sample for e in [*seen, *late])
    for i, repeat in enumerate(repeats):
        assert shown[i] <= int(repeat * 4) + 1


@given(items=DATA, before=st.integers(0, 12), seed=st.integers(0, 3))
def test_a_resumed_stream_goes_on_exactly_for_any_data(items: list[tuple[Bucket, float]], before: int, seed: int) -> None:
    buckets, repeats = [b for b, _ in items], [r for _, r in items]

    def fresh() -> StepSampler:
        return StepSampler(buckets, repeats, micro=2, accumulate=1, seed=seed)

    whole, stopped, resumed = fresh(), fresh(), fresh()
    expected = list(islice(whole, before + 6))[before:]
    list(islice(stopped, before))
    assert resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict()))) is None
    assert list(islice(resumed, 6)) == expected


def test_half_a_repeat_shows_each_sample_in_every_second_epoch_and_half_of_them_in_each() -> None:
    stream = StepSampler([A] * 100, [0.5] * 100, micro=1, accumulate=1, seed=0)
    seen = epochs(stream, 4)
    by_epoch = [Counter(e.sample for s in seen if s.epoch == epoch for e in s.examples) for epoch in range(4)]
    assert by_epoch[0].keys() == by_epoch[2].keys() and by_epoch[1].keys() == by_epoch[3].keys()
    assert not by_epoch[0].keys() & by_epoch[1].keys() and len(by_epoch[0]) + len(by_epoch[1]) == 100
    assert 30 < len(by_epoch[0]) < 70


def test_every_epoch_has_another_order_and_other_batches() -> None:
    seen = epochs(sampler(micro=4), 3)
    orders = [[e.sample for s in seen if s.epoch == epoch for e in s.examples] for epoch in range(3)]
    batches = [{frozenset(e.sample for e in s.examples) for s in seen if s.epoch == epoch} for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert len(batches[0] & batches[1]) < len(batches[0]) / 2
