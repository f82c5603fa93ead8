"""Shows what a config's data become before anything is encoded: buckets, steps, captions, what is left out, and every crop."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from diffpipe.config.schema import Config, FolderBase
from diffpipe.data import images, media
from diffpipe.data.buckets import Bucket
from diffpipe.data.cache import Cache
from diffpipe.data.dataset import Sample
from diffpipe.data.sampler import StepSampler
from diffpipe.data.scan import Dropped, Remembered
from diffpipe.encode import cache_folder, look, place, prepare_data
from diffpipe.errors import told_of_disk
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel

TRAIN = "train"
PER_SHEET = 24
CELL = (220, 260)  # width and height of a picture's place on a sheet, its name included
ROWS = 6


@dataclass(frozen=True)
class BucketRow:
    """One bucket of a set.

    Attributes:
        samples: pictures and clips in it.
        shown: how often the first epoch shows them together.
        steps: of the first epoch.
        leftover: showings that fill no batch in the first epoch and open the next one.
    """

    bucket: Bucket
    samples: int
    shown: int = 0
    steps: int = 0
    leftover: int = 0


@dataclass(frozen=True)
class Survey:
    """What one set of folders holds.

    Attributes:
        trains: whether it is the set that is trained on.
        buckets: with what an epoch does with them, where it is.
        words: of each sample's first caption.
        captionless, maskless: names of files without a caption, and without the mask that others of their folder have.
        fps: rate that clips are taken at, None where the family takes none.
    """

    name: str
    trains: bool
    fps: float | None
    samples: list[Sample]
    buckets: list[BucketRow]
    dropped: list[Dropped]
    captionless: list[str]
    maskless: list[str]
    words: list[int]

    @property
    def steps(self) -> int:
        return sum(b.steps for b in self.buckets)

    def caption_lines(self) -> list[str]:
        """How long captions are, for a person."""
        if not self.words:
            return []
        spread = f"{min(self.words)} to {max(self.words)} words, median {statistics.median(self.words):g}"
        several = sum(len(s.captions) > 1 for s in self.samples)
        return [f"captions: {spread}" + (f"; {several} samples have several" if several else "")]


def survey(config: Config) -> list[Survey]:
    """What training and held-out sets hold, by the config's own rules; nothing is encoded.

    Raises:
        DiffpipeError: when a folder is missing or holds no media.
    """
    model = make_model(config.model, config.objective)
    return [_survey(name, folders, config, model) for name, folders in _sets(config)]


def _survey(name: str, folders: list[FolderBase], config: Config, model: DiffusionModel) -> Survey:
    memory = Remembered(cache_folder(config) / "files.json")
    found = look(config, model, folders, memory)
    memory.save(found.clips)
    samples, misplaced = place(found.clips, config, model, folders)
    return Survey(
        name=name,
        trains=name == TRAIN,
        fps=model.geometry.fps,
        samples=samples,
        buckets=_epoch(samples, config) if name == TRAIN else [BucketRow(b, len(held)) for b, held in _by_bucket(samples)],
        dropped=found.dropped + misplaced,
        captionless=[f.name for f in found.captionless],
        maskless=[f.name for f in found.maskless],
        words=[len(s.captions[0].split()) for s in samples],
    )


def _epoch(samples: list[Sample], config: Config) -> list[BucketRow]:
    if not samples:
        return []
    sampler = StepSampler(
        [s.bucket for s in samples],
        [s.repeats for s in samples],
        micro=config.batch.micro,
        accumulate=config.batch.accumulate * config.mesh.replicas,
        seed=config.run.seed,
    )
    group = config.batch.micro * config.batch.accumulate * config.mesh.replicas
    steps = Counter(step.bucket for step in (next(sampler) for _ in range(sampler.steps_in_epoch)))
    left = Counter(samples[e.sample].bucket for e in sampler.left)
    held = Counter(s.bucket for s in samples)
    return [BucketRow(b, held[b], steps[b] * group + left[b], steps[b], left[b]) for b in sorted(held)]


def contact_sheets(survey: Survey, folder: Path) -> list[Path]:
    """A picture for each bucket with what it crops: every sample as it is, and what the bucket shows of it in a frame.

    Args:
        folder: where ``SET-BUCKET.jpg`` go.
    """
    return [
        _saved(folder / f"{survey.name}-{bucket}.jpg", [(_framed(s, survey.fps), _title(s)) for s in _spread(samples, PER_SHEET)])
        for bucket, samples in _by_bucket(survey.samples)
    ]


def decoded_sheets(config: Config, folder: Path, device: torch.device) -> list[Path]:
    """A picture for each bucket with what its latents hold, decoded; of clips their first, middle and last frame.

    What the cache lacks is encoded first, as training would.

    Args:
        folder: where ``SET-BUCKET-decoded.jpg`` go.
    """
    model = make_model(config.model, config.objective)
    held = [(name, prepare_data(config, model, folders, device=device)[0].entries) for name, folders in _sets(config)]
    encoders = model.load_encoders(device)
    cache = Cache(cache_folder(config))
    paths = []
    for name, entries in held:
        for bucket, samples in _by_bucket(entries):
            cells = []
            if bucket.frames > 1 and hasattr(encoders.vae, "enable_tiling"):
                encoders.vae.enable_tiling()  # a whole clip at once may not fit
            for sample in _spread(samples, PER_SHEET if bucket.frames == 1 else PER_SHEET // 3):
                with torch.inference_mode():
                    pixels = model.decode_media(encoders, cache[sample.media]["latents"][None])[0]
                shown = sorted({0, pixels.shape[1] // 2, pixels.shape[1] - 1})
                cells += [(to_picture(pixels[:, f]), f"{_title(sample)}\nframe {f}" if f else _title(sample)) for f in shown]
            paths.append(_saved(folder / f"{name}-{bucket}-decoded.jpg", cells))
    return paths


def _saved(path: Path, cells: list[tuple[Image.Image, str]]) -> Path:
    picture = sheet(cells)
    with told_of_disk(f"{path.name} cannot be written", str(path.parent), "name another folder with --output, or free some space"):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    return path


def _sets(config: Config) -> list[tuple[str, list[FolderBase]]]:
    return [(TRAIN, [*config.data.folders]), *((s.name, [*s.folders]) for s in config.eval.sets)]


def _by_bucket(samples: Sequence[Sample]) -> list[tuple[Bucket, list[Sample]]]:
    found: dict[Bucket, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.bucket].append(sample)
    return sorted(found.items())


def _spread(samples: list[Sample], most: int) -> list[Sample]:
    """At most so many of them, from the first to near the last."""
    return samples[:: -(-len(samples) // most)]


def sheet(cells: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures with their names in rows."""
    columns = min(ROWS, len(cells))
    rows = -(-len(cells) // columns)
    whole = Image.new("RGB", (columns * CELL[0], rows * CELL[1]), "white")
    pen = ImageDraw.Draw(whole)
    for i, (picture, title) in enumerate(cells):
        left, top = i % columns * CELL[0], i // columns * CELL[1]
        small = ImageOps.contain(picture, (CELL[0] - 10, CELL[1] - 54), Image.Resampling.LANCZOS)
        whole.paste(small, (left + (CELL[0] - small.width) // 2, top + 4))
        for line, text in enumerate(title.splitlines()[:3]):
            pen.text((left + 6, top + CELL[1] - 46 + 15 * line), text, fill="black")
    return whole


def _framed(sample: Sample, fps: float | None) -> Image.Image:
    """The sample's first frame with its crop: what is cut off is dimmed, what trains has a frame."""
    height, width = sample.source
    picture = _first_frame(sample, fps)
    box = images.crop_of(width, height, (sample.bucket.width, sample.bucket.height))
    scale = picture.width / width
    left, top, right, bottom = (round(v * scale) for v in box)
    dimmed = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.6)
    dimmed.paste(picture.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(dimmed).rectangle((left, top, right - 1, bottom - 1), outline=(230, 30, 30), width=3)
    return dimmed


def _first_frame(sample: Sample, fps: float | None) -> Image.Image:
    height, width = sample.source
    small = min(1.0, 640 / max(width, height))
    size = Bucket(1, max(1, round(height * small)), max(1, round(width * small)))
    pixels = media.read(sample.file, size, None if sample.start is None else fps, sample.start or 0.0)
    return to_picture(pixels[:, 0])


def to_picture(pixels: Tensor) -> Image.Image:
    """Pixels C H W, held to [-1, 1]."""
    return Image.fromarray(pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())


def _title(sample: Sample) -> str:
    name = sample.file.name
    when = "" if sample.start is None else f" at {sample.start:.2f} s"
    return f"{name[-30:]}{when}\n{sample.captions[0][:34]}"
