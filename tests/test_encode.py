"""What act one promises: every file a sample or a reason, nothing encoded twice, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpipe.config.schema import Config, FolderConfig
from diffpipe.data.buckets import Bucket
from diffpipe.data.dataset import Samples, stack
from diffpipe.encode import EncodeProgress, Report, prepare_data
from diffpipe.errors import DiffpipeError, MediaError
from diffpipe.models.base import DiffusionModel
from tests.drawn import PicturePool, Pool, config_of, draw_clip, draw_image, together

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Four pictures (two captions alike) and two clips."""
    folder = tmp_path / "media"
    draw_image(folder / "a.png", (80, 60), "a fox", seed=1)
    draw_image(folder / "b.jpg", (60, 80), "a dog", seed=2)
    draw_image(folder / "c.webp", (64, 64), "a fox", seed=3)
    draw_image(folder / "d.png", (80, 60), "a cat", seed=4)
    draw_clip(folder / "e.mp4", 20, 16, caption="a clip")
    draw_clip(folder / "f.mp4", 40, 16, caption="another clip")
    return folder


def prepare(config: Config, model: DiffusionModel, **more: Any) -> tuple[Samples, Report]:
    return prepare_data(config, model, config.data.folders, device=CPU, **more)


def log_of(model: Pool) -> Counter[str]:
    assert model.log is not None
    if not model.log.exists():
        return Counter()
    lines = Counter(json.loads(line).split()[0] for line in model.log.read_text().splitlines())
    model.log.unlink()
    return lines


def same(a: Samples, b: Samples) -> bool:
    return len(a) == len(b) and all(a[i].keys() == b[i].keys() and all(torch.equal(a[i][n], b[i][n]) for n in a[i]) for i in range(len(a)))


def test_images_and_videos_become_samples_of_one_run(tmp_path: Path, media: Path) -> None:
    samples, report = prepare(config_of(media, tmp_path / "out", frames=[1, 17, 33]), Pool())
    assert [e.path.name for e in samples.entries] == ["a.png", "b.jpg", "c.webp", "d.png", "e.mp4", "f.mp4"]
    assert [b.frames for b in samples.buckets] == [1, 1, 1, 1, 17, 33]
    assert samples[5]["latents"].shape[:2] == (3, 9)
    assert samples[1]["text"][0] == ord("a")
    batch = stack([samples[0], samples[3]])
    assert batch["latents"].shape[0] == batch["text"].shape[0] == 2
    assert (report.files, report.samples, report.encoded, report.reused) == (6, 6, 6 + 5, 0)


def test_latents_are_those_of_the_pixels_on_disk(tmp_path: Path, media: Path) -> None:
    samples, _ = prepare(config_of(media, tmp_path / "out", frames=[1, 17]), Pool())
    blue = [(samples[i]["latents"][2].mean().item() + 1) * 127.5 for i in (0, 3)]
    assert blue == pytest.approx([37, 37 * 4], abs=1)
    grey = (samples[4]["latents"].mean((0, 2, 3)) + 1) * 127.5
    assert torch.allclose(grey, torch.tensor([0.0, 10.0, 26.0, 42.0, 58.0]), atol=2)


def test_a_second_run_encodes_nothing_and_loads_no_encoder(tmp_path: Path, media: Path) -> None:
    config, model = config_of(media, tmp_path / "out", frames=[1, 17]), Pool(tmp_path / "log")
    first, _ = prepare(config, model)
    assert log_of(model) == {"loaded": 1, "media": 6, "text": 5}
    second, report = prepare(config, model)
    assert log_of(model) == {}
    assert (report.encoded, report.reused) == (0, 11)
    assert same(first, second)


def test_an_edited_caption_encodes_one_caption(tmp_path: Path, media: Path) -> None:
    config, model = config_of(media, tmp_path / "out", frames=[1, 17]), Pool(tmp_path / "log")
    prepare(config, model)
    log_of(model)
    (media / "a.txt").write_text("a red fox")
    samples, report = prepare(config, model)
    assert log_of(model) == {"loaded": 1, "text": 1} and report.encoded == 1
    assert samples.entries[0].caption == "a red fox"


def test_an_edited_image_is_encoded_again_and_a_moved_folder_is_not(tmp_path: Path, media: Path) -> None:
    model = Pool(tmp_path / "log")
    before, _ = prepare(config_of(media, tmp_path / "out", frames=[1, 17]), model)
    log_of(model)
    moved = media.rename(tmp_path / "moved")
    after, report = prepare(config_of(moved, tmp_path / "out", frames=[1, 17]), model)
    assert log_of(model) == {} and report.encoded == 0 and same(before, after)
    draw_image(moved / "a.png", (80, 60), None, seed=9)
    after, _ = prepare(config_of(moved, tmp_path / "out", frames=[1, 17]), model)
    assert log_of(model) == {"loaded": 1, "media": 1}
    assert not torch.equal(before[0]["latents"], after[0]["latents"])


