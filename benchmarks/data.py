"""How fast data are found, read and encoded again, beside what others do. Ratios count; absolute times are one machine's.

python benchmarks/data.py cache   [--entries 1000000]   # needs: pip install datasets
python benchmarks/data.py recache [--captions 10000]
python benchmarks/data.py decode
python benchmarks/data.py loader
python benchmarks/data.py reading
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffpipe.config.load import load_config  # noqa: E402
from diffpipe.config.schema import Config, ModelConfig, ObjectiveConfig  # noqa: E402
from diffpipe.data.buckets import Bucket  # noqa: E402
from diffpipe.data.cache import Cache, ShardWriter, key_of  # noqa: E402
from diffpipe.data.dataset import Sample, Samples  # noqa: E402
from diffpipe.data.feed import Feed  # noqa: E402
from diffpipe.data.files import File  # noqa: E402
from diffpipe.data.loader import make_loader  # noqa: E402
from diffpipe.data.media import probe, read  # noqa: E402
from diffpipe.data.sampler import StepSampler  # noqa: E402
from diffpipe.encode import prepare_data  # noqa: E402
from diffpipe.metrics import Sink, StepRecord  # noqa: E402
from diffpipe.models import make_model  # noqa: E402
from diffpipe.toy import materialize  # noqa: E402
from diffpipe.toy.media import draw, write_clip  # noqa: E402
from diffpipe.train import train  # noqa: E402

STEP = 0.565  # seconds, Flux at 1024x1024 in fp8 as benchmarks/RESULTS.md has it
SHAPE = (4, 8, 8)  # a latent of 1 KiB, so that finding it is what takes time


def timed(what: Callable[[], object]) -> float:
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def drop_page_cache() -> None:
    """Make the next read come from the disk, where this user may ask for it."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def cache(entries: int, reads: int, work: Path) -> None:
    """Open time and random reads of our cache, an Arrow table of the datasets library, and a file for each sample."""
    import datasets

    values = torch.randn(256, *SHAPE)
    keys = [key_of(str(i)) for i in range(entries)]
    ours, arrow, files = work / "ours", work / "arrow", work / "files"
    with ShardWriter(ours, seconds=1e9) as writer:
        for i, key in enumerate(keys):
            writer.add(key, {"latents": values[i % 256]})
    Cache(ours).write_index()

    def rows() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"latents": values[i % 256].numpy()} for i in range(entries))

    features = datasets.Features({"latents": datasets.Array3D(SHAPE, "float32")})
    datasets.Dataset.from_generator(rows, features=features, cache_dir=str(work / "hf")).save_to_disk(arrow)
    for i, key in enumerate(keys):
        place = files / key[:2]
        place.mkdir(parents=True, exist_ok=True)
        torch.save(values[i % 256].clone(), place / f"{key}.pt")

    picks = random.Random(0).sample(range(entries), reads)
    program = {
        "diffpipe": "from diffpipe.data.cache import Cache\nfrom pathlib import Path\nopened = Cache(Path(sys.argv[1]))\n"
        "assert not opened.missing(keys)\nread = lambda i: opened[keys[i]]['latents'].clone()",
        "datasets Arrow": "import datasets\nopened = datasets.load_from_disk(sys.argv[1]).with_format('torch')\n"
        "read = lambda i: opened[i]['latents']",
        "a file each": "import torch, os\nread = lambda i: torch.load(os.path.join(sys.argv[1], keys[i][:2], keys[i] + '.pt'))\n"
        "known = {f[:-3] for d in os.scandir(sys.argv[1]) for f in os.listdir(d.path)}\nassert known.issuperset(keys)",
    }
    (work / "keys.json").write_text(json.dumps(keys))
    (work / "picks.json").write_text(json.dumps(picks))
    print(f"{entries} entries of 1 KiB; {reads} random reads; each in a process of its own, imports not counted")
    for name, folder in (("diffpipe", ours), ("datasets Arrow", arrow), ("a file each", files)):
        for state in ("cold", "warm"):
            if state == "cold":
                drop_page_cache()
            lines = [
                "import sys, json, time",
                f"sys.path.insert(0, {str(ROOT)!r})",
                "import torch, numpy",
                "import diffpipe.data.cache" if name == "diffpipe" else "import datasets" if name.startswith("data") else "",
                "keys, picks = json.load(open(sys.argv[2])), json.load(open(sys.argv[3]))",
                "begun = time.perf_counter()",
                program[name],
                "opened_in = time.perf_counter() - begun",
                "begun = time.perf_counter()",
                "for i in picks: read(i)",
                "print(opened_in, len(picks) / (time.perf_counter() - begun))",
            ]
            arguments = [sys.executable, "-c", "\n".join(lines), str(folder), str(work / "keys.json"), str(work / "picks.json")]
            opened, rate = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
            print(f"{name:16} {state}: opened, all keys found in {float(opened):7.3f} s, {float(rate):9.0f} reads/s", flush=True)


