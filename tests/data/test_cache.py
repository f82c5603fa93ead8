"""What the cache promises about entries, crashes and disks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffpipe.data.cache import Cache, ShardWriter, key_of
from diffpipe.errors import DiffpipeError

ROOT = Path(__file__).resolve().parents[2]


def entry(i: int) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((4, 1, 2, 3), float(i), dtype=torch.bfloat16), "mask": torch.tensor(i)}


def fill(folder: Path, count: int, **limits: float) -> list[str]:
    keys = [key_of(str(i)) for i in range(count)]
    with ShardWriter(folder, **limits) as writer:  # type: ignore[arg-type]
        for i, key in enumerate(keys):
            writer.add(key, entry(i))
    return keys


def test_what_was_written_is_read(tmp_path: Path) -> None:
    keys = fill(tmp_path, 5)
    cache = Cache(tmp_path)
    assert len(cache) == 5 and key_of("other") not in cache
    for i, key in enumerate(keys):
        assert key in cache
        assert all(torch.equal(cache[key][n], t) and cache[key][n].dtype == t.dtype for n, t in entry(i).items())


def test_a_shard_ends_when_it_is_full(tmp_path: Path) -> None:
    fill(tmp_path, 10, limit=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert len(Cache(tmp_path)) == 10


def test_a_shard_ends_after_some_seconds(tmp_path: Path) -> None:
    fill(tmp_path, 3, seconds=0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_views_of_a_batch_are_kept_by_themselves(tmp_path: Path) -> None:
    batch = torch.arange(6.0).view(2, 3)
    with ShardWriter(tmp_path) as writer:
        for i, row in enumerate(batch):
            writer.add(key_of(f"k{i}"), {"x": row})
        batch.zero_()
    assert Cache(tmp_path)[key_of("k1")]["x"].tolist() == [3.0, 4.0, 5.0]


def test_tensors_are_mapped_and_not_read_whole(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add(key_of("big"), {"x": torch.zeros(64 << 18)})
    cache = Cache(tmp_path)
    before = _resident()
    tensor = cache[key_of("big")]["x"]
    assert tensor.nbytes == 64 << 20 and _resident() - before < 16 << 20


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def test_the_cache_travels_to_another_process(tmp_path: Path) -> None:
    keys = fill(tmp_path, 3)
    cache = Cache(tmp_path)
    cache[keys[0]]
    copy = pickle.loads(pickle.dumps(cache))
    assert len(copy) == 3 and torch.equal(copy[keys[2]]["latents"], entry(2)["latents"])


def test_two_runs_may_write_into_one_folder(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as one, ShardWriter(tmp_path) as two:
        one.add(key_of("a"), entry(1))
        two.add(key_of("a"), entry(1))
        two.add(key_of("b"), entry(2))
    assert len(Cache(tmp_path)) == 2


def test_finished_shards_survive_kill_9_and_hold_whole_entries(tmp_path: Path) -> None:
    program = (
        "import sys, torch\nfrom diffpipe.data.cache import ShardWriter\n"
        "writer = ShardWriter(sys.argv[1], limit=1 << 20)\n"
        "for i in range(10**6):\n"
        "    writer.add(f'{i:032x}', {'x': torch.full((1 << 14,), float(i))})\n"
        "    print(i, flush=True)\n"
    ).replace("ShardWriter(sys.argv[1]", "ShardWriter(__import__('pathlib').Path(sys.argv[1])")
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if int(line) > 200:
                running.kill()
                break
    cache = Cache(tmp_path)
    assert len(cache) >= 180 and not cache.damaged
    for i in range(len(cache)):
        assert torch.equal(cache[f"{i:032x}"]["x"], torch.full((1 << 14,), float(i)))


def test_a_damaged_shard_counts_as_missing(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    [shard] = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    cache = Cache(tmp_path)
    assert len(cache) == 0 and cache.damaged == [shard]


def test_foreign_safetensors_are_not_entries(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"a.b": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert len(Cache(tmp_path)) == 0


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(bytes(path.stat().st_size))])
def test_a_shard_that_disappears_or_is_blank_although_it_is_indexed_is_told_of_with_the_cure(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    [key] = fill(tmp_path, 1)
    Cache(tmp_path).write_index()
    cache = Cache(tmp_path)
    spoil(next(tmp_path.glob("*.safetensors")))
    with pytest.raises(DiffpipeError, match=r"gone or damaged[\s\S]*--verify"):
        cache[key]
    cache.verify()
    assert key not in Cache(tmp_path)


def test_only_old_temporary_files_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / ".unfinished-old", tmp_path / ".unfinished-young"
    for path in (old, young):
        path.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    ShardWriter(tmp_path)
    assert not old.exists() and young.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on file size is what stands in for a full disk")
def test_a_full_disk_is_told_of_and_leaves_finished_shards_alone(tmp_path: Path) -> None:
    program = """
