"""Writes files so that a name never stands for less than all of what it should."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished-"  # what begins so, a kill may have left behind


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which gets its name once all of it is on the disk; nothing is left behind when that fails."""
    aside = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")  # others may be writing the same file
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that holds either its old content or all of the new, whatever happens meanwhile."""
    with written(path) as file:
        file.write(content)