def recache(captions: int, work: Path) -> None:
    """Time of caching many pictures, of the same again, and of the same with one caption edited."""
    from PIL import Image

    folder = work / "pictures"
    folder.mkdir()
    for i in range(captions):
        Image.fromarray(np.full((64, 64, 3), (i % 256, i // 256 % 256, 7), np.uint8)).save(folder / f"{i:06}.png")
        (folder / f"{i:06}.txt").write_text(f"a red circle {i}")
    config = materialize(
        Config.model_validate(
            {
                "output_dir": work / "out",
                "run": {"steps": 1},
                "model": {"family": "flux", "path": "toy:flux", "dtype": "float32"},
                "data": {"folders": [{"path": str(folder)}], "resolutions": [64], "encode_batch": 16, "encode_workers": 0},
            }
        )
    )

    def run() -> None:
        model = make_model(config.model, config.objective)
        _, report = prepare_data(config, model, config.data.folders, device=torch.device("cpu"))
        print(f"  {report.encoded} encoded, {report.reused} reused", flush=True)

    first, again = timed(run), timed(run)
    (folder / "000042.txt").write_text("a blue square")
    edited = timed(run)
    print(f"{captions} pictures with captions of their own: first {first:.1f} s, again {again:.2f} s, after one edit {edited:.2f} s")
    print(f"an edit costs {edited / first:.2%} of encoding everything")


PEAK = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"


def decode(work: Path) -> None:
    """Frames of a clip out of a long video, beside decoding the whole file, and the memory of both."""
    frames, fps = 3000, 25
    file = work / "long.mp4"
    write_clip(file, (draw("circle", "red", "blue", (640, 360), (100 + i % 400, 180), 60) for i in range(frames)), fps)
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport av\n"
    programs = {
        "the whole file": "kept = [f.to_ndarray(format='rgb24') for f in av.open(sys.argv[1]).decode(video=0)]\nassert len(kept) == 3000",
        "diffpipe": "from pathlib import Path\nfrom diffpipe.data.files import File\nfrom diffpipe.data.videos import read\n"
        "read(File(Path(sys.argv[1])), 81, (448, 256), 16.0, 100.0)",
        "nothing": "from pathlib import Path\nfrom diffpipe.data.files import File\nfrom diffpipe.data.videos import read",
    }
    print(f"a {frames / fps:.0f} s video of 640x360; 81 frames of 448x256 at 16 fps from second 100 on")
    for name, program in programs.items():
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", start + program + PEAK, file], check=True, capture_output=True, text=True)
        print(f"{name:16} {time.perf_counter() - begun:6.2f} s, peak {int(done.stdout) / 1024:6.0f} MiB", flush=True)
    print(f"probe: {timed(lambda: probe(File(file))):.3f} s; clip of 81 frames: ", end="")
    print(", ".join(f"at {s} s {timed(lambda s=s: read(File(file), Bucket(81, 256, 448), 16.0, s)):.2f} s" for s in (0.0, 30.0, 100.0)))


class _Times(Sink):
    """A sink that keeps what each step took and how long it waited for data."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append((record.step_time, record.split.data))


def loader(work: Path) -> None:
    """How much of a step waits for data, with everything cached."""
    for workers in (0, 2):
        settings = [f"output_dir={work}", "mesh.stages=1", "run.steps=60", f"data.workers={workers}", "eval.sets=[]"]
        config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
        times = _Times()
        train(config, resume=None, make_sinks=lambda sink=times: [sink])
        steps = times.steps[5:]
        whole, waited = (sum(s[i] for s in steps) for i in (0, 1))
        print(
            f"{workers} workers: {len(steps)} steps of {whole / len(steps):.3f} s, {waited / whole:.2%} of it waiting for data", flush=True
        )


def reading(work: Path) -> None:
    """What a step waits for data of real size (Flux at 1024x1024, captions of 512 tokens) beside a step of an H100's length."""
    model = make_model(ModelConfig(family="flux"), ObjectiveConfig())
    entries: list[Sample] = []
    with ShardWriter(work) as writer:
        for i in range(64):
            media, text = key_of("media", str(i)), key_of("text", str(i))
            writer.add(media, {"latents": torch.randn(16, 128, 128)})
            writer.add(text, {"text": torch.randn(512, 4096).bfloat16(), "pooled": torch.randn(768).bfloat16()})
            entries.append(Sample(File(work / f"{i}.png"), ("",), Bucket(1, 1024, 1024), 1.0, media, (text,)))
    samples = Samples(entries, Cache(work))
    sampler = StepSampler(samples.buckets, samples.repeats, micro=1, accumulate=1, seed=0)
    for workers in (0, 2):
        feed = Feed(make_loader(samples, sampler, model, micro=1, seed=0, workers=workers), torch.device("cpu"))
        waited = 0.0
        for step in range(35):
            took = timed(lambda feed=feed: next(feed))
            feed.fetch_ahead()
            time.sleep(STEP)  # the card computes, the process has nothing to do
            waited += took if step >= 5 else 0.0
        print(f"{workers} workers: {waited / 30 * 1000:.1f} ms a step, {waited / 30 / (STEP + waited / 30):.2%} of it", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=["cache", "recache", "decode", "loader", "reading"])
    options.add_argument("--entries", type=int, default=1_000_000)
    options.add_argument("--reads", type=int, default=20_000)
    options.add_argument("--captions", type=int, default=10_000)
    given = options.parse_args()
    work = Path(tempfile.mkdtemp(prefix="diffpipe-bench-"))
    try:
        if given.what == "cache":
            cache(given.entries, given.reads, work)
        elif given.what == "recache":
            recache(given.captions, work)
        elif given.what == "loader":
            loader(work)
        elif given.what == "reading":
            reading(work)
        else:
            decode(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