import resource, signal, sys, torch
from pathlib import Path
from diffpipe.data.cache import ShardWriter, key_of
from diffpipe.errors import DiffpipeError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with ShardWriter(Path(sys.argv[1])) as writer:
    writer.add(key_of("small"), {"x": torch.ones(4)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ShardWriter(Path(sys.argv[1])) as writer:
        writer.add(key_of("large"), {"x": torch.ones(100_000)})
except DiffpipeError as fault:
    print(fault)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in done.stdout and "free some space" in done.stdout, done.stderr
    cache = Cache(tmp_path)
    assert key_of("small") in cache and key_of("large") not in cache
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


# -- the index -------------------------------------------------------------------------------------------------------


def indexed(folder: Path, count: int, **limits: float) -> list[str]:
    keys = fill(folder, count, **limits)
    Cache(folder).write_index()
    return keys


def test_an_indexed_cache_reads_no_header_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = indexed(tmp_path, 50, limit=200)
    monkeypatch.setattr("diffpipe.data.cache._held", None)
    cache = Cache(tmp_path)
    assert cache.keys() == set(keys) and not cache.missing(keys)
    assert cache.missing([*keys, key_of("x"), key_of("y")]) == {key_of("x"), key_of("y")}
    for i, key in enumerate(keys):
        assert all(torch.equal(cache[key][n], t) for n, t in entry(i).items())


def test_what_is_added_after_the_index_is_found_and_joins_it(tmp_path: Path) -> None:
    first = indexed(tmp_path, 20, limit=200)
    with ShardWriter(tmp_path) as writer:
        writer.add(key_of("late"), {"other": torch.ones(3)})
    cache = Cache(tmp_path)
    assert cache.keys() == {*first, key_of("late")}
    cache.write_index()
    again = Cache(tmp_path)
    assert not again._fresh and again[key_of("late")]["other"].tolist() == [1, 1, 1]


def test_a_shard_that_is_gone_or_cut_short_is_missing_although_it_is_indexed(tmp_path: Path) -> None:
    keys = indexed(tmp_path, 20, limit=200)
    gone, cut, *_ = sorted(tmp_path.glob("*.safetensors"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-3])
    cache = Cache(tmp_path)
    assert cache.damaged == [cut]
    assert len(cache.missing(keys)) == 20 - len(cache) > 0
    cache.write_index()
    assert Cache(tmp_path).damaged == [cut]


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-5], lambda b: b"", lambda b: b"no index\n" + b, lambda b: b.replace(b"cache-2", b"cache-9")]
)
def test_a_spoilt_index_costs_time_only(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    keys = indexed(tmp_path, 20, limit=200)
    (tmp_path / "index.bin").write_bytes(spoil((tmp_path / "index.bin").read_bytes()))
    assert Cache(tmp_path).keys() == set(keys)


def test_keys_that_share_their_first_half_are_told_apart(tmp_path: Path) -> None:
    keys = ["0" * 16 + f"{i:016x}" for i in range(40)]
    with ShardWriter(tmp_path) as writer:
        for i, key in enumerate(keys):
            writer.add(key, entry(i))
    Cache(tmp_path).write_index()
    cache = Cache(tmp_path)
    assert not cache.missing(keys) and cache.missing(["0" * 32, "0" * 16 + "f" * 16]) == {"0" * 16 + "f" * 16}
    assert all(torch.equal(cache[key]["mask"], torch.tensor(i)) for i, key in enumerate(keys))


def test_a_million_entries_open_in_under_a_second(tmp_path: Path) -> None:
    import numpy as np

    from diffpipe.data.cache import _Index

    count, shards = 1_000_000, 4000
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 2**63, (count, 2), dtype=np.uint64)
    halves = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    names = {f"{i:032x}.safetensors": 0 for i in range(shards)}
    for name in names:
        (tmp_path / name).touch()
    columns = (halves[:, 0], halves[:, 1], rng.integers(0, shards, count).astype(np.uint32), np.zeros(count, np.uint16))
    _Index({"shards": names, "names": [["latents"]]}, columns).write(tmp_path / "index.bin")
    wanted = [f"{h:016x}{low:016x}" for h, low in halves[::100].tolist()]
    began = time.monotonic()
    cache = Cache(tmp_path)
    assert not cache.missing(wanted)
    assert time.monotonic() - began < 1


def test_a_flipped_byte_is_found_and_its_shard_removed(tmp_path: Path) -> None:
    keys = indexed(tmp_path, 20, limit=200)
    cache = Cache(tmp_path)
    assert cache.verify() == []
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    assert cache.verify() == [shard] and not shard.exists()
    assert 0 < len(Cache(tmp_path).missing(keys)) < 20


def test_pruning_keeps_what_is_used_and_frees_the_rest(tmp_path: Path) -> None:
    keys = indexed(tmp_path, 40, limit=400)
    kept = [k for i, k in enumerate(keys) if i % 3 == 0 or i < 8]
    freed = Cache(tmp_path).prune(kept)
    cache = Cache(tmp_path)
    assert freed > 0 and cache.keys() == set(kept)
    assert all(torch.equal(cache[k]["mask"], entry(keys.index(k))["mask"]) for k in kept)
    assert cache.verify() == []
