"""What one look at a machine found, and the cure where it is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: of what was looked at.
        state: ``fault`` where training would stop or be wrong, ``warning`` where it would be slow or stop at times.
        found: what is there.
        cure: what to do, where there is something to do.
    """

    name: str
    state: Literal["ok", "warning", "fault"]
    found: str
    cure: str = ""
