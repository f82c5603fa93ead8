"""What act one promises: every file a sample or a reason, nothing encoded twice, nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from diffpipe.config.schema import Config, FolderConfig
from diffpipe.data.buckets import Bucket
from diffpipe.data.dataset import Samples, stack
from diffpipe.encode import Report, prepare_data
from diffpipe.errors import ConfigError, DiffpipeError, MediaError
from diffpipe.flow import Key
from diffpipe.metrics import Progress
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
    rows = [(row(a, i), row(b, i)) for i in range(min(len(a), len(b)))]
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in rows)


def row(samples: Samples, index: int) -> dict[str, torch.Tensor]:
    return samples.read(index, Key(0, 0, index, 0))


def test_images_and_videos_become_samples_of_one_run(tmp_path: Path, media: Path) -> None:
    samples, report = prepare(config_of(media, tmp_path / "out", frames=[1, 17, 33]), Pool())
    assert [e.file.name for e in samples.entries] == ["a.png", "b.jpg", "c.webp", "d.png", "e.mp4", "f.mp4"]
    assert [b.frames for b in samples.buckets] == [1, 1, 1, 1, 17, 33]
    assert row(samples, 5)["latents"].shape[:2] == (3, 9)
    assert row(samples, 1)["text"][0] == ord("a")
    batch = stack([row(samples, 0), row(samples, 3)])
    assert batch["latents"].shape[0] == batch["text"].shape[0] == 2
    assert (report.files, report.samples, report.encoded, report.reused) == (6, 6, 6 + 5, 0)


def test_latents_are_those_of_the_pixels_on_disk(tmp_path: Path, media: Path) -> None:
    samples, _ = prepare(config_of(media, tmp_path / "out", frames=[1, 17]), Pool())
    blue = [(row(samples, i)["latents"][2].mean().item() + 1) * 127.5 for i in (0, 3)]
    assert blue == pytest.approx([37, 37 * 4], abs=1)
    grey = (row(samples, 4)["latents"].mean((0, 2, 3)) + 1) * 127.5
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
    assert samples.entries[0].captions[0] == "a red fox"


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
    assert not torch.equal(row(before, 0)["latents"], row(after, 0)["latents"])


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
    assert len({(e.file, e.bucket) for e in samples.entries}) == 12


def test_repeats_come_from_the_folder(tmp_path: Path) -> None:
    draw_image(tmp_path / "few" / "a.png")
    draw_image(tmp_path / "many" / "b.png")
    folders = [FolderConfig(path=str(tmp_path / "few"), repeats=5), FolderConfig(path=str(tmp_path / "many"))]
    samples, _ = prepare_data(config_of(tmp_path / "few", tmp_path / "out"), PicturePool(), folders, device=CPU)
    assert samples.repeats == [5, 1]


def spoil(media: Path) -> None:
    (media / "b.jpg").write_bytes((media / "b.jpg").read_bytes()[:400])
    (media / "c.txt").write_bytes(b"")
    (media / "d.png").write_bytes(b"")
    (media / "e.mp4").write_bytes(b"no video")
    (media / "notes.md").write_text("x")


def test_all_faults_are_told_at_once_after_everything_was_tried(tmp_path: Path, media: Path) -> None:
    spoil(media)
    config, model = config_of(media, tmp_path / "out", frames=[1, 81]), Pool(tmp_path / "log")
    with pytest.raises(MediaError) as told:
        prepare(config, model)
    text = str(told.value)
    assert "5 files are not usable" in text and "on_error to skip" in text
    for name in ("b.jpg", "c.txt", "d.png", "e.mp4", "f.mp4"):
        assert name in text
    assert "81 frames" in text and "a.png" not in text and "notes.md" not in text
    assert log_of(model)["media"] == 1  # the good one stays cached
    with pytest.raises(MediaError):
        prepare(config, model)
    assert log_of(model)["media"] == 0


def test_skip_leaves_faulty_files_out_and_counts_them(tmp_path: Path, media: Path) -> None:
    spoil(media)
    samples, report = prepare(config_of(media, tmp_path / "out", frames=[1, 84], on_error="skip"), Pool())
    assert [e.file.name for e in samples.entries] == ["a.png"]
    assert "data.frames: 84 is 81 here" in "\n".join(report.lines())
    assert len(report.faults) == 5 and report.files == 1
    lines = "\n".join(report.lines())
    assert "left out" in lines and "e.mp4" in lines and "1 x not media (.md)" in lines


def test_nothing_left_is_an_error_even_with_skip(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png").write_bytes(b"")
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
    assert all(torch.allclose(row(one, i)[n], row(four, i)[n], atol=1e-6) for i in range(6) for n in row(one, i))


def test_progress_is_told_to_the_end_also_of_files_that_are_left_out(tmp_path: Path, media: Path) -> None:
    (media / "b.jpg").write_bytes((media / "b.jpg").read_bytes()[:-200])
    told: list[Progress] = []
    prepare(config_of(media, tmp_path / "out", frames=[1, 17], on_error="skip"), Pool(), progress=told.append)
    last = {p.task: p for p in told}
    assert {task: (p.done, p.total) for task, p in last.items()} == {"scan": (6, 6), "encode media": (6, 6), "encode captions": (5, 5)}


# -- several ranks, and ranks that die -------------------------------------------------------------------------------


def test_ranks_share_the_encoding_and_get_the_same_samples(tmp_path: Path, media: Path) -> None:
    alone, _ = prepare(config_of(media, tmp_path / "alone", frames=[1, 17]), Pool())
    model = Pool(tmp_path / "log")
    config = config_of(media, tmp_path / "shared", frames=[1, 17])
    told: list[list[Progress]] = [[], [], []]
    got = together(3, lambda rank, exchange: prepare(config, model, rank=rank, world=3, exchange=exchange, progress=told[rank].append))
    assert log_of(model) == {"loaded": 3, "media": 6, "text": 5}
    for samples, report in got:
        assert same(samples, alone) and samples.entries == alone.entries and report.encoded == 11
    # Each is told of the end once, whoever was last.
    for each in told:
        for task, total in (("encode media", 6), ("encode captions", 5)):
            *before, last = [p for p in each if p.task == task]
            assert last.done == last.total == sum(last.by_rank) == total and len(last.by_rank) == 3
            assert all(p.done < total for p in before)


def test_all_ranks_fail_alike_when_one_meets_a_fault(tmp_path: Path, media: Path) -> None:
    (media / "b.jpg").write_bytes((media / "b.jpg").read_bytes()[:400])
    config = config_of(media, tmp_path / "out", frames=[1, 17])
    got = together(2, lambda rank, exchange: prepare(config, Pool(), rank=rank, world=2, exchange=exchange))
    assert all(isinstance(g, MediaError) and "b.jpg" in str(g) for g in got) and str(got[0]) == str(got[1])


def test_ranks_without_a_common_cache_encode_everything_each(tmp_path: Path, media: Path) -> None:
    configs = [config_of(media, tmp_path / f"machine{r}", frames=[1, 17]) for r in range(2)]
    got = together(2, lambda rank, exchange: prepare(configs[rank], Pool(), rank=rank, world=2, exchange=exchange))
    assert same(got[0][0], got[1][0]) and len(got[0][0]) == 6


def test_workers_decode_what_one_process_would(tmp_path: Path, media: Path) -> None:
    (media / "b.jpg").write_bytes((media / "b.jpg").read_bytes()[:400])
    settings = {"frames": [1, 17], "on_error": "skip"}
    alone, told = prepare(config_of(media, tmp_path / "alone", **settings), Pool())
    shared, report = prepare(config_of(media, tmp_path / "shared", encode_workers=2, **settings), Pool())
    assert same(alone, shared) and report.dropped == told.dropped


def test_a_worker_that_is_killed_ends_caching_with_the_cure_and_keeps_what_was_encoded(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    for i in range(40):
        draw_image(folder / f"{i:02}.png", (64, 64), f"picture {i}", seed=i)

    class Killer(Pool):
        def encode_media(self, encoders: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            for process in psutil.Process().children(recursive=True):
                if process.ppid() != os.getpid():  # workers are children of the server they are forked from
                    process.kill()
            return super().encode_media(encoders, pixels)

    config = config_of(folder, tmp_path / "out", encode_workers=1)
    with pytest.raises(DiffpipeError, match=r"data\.encode_workers: a worker process was ended from outside"):
        prepare(config, Killer())
    _, report = prepare(config_of(folder, tmp_path / "out"), Pool())
    assert len(report.dropped) == 0 and report.samples == 40


def test_variants_masks_and_the_empty_caption_are_cached_once(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", (64, 64), "red, fox, wood, snow")
    draw_image(tmp_path / "media" / "b.png", (64, 64), "dog", seed=2)
    draw_image(tmp_path / "masks" / "a.png", (64, 64), None)
    folder = {"path": str(tmp_path / "media"), "masks": str(tmp_path / "masks")}
    captions = {"prefix": "photo: ", "shuffle": 3, "keep": 1, "dropout": 0.1}
    config = config_of(tmp_path / "media", tmp_path / "out", folders=[folder], captions=captions)
    samples, report = prepare(config, Pool(tmp_path / "log"))
    shown = samples.entries[0].captions
    assert len(shown) == 3 and all(c.startswith("photo: red, ") for c in shown)
    assert {tuple(sorted(c.removeprefix("photo: ").split(", "))) for c in shown} == {("fox", "red", "snow", "wood")}
    assert samples.entries[1].captions == ("photo: dog",)
    assert report.encoded == 2 + 1 + 3 + 1 + 1  # pictures, a mask, variants, the other caption, the empty one
    assert row(samples, 0)["mask"].shape == (1, 8, 8) and row(samples, 1)["mask"].eq(1).all()
    again, second = prepare(config, Pool(tmp_path / "log"))
    assert second.encoded == 0 and [e.captions for e in again.entries] == [e.captions for e in samples.entries]


def test_a_mask_of_another_size_is_a_fault_of_its_picture(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", (64, 64))
    draw_image(tmp_path / "masks" / "a.png", (32, 64), None)
    folder = {"path": str(tmp_path / "media"), "masks": str(tmp_path / "masks")}
    with pytest.raises(MediaError, match=r"a\.png: a\.png: a mask of 32x64 for a picture of 64x64"):
        prepare(config_of(tmp_path / "media", tmp_path / "out", folders=[folder]), Pool())


class Editing(PicturePool):
    takes_controls = True


def controlled(tmp_path: Path, **data: Any) -> Config:
    folder = {"path": str(tmp_path / "media"), "controls": str(tmp_path / "controls")}
    return config_of(tmp_path / "media", tmp_path / "out", folders=[folder], **data)


def test_a_control_is_encoded_at_its_pictures_size_and_comes_with_it(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", (80, 60), "red")
    draw_image(tmp_path / "media" / "b.png", (64, 64), "blue", seed=1)
    draw_image(tmp_path / "controls" / "a.jpg", (160, 120), None, seed=2)
    draw_image(tmp_path / "controls" / "b.png", (64, 64), None, seed=1)  # the picture itself
    samples, report = prepare(controlled(tmp_path), Editing(tmp_path / "log"))
    assert report.encoded == 3 + 2 and log_of(Editing(tmp_path / "log"))["media"] == 3
    for i, entry in enumerate(samples.entries):
        read = row(samples, i)
        assert read["control_latents"].shape == read["latents"].shape == (3, 1, entry.bucket.height // 8, entry.bucket.width // 8)
        assert torch.equal(read["control_latents"], read["latents"]) is (entry.file.name == "b.png")
    assert len(samples.keys()) == 5


def test_a_picture_without_its_control_is_a_fault_and_a_control_without_a_picture_is_counted(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", (64, 64), "red")
    draw_image(tmp_path / "media" / "b.png", (64, 64), "blue", seed=1)
    draw_image(tmp_path / "media" / "c.png", (64, 64), "green", seed=2)
    draw_image(tmp_path / "controls" / "a.png", (64, 64), None, seed=3)
    draw_image(tmp_path / "controls" / "other.png", (64, 64), None, seed=3)
    (tmp_path / "controls" / "c.png").write_bytes((tmp_path / "media" / "c.png").read_bytes()[:-200])
    samples, report = prepare(controlled(tmp_path, on_error="skip"), Editing())
    told = "\n".join(report.lines())
    assert len(samples) == 1
    assert re.search(r"left out: .*b\.png: has no control picture, expected one called b in", told)
    assert re.search(r"left out: .*media.c\.png: c\.png: ", told)
    assert "not used: 1 x a control without media" in told


def test_controls_belong_to_families_that_take_them(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", (64, 64), "red")
    draw_image(tmp_path / "controls" / "a.png", (64, 64), None)
    with pytest.raises(ConfigError, match=r"data\.folders\.controls: pool has no use for control pictures"):
        prepare(controlled(tmp_path), PicturePool())
    with pytest.raises(ConfigError, match=r"data\.folders\.controls: pool needs control pictures, and .*media names none"):
        prepare(config_of(tmp_path / "media", tmp_path / "out"), Editing())


def test_what_two_files_alike_share_is_a_fault_of_both(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png", (64, 64), "red")
    bad = draw_image(tmp_path / "media" / "b.jpg", (64, 64), "blue", seed=1)
    bad.write_bytes(bad.read_bytes()[:-200])
    (tmp_path / "media" / "c.jpg").write_bytes(bad.read_bytes())
    samples, report = prepare(config_of(tmp_path / "media", tmp_path / "out", on_error="skip"), PicturePool())
    assert len(samples) == 1 and [d.file.name for d in report.faults] == ["b.jpg", "c.jpg"]


def test_a_folders_keys_take_the_place_of_datas(tmp_path: Path) -> None:
    draw_image(tmp_path / "one" / "a.png", (64, 64), "x")
    draw_image(tmp_path / "two" / "b.png", (64, 64), "y")
    folders = [{"path": str(tmp_path / "one"), "resolutions": [32]}, {"path": str(tmp_path / "two"), "captions": {"prefix": "z "}}]
    samples, _ = prepare(config_of(tmp_path / "one", tmp_path / "out", folders=folders, captions={"prefix": "w "}), Pool())
    assert [(str(e.bucket), e.captions) for e in samples.entries] == [("1x32x32", ("w x",)), ("1x64x64", ("z y",))]


def test_a_video_too_short_for_one_folders_buckets_trains_where_it_fits_as_do_its_other_parts(tmp_path: Path) -> None:
    draw_clip(tmp_path / "media" / "a.mp4", 20, 16, caption=None)
    rows = [{"file_name": "a.mp4", "text": "one"}, {"file_name": "a.mp4", "text": "two", "start": 1, "end": 1.125}]
    (tmp_path / "media" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folders = [{"path": str(tmp_path / "media"), "frames": frames} for frames in ([17], [33])]
    samples, report = prepare(config_of(tmp_path / "media", tmp_path / "out", folders=folders, on_error="skip"), Pool())
    assert [(e.captions, e.bucket.frames) for e in samples.entries] == [(("one",), 17)]
    part = "its part from 1 s to 1.125 s has 2"
    assert [d.reason.partition(" frames")[0] for d in report.faults] == [part, "a video of 20", part]


@pytest.mark.parametrize(("clips", "starts"), [("first", [0]), ("middle", [12]), ("all", [0, 17, 34]), ("cover", [0, 12, 25])])
def test_clips_are_cut_out_of_a_longer_video(tmp_path: Path, clips: str, starts: list[int]) -> None:
    draw_clip(tmp_path / "media" / "a.mp4", 42, 16)  # frame i is grey of value 4 i
    samples, _ = prepare(config_of(tmp_path / "media", tmp_path / "out", frames=[5, 17], clips=clips), Pool())
    entries = sorted(range(len(samples)), key=lambda i: samples.entries[i].start or 0)
    first = [round((row(samples, i)["latents"][0, 0].mean().item() + 1) * 127.5 / 4) for i in entries]
    assert first == pytest.approx(starts, abs=1)
    assert [samples.entries[i].bucket.frames for i in entries] == ([17, 17, 5] if clips == "all" else [17] * len(starts))


PROGRAM = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import drawn
from diffpipe import encode, encoder
from diffpipe.data import cache
class Slow(drawn.Pool):
    def encode_media(self, encoders, pixels):
        print("one", flush=True)
        time.sleep(0.05)
        return super().encode_media(encoders, pixels)
config = drawn.config_of(Path(sys.argv[2]), Path(sys.argv[3]), frames=[1, 17])
# Shards as often as a real run of minutes would finish them.
encoder.ShardWriter = lambda folder: cache.ShardWriter(folder, seconds=0.2)
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
    assert len(samples) == 6 and row(samples, 0)["latents"].isfinite().all()


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