def test_another_encoder_never_reads_the_entries_of_this_one(tmp_path: Path, media: Path) -> None:
    class Other(Pool):
        def identity(self, part: str) -> str:
            return "other" if part == "media" else super().identity(part)

    config = config_of(media, tmp_path / "out", frames=[1, 17])
    prepare(config, Pool())
    model = Other(tmp_path / "log")
    prepare(config, model)
    assert log_of(model) == {"loaded": 1, "media": 6}


def test_every_sample_trains_at_every_resolution(tmp_path: Path, media: Path) -> None:
    samples, report = prepare(config_of(media, tmp_path / "out", resolutions=[32, 64], frames=[1, 17]), Pool())
    assert len(samples) == 12 and report.files == 6
    assert len({(e.path, e.bucket) for e in samples.entries}) == 12


def test_repeats_come_from_the_folder(tmp_path: Path) -> None:
    draw_image(tmp_path / "few" / "a.png")
    draw_image(tmp_path / "many" / "b.png")
    folders = [FolderConfig(path=str(tmp_path / "few"), repeats=5), FolderConfig(path=str(tmp_path / "many"))]
    samples, _ = prepare_data(config_of(tmp_path / "few", tmp_path / "out"), PicturePool(), folders, device=CPU)
    assert samples.repeats == [5, 1]


def spoil(media: Path) -> None:
    (media / "b.jpg").write_bytes((media / "b.jpg").read_bytes()[:400])
    (media / "c.txt").write_bytes(b"")
    (media / "d.txt").unlink()
    (media / "e.mp4").write_bytes(b"no video")
    (media / "notes.md").write_text("x")


def test_all_faults_are_told_at_once_after_everything_was_tried(tmp_path: Path, media: Path) -> None:
    spoil(media)
    config, model = config_of(media, tmp_path / "out", frames=[1, 81]), Pool(tmp_path / "log")
    with pytest.raises(MediaError) as told:
        prepare(config, model)
    text = str(told.value)
    assert "5 files are not usable" in text and "on_error to skip" in text
    for name in ("b.jpg", "c.txt", "d.txt", "e.mp4", "f.mp4"):
        assert name in text
    assert "81 frames" in text and "a.png" not in text and "notes.md" not in text
    assert log_of(model)["media"] == 1  # the good one stays cached
    with pytest.raises(MediaError):
        prepare(config, model)
    assert log_of(model)["media"] == 0


def test_skip_leaves_faulty_files_out_and_counts_them(tmp_path: Path, media: Path) -> None:
    spoil(media)
    samples, report = prepare(config_of(media, tmp_path / "out", frames=[1, 81], on_error="skip"), Pool())
    assert [e.path.name for e in samples.entries] == ["a.png"]
    assert len(report.faults) == 5 and report.files == 1
    lines = "\n".join(report.lines())
    assert "left out" in lines and "e.mp4" in lines and "1 x not media (.md)" in lines


