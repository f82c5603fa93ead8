"""What batches promise, in one process and with workers."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from diffpipe.data.buckets import Bucket
from diffpipe.data.cache import Cache, ShardWriter, key_of
from diffpipe.data.dataset import Sample, Samples
from diffpipe.data.feed import Feed
from diffpipe.data.files import File
from diffpipe.data.loader import Batch, Loader, Steps, eval_batches, make_loader
from diffpipe.data.sampler import Example, Step, StepSampler
from diffpipe.data.workers import told_of_death
from diffpipe.errors import DiffpipeError
from diffpipe.flow import Key
from tests.drawn import Pool

WIDE, TALL = Bucket(1, 32, 64), Bucket(5, 64, 32)


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    entries = []
    with ShardWriter(tmp_path) as writer:
        for caption in ("caption", "other", ""):
            writer.add(key_of(caption), {"text": torch.full((4,), float(len(caption)))})
        for i in range(11):
            bucket = TALL if i % 3 == 0 else WIDE
            shape = (3, (bucket.frames + 3) // 4, bucket.height // 8, bucket.width // 8)
            writer.add(key_of(f"m{i}"), {"latents": torch.full(shape, float(i))})
            writer.add(key_of(f"mask{i}"), {"mask": torch.full((1, *shape[2:]), i / 10)})
            entries.append(Sample(File(Path(f"{i}.png")), ("caption",), bucket, 2 if i == 4 else 1, key_of(f"m{i}"), (key_of("caption"),)))
    return Samples(entries, Cache(tmp_path), key_of(""))


def open_loader(
    samples: Samples, workers: int, micro: int = 2, accumulate: int = 1, replica: int = 0, replicas: int = 1, state: Any = None
) -> Loader:
    sampler = StepSampler(samples.buckets, samples.repeats, micro=micro, accumulate=accumulate, seed=3, replica=replica, replicas=replicas)
    if state is not None:
        assert sampler.load_state_dict(state) is None
    return make_loader(samples, sampler, Pool(), micro=micro, seed=3, workers=workers)


def same(a: Batch, b: Batch) -> bool:
    return (a.samples, a.epoch, a.bucket, a.epoch_ends) == (b.samples, b.epoch, b.bucket, b.epoch_ends) and all(
        torch.equal(x["noisy"], y["noisy"]) and torch.equal(x["t"], y["t"]) and torch.equal(u[0][0], v[0][0])
        for (x, u), (y, v) in zip(a.microbatches, b.microbatches, strict=True)
    )


def test_a_batch_is_the_microbatches_of_one_bucket(samples: Samples) -> None:
    batch = next(open_loader(samples, 0, micro=2, accumulate=2))
    assert len(batch.microbatches) == 2 and len(batch.samples) == 4
    assert {samples.buckets[i] for i in batch.samples} == {batch.bucket}
    inputs, targets = batch.microbatches[0]
    assert inputs["noisy"].shape[0] == inputs["text"].shape[0] == 2
    assert targets[0][0].shape == inputs["noisy"].shape


@pytest.mark.parametrize("before,after", [(0, 0), (2, 2), (0, 2), (2, 1)])
@pytest.mark.timeout(300)
def test_a_resumed_loader_goes_on_with_exactly_the_next_batches(samples: Samples, before: int, after: int) -> None:
    unbroken = list(islice(open_loader(samples, 0), 14))
    stopped = open_loader(samples, before)
    first = list(islice(stopped, 6))
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.close()
    resumed = open_loader(samples, after, state=state)
    rest = list(islice(resumed, 8))
    resumed.close()
    assert all(same(a, b) for a, b in zip(first + rest, unbroken, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.timeout(300)
def test_the_state_before_the_first_batch_is_the_beginning(samples: Samples, workers: int) -> None:
    fresh = open_loader(samples, workers)
    state = fresh.state_dict()
    first = next(fresh)
    fresh.close()
    resumed = open_loader(samples, 0, state=state)
    assert same(next(resumed), first)


def test_replicas_together_see_what_one_would(samples: Samples) -> None:
    whole = open_loader(samples, 0, micro=1, accumulate=2)
    halves = [open_loader(samples, 0, micro=1, replica=r, replicas=2) for r in range(2)]
    for _ in range(12):
        batch, parts = next(whole), [next(h) for h in halves]
        assert batch.samples == parts[0].samples + parts[1].samples
        for mine, other in zip(batch.microbatches, [p.microbatches[0] for p in parts], strict=True):
            assert torch.equal(mine[0]["noisy"], other[0]["noisy"])


def test_a_sample_meets_new_noise_at_every_showing(samples: Samples) -> None:
    seen = [x["noisy"] for b in islice(open_loader(samples, 0, micro=1), 60) for x, _ in b.microbatches if b.samples == [4]]
    assert len(seen) >= 8 and all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_reading_batches_leaves_the_random_state_of_training_alone(samples: Samples) -> None:
    state = torch.get_rng_state()
    loader = open_loader(samples, 0)
    loader.state_dict()
    next(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_sees_every_sample_at_every_quantile_with_the_same_noise(samples: Samples) -> None:
    batches = list(eval_batches(samples, Pool(), quantiles=[0.1, 0.9], micro=2, seed=0))
    for quantile in (0.1, 0.9):
        chosen = [b for b in batches if b.quantile == quantile]
        assert sorted(i for b in chosen for i in b.samples) == list(range(11))
        assert all(len(b.microbatches) == 1 and {samples.buckets[i] for i in b.samples} == {b.bucket} for b in chosen)
    low, high = batches[0].microbatches[0], batches[len(batches) // 2].microbatches[0]
    assert (low[0]["t"] < high[0]["t"]).all()
    assert torch.equal(low[1][0][0], high[1][0][0])
    again = list(eval_batches(samples, Pool(), quantiles=[0.1, 0.9], micro=2, seed=0))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def test_replicas_share_out_an_evaluation(samples: Samples) -> None:
    parts = [list(eval_batches(samples, Pool(), quantiles=[0.5], micro=2, seed=0, replica=r, replicas=2)) for r in range(2)]
    assert sorted(i for part in parts for b in part for i in b.samples) == list(range(11))


def test_replicas_that_must_keep_step_have_as_many_batches_of_an_evaluation_each(samples: Samples) -> None:
    given = {"quantiles": [0.1, 0.5], "micro": 2, "seed": 0, "replicas": 4, "in_step": True}
    parts = [list(eval_batches(samples, Pool(), **given, replica=r)) for r in range(4)]
    assert {len(part) for part in parts} == {4} and all(b.microbatches for part in parts for b in part)
    for quantile in (0.1, 0.5):
        assert sorted(i for part in parts for b in part for i in b.samples if b.quantile == quantile) == list(range(11))


def test_a_captions_variants_are_shown_by_turns_and_dropped_at_their_rate(samples: Samples) -> None:
    both = (key_of("caption"), key_of("other"))
    samples.entries = [replace(e, texts=both, captions=("caption", "other"), dropout=0.25) for e in samples.entries]
    shown = Counter(samples.read(3, Key(0, epoch, 3, 0))["text"][0].item() for epoch in range(2000))
    assert shown[0] / 2000 == pytest.approx(0.25, abs=0.04)
    assert shown[7] / 2000 == pytest.approx(0.375, abs=0.04) and shown[5] / 2000 == pytest.approx(0.375, abs=0.04)
    assert all(samples.read(3, Key(0, 0, 3, 0, quantile))["text"][0] == 7 for quantile in (0.1, 0.5, 0.9)), "evaluation shows the first"
    again = Counter(samples.read(3, Key(0, epoch, 3, 0))["text"][0].item() for epoch in range(2000))
    assert again == shown


@pytest.mark.parametrize("normalize", [False, True])
def test_a_mask_weighs_the_loss_of_each_latent_cell(samples: Samples, normalize: bool) -> None:
    bare = samples.entries
    samples = Samples([replace(e, mask=key_of(f"mask{i}")) if i % 2 else e for i, e in enumerate(bare)], samples._cache)
    steps = Steps(samples, Pool(), micro=4, seed=0, normalize_masks=normalize)
    batch = steps[Step(0, WIDE, tuple(Example(0, i, 0) for i in (1, 2, 5, 7)), False)]
    [(_, [(target, weight)])] = batch.microbatches
    assert weight is not None and weight.shape == (4, 1, 1, *target.shape[-2:])
    expected = [1.0, 1.0, 1.0, 1.0] if normalize else [0.1, 1.0, 0.5, 0.7]
    torch.testing.assert_close(weight[:, 0, 0, 0, 0], torch.tensor(expected))


def test_samples_know_how_their_pictures_were_framed(samples: Samples) -> None:
    samples.entries[1] = replace(samples.entries[1], source=(300, 400))
    # 300 x 400 covers 32 x 64 at 48 x 64, of which 8 rows are cut off at the top.
    assert samples.read(1, Key(0, 0, 1, 0))["framing"].tolist() == [300, 400, 8, 0, 32, 64]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_feed_that_fetches_ahead_gives_the_loaders_batches_and_knows_the_place_of_the_last_in_use(samples: Samples, workers: int) -> None:
    expected = list(islice(open_loader(samples, 0), 6))
    feed = Feed(open_loader(samples, workers), torch.device("cpu"))
    for batch in expected[:4]:
        got = next(feed)
        feed.fetch_ahead()
        assert same(got, batch)
    state = json.loads(json.dumps(feed.state_dict()))
    other = Feed(open_loader(samples, workers, state=state), torch.device("cpu"))
    assert all(same(next(other), batch) for batch in expected[4:])


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_worker_that_is_killed_while_a_step_computes_ends_it_with_the_cure(samples: Samples) -> None:
    feed = Feed(open_loader(samples, 1), torch.device("cpu"))
    next(feed)
    with pytest.raises(DiffpipeError, match=r"data\.workers: a worker process was ended from outside"), told_of_death("data.workers"):
        for worker in psutil.Process().children(recursive=True):
            if "resource_tracker" not in " ".join(worker.cmdline()):
                worker.kill()
        for _ in range(30):
            feed.fetch_ahead()
            time.sleep(0.1)  # the step
            next(feed)
