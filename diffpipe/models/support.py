"""What each family supports, as the registry tells it: the table of `diffpipe models` and of the README."""

from __future__ import annotations

from typing import get_args

from diffpipe.config.schema import AdapterConfig, ExportFormat
from diffpipe.models import MODELS, model_class
from diffpipe.models.base import DiffusionModel

ADAPTERS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}
Row = dict[str, str]


def support() -> tuple[list[Row], Row]:
    """A row for each family, by column, and what all families have alike, which no row repeats."""
    rows = [_row(model_class(name)) for name in sorted(MODELS)]
    alike = {column: value for column, value in rows[0].items() if all(row[column] == value for row in rows)}
    return [{column: value for column, value in row.items() if column not in alike} for row in rows], alike


def _row(family: type[DiffusionModel]) -> Row:
    shape = family.geometry
    single = family.originals is not None
    adapters = [ADAPTERS[kind] for kind in get_args(AdapterConfig.model_fields["kind"].annotation)]
    formats = get_args(ExportFormat) if single else ("diffusers",)
    names = "original (ComfyUI's) or diffusers' names" if single else "diffusers' names"
    return {
        "model.family": family.name,
        "released models": family.title,
        "media": "images, videos" if shape.fps else "images with controls" if family.takes_controls else "images",
        "frames": f"{shape.temporal}k+1 at {shape.fps:g} fps" if shape.fps else "1",
        "size multiple": str(shape.multiple),
        "objective": family.process,
        "trains": "denoiser, text encoders" if "model.train_text_encoders" in family.options else "denoiser",
        "previews": f"{family.guided} guidance" if family.guided else "not yet",
        "trained as": ", ".join([*adapters, "all weights"]),
        "read": f"diffusers folders; files under {names}, one or several with their index",
        "types read": "float32, bfloat16, float16, fp8 (plain or scaled, trained on as it is with `memory.quantize: fp8`)",
        "written": ", ".join(f"{name} (adapters)" if name == "kohya" else name for name in formats),
    }


def alike_lines(alike: Row) -> list[str]:
    """What all families have alike, a line each."""
    return [f"{column}: {value}" for column, value in alike.items()]


def markdown() -> str:
    """The table as the README has it."""
    rows, alike = support()
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\nAll of them:\n\n" + "\n".join(f"- {line}" for line in alike_lines(alike)) + "\n"