def test_nothing_left_is_an_error_even_with_skip(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", caption=None)
    with pytest.raises(DiffpipeError, match="no sample is left"):
        prepare(config_of(tmp_path / "media", tmp_path / "out", on_error="skip"), Pool())


def test_a_family_of_images_sets_videos_aside_without_failing(tmp_path: Path, media: Path) -> None:
    samples, report = prepare(config_of(media, tmp_path / "out"), PicturePool())
    assert len(samples) == 4 and not report.faults
    assert "2 x a video, but this model family trains on images only" in "\n".join(report.lines())


def test_batches_are_of_one_bucket_and_give_the_same_samples(tmp_path: Path, media: Path) -> None:
    model = Pool(tmp_path / "log")
    one, _ = prepare(config_of(media, tmp_path / "one", frames=[1, 17]), model)
    four, _ = prepare(config_of(media, tmp_path / "four", frames=[1, 17], encode_batch=4), model)
    assert all(torch.allclose(one[i][n], four[i][n], atol=1e-6) for i in range(6) for n in one[i])


def test_progress_is_told(tmp_path: Path, media: Path) -> None:
    told: list[EncodeProgress] = []
    prepare(config_of(media, tmp_path / "out", frames=[1, 17]), Pool(), progress=told.append)
    last = {p.task: p for p in told}
    assert {task: (p.done, p.total) for task, p in last.items()} == {"scan": (6, 6), "encode media": (6, 6), "encode captions": (5, 5)}
    assert all(p.samples_per_second > 0 for p in told)


# -- several ranks, and ranks that die -------------------------------------------------------------------------------


def test_ranks_share_the_encoding_and_get_the_same_samples(tmp_path: Path, media: Path) -> None:
    alone, _ = prepare(config_of(media, tmp_path / "alone", frames=[1, 17]), Pool())
    model = Pool(tmp_path / "log")
    config = config_of(media, tmp_path / "shared", frames=[1, 17])
    got = together(3, lambda rank, exchange: prepare(config, model, rank=rank, world=3, exchange=exchange))
    assert log_of(model) == {"loaded": 3, "media": 6, "text": 5}
    for samples, report in got:
        assert same(samples, alone) and samples.entries == alone.entries and report.encoded == 11


def test_all_ranks_fail_alike_when_one_meets_a_fault(tmp_path: Path, media: Path) -> None:
    (media / "b.jpg").write_bytes((media / "b.jpg").read_bytes()[:400])
    config = config_of(media, tmp_path / "out", frames=[1, 17])
    got = together(2, lambda rank, exchange: prepare(config, Pool(), rank=rank, world=2, exchange=exchange))
    assert all(isinstance(g, MediaError) and "b.jpg" in str(g) for g in got) and str(got[0]) == str(got[1])


def test_ranks_without_a_common_cache_are_told(tmp_path: Path, media: Path) -> None:
    configs = [config_of(media, tmp_path / f"machine{r}", frames=[1, 17]) for r in range(2)]
    got = together(2, lambda rank, exchange: prepare(configs[rank], Pool(), rank=rank, world=2, exchange=exchange))
    assert all(isinstance(g, DiffpipeError) and "shared by all machines" in str(g) for g in got)


PROGRAM = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import drawn
from diffpipe import encode
from diffpipe.data import cache
class Slow(drawn.Pool):
    def encode_media(self, encoders, pixels):
        print("one", flush=True)
        time.sleep(0.05)
        return super().encode_media(encoders, pixels)
config = drawn.config_of(Path(sys.argv[2]), Path(sys.argv[3]), frames=[1, 17])
# Shards as often as a real run of minutes would finish them.
encode.ShardWriter = lambda folder: cache.ShardWriter(folder, seconds=0.2)
encode.prepare_data(config, Slow(), config.data.folders, device=torch.device("cpu"))
print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.timeout(300)
def test_caching_killed_and_started_again_gives_the_unbroken_runs_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    for i in range(30):
        draw_image(folder / f"{i:02}.png", (60 + i, 64), f"picture {i}", seed=i)
    unbroken, _ = prepare(config_of(folder, tmp_path / "unbroken", frames=[1, 17]), Pool())
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "tests"), str(folder), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for count, _ in enumerate(running.stdout):
            if count == 14:
                running.send_signal(signal.SIGKILL)
                break
    assert running.returncode == -signal.SIGKILL
    model = Pool(tmp_path / "log")
    resumed, report = prepare(config_of(folder, tmp_path / "killed", frames=[1, 17]), model)
    assert 5 <= report.reused <= 20 and log_of(model)["media"] == 30 - report.reused
    assert same(resumed, unbroken)


def test_a_cache_that_cannot_be_written_ends_caching_on_every_rank_with_the_cure(tmp_path: Path, media: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    config = config_of(media, tmp_path / "out", frames=[1, 17], cache_dir=str(blocked))
    got = together(2, lambda rank, exchange: prepare(config, Pool(), rank=rank, world=2, exchange=exchange))
    assert all(isinstance(g, DiffpipeError) and "data.cache_dir" in str(g) for g in got)


def test_a_damaged_shard_is_encoded_again_and_told(tmp_path: Path, media: Path) -> None:
    config = config_of(media, tmp_path / "out", frames=[1, 17])
    before, _ = prepare(config, Pool())
    [shard] = (tmp_path / "out" / "cache").glob("*.safetensors")
    del before
    shard.write_bytes(shard.read_bytes()[:-8])
    samples, report = prepare(config, Pool())
    assert report.damaged == [shard] and "damaged" in "\n".join(report.lines())
    assert len(samples) == 6 and samples[0]["latents"].isfinite().all()


def test_the_time_of_a_thousand_known_files_is_short(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    for i in range(1000):
        draw_image(folder / f"{i}.png", (16, 16), f"picture {i % 10}", seed=i)
    config = config_of(folder, tmp_path / "out", resolutions=[16])
    prepare(config, PicturePool())
    began = time.monotonic()
    samples, report = prepare(config, PicturePool())
    assert len(samples) == 1000 and report.encoded == 0 and Bucket(1, 16, 16) in report.buckets
    assert time.monotonic() - began < 5
