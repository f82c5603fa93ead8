"""Finds the captions of media files, and makes the variants of a caption that a run shows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import PurePath
from typing import Any

from diffpipe.config.schema import CaptionConfig
from diffpipe.data.files import File
from diffpipe.errors import MediaError

LISTS = ("captions.json", "metadata.jsonl")
TEXTS = ("text", "caption", "captions", "prompt")  # what the rows of metadata.jsonl call it


@dataclass(frozen=True)
class Span:
    """A part of a video with captions of its own.

    Attributes:
        start, end: seconds; None is the beginning or the end of the file.
        texts: its captions, one of which is shown at a time.
    """

    texts: tuple[str, ...]
    start: float | None = None
    end: float | None = None


@dataclass
class Captions:
    """The captions of a folder, or of a tar file.

    Attributes:
        beside: caption files by (folder, stem).
        listed: by the folder of captions.json and metadata.jsonl, spans by file name as they have it.
    """

    beside: dict[tuple[str, str], File] = field(default_factory=dict)
    listed: dict[PurePath, dict[str, list[Span]]] = field(default_factory=dict)

    def of(self, file: File, config: CaptionConfig) -> list[Span]:
        """The spans of a media file with their captions; no span at all where it has no caption.

        A file of the same stem comes first, then the lists of its folder and of those around it, by path from there or by name.

        Raises:
            MediaError: when its caption is empty or not UTF-8.
        """
        own = self.beside.get((file.folder, file.stem))
        if own is not None:
            return [Span((read_text(own),))] if own.suffix == config.extension else _of_json(own)
        inside = PurePath(file.folder)
        for folder in (inside, *inside.parents):
            rows = self.listed.get(folder, {})
            for name in ((inside / file.name).relative_to(folder).as_posix(), file.name):
                if name in rows:
                    return rows[name]
        return []


def collect(files: Iterable[File], config: CaptionConfig) -> Captions:
    """The captions among files of one folder.

    Raises:
        MediaError: when a list of captions cannot be read.
    """
    found = Captions()
    for file in files:
        if file.suffix == config.extension or (file.member and file.suffix == ".json"):
            known = found.beside.get((file.folder, file.stem))
            if known is None or known.suffix != config.extension:
                found.beside[file.folder, file.stem] = file
        if file.name in LISTS:
            read = _read_captions if file.name == LISTS[0] else _read_metadata
            rows = found.listed.setdefault(PurePath(file.folder), {})
            for name, spans in read(file).items():
                rows.setdefault(name, []).extend(spans)
    return found


def is_caption(file: File, config: CaptionConfig) -> bool:
    """Whether a file holds captions rather than media."""
    return file.name in LISTS or file.suffix == config.extension or (bool(file.member) and file.suffix == ".json")


def variants(text: str, config: CaptionConfig) -> list[str]:
    """What is shown of a caption: with its prefix, and as many orders of its tags as asked for, the same in every run."""
    if not config.shuffle:
        return [config.prefix + text]
    tags = [tag.strip() for tag in text.split(config.delimiter)]
    kept, rest = tags[: config.keep], [tag for tag in tags[config.keep :] if tag]
    between = config.delimiter if config.delimiter[-1].isspace() else f"{config.delimiter} "
    shown = []
    for number in range(config.shuffle):
        seed = blake2b(f"{number}/{text}".encode(), digest_size=8).digest()
        order = random.Random(int.from_bytes(seed, "little")).sample(rest, len(rest))
        shown.append(config.prefix + between.join([*kept, *order]))
    return list(dict.fromkeys(shown))


def read_text(file: File) -> str:
    """The caption in a file, without surrounding white space.

    Raises:
        MediaError: when it is empty or not UTF-8.
    """
    text = _decoded(file)
    if not text:
        raise MediaError("the caption is empty", where=str(file), fix="write the caption into it, or delete the file to train without one")
    return text


def _decoded(file: File) -> str:
    try:
        return file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as fault:
        raise MediaError(f"byte {fault.start} of the caption is not UTF-8", where=str(file), fix="save it as UTF-8") from fault


def _of_json(file: File) -> list[Span]:
    """A tar member's own JSON, as img2dataset writes it."""
    row = _parsed(_decoded(file), file)
    texts = _texts(row if isinstance(row, Mapping) else {}, file)
    return [Span(texts)] if texts else []


def _read_captions(file: File) -> dict[str, list[Span]]:
    """``{file name: caption, or list of captions}``."""
    rows = _parsed(_decoded(file), file)
    if not isinstance(rows, Mapping):
        raise MediaError("holds no file names", where=str(file), expected='{"a.jpg": "a caption", "b.mp4": ["one", "another"]}')
    return {str(name): [Span(_strings(texts, file, str(name)))] for name, texts in rows.items()}


def _read_metadata(file: File) -> dict[str, list[Span]]:
    """A row a line: ``{"file_name": …, "text": …}``, with ``start`` and ``end`` in seconds for a part of a video."""
    spans: dict[str, list[Span]] = {}
    for number, line in enumerate(_decoded(file).split("\n"), 1):  # a text may hold what else would end a line
        if not line.strip():
            continue
        row = _parsed(line, file, f", line {number}")
        if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
            raise MediaError(
                f"line {number} has no file_name", where=str(file), expected='{"file_name": "a.jpg", "text": "a caption"} on each line'
            )
        times = [row.get(k) for k in ("start", "end")]
        if not all(t is None or (isinstance(t, int | float) and not isinstance(t, bool) and t >= 0) for t in times):
            raise MediaError(f"line {number} has a start or end that is no time", where=str(file), expected="seconds from 0 on")
        start, end = times
        if start is not None and end is not None and end <= start:
            raise MediaError(f"line {number} ends at {end} s, before it starts at {start} s", where=str(file))
        texts = _texts(row, file)
        if texts:
            spans.setdefault(row["file_name"], []).append(Span(texts, start, end))
    return spans


def _texts(row: Mapping[str, Any], file: File) -> tuple[str, ...]:
    key = next((k for k in TEXTS if k in row), None)
    return () if key is None else _strings(row[key], file, str(row.get("file_name", PurePath(file.name).stem)))


def _strings(value: Any, file: File, name: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise MediaError(f"the caption of {name} is {value!r}", where=str(file), expected="a text, or a list of texts, none of them empty")
    return tuple(t.strip() for t in texts)


def _parsed(text: str, file: File, place: str = "") -> Any:
    try:
        return json.loads(text)
    except ValueError as fault:
        raise MediaError(f"not valid JSON{place}: {fault}", where=str(file), fix="mend it") from fault
