"""`diffpipe models`: a table of the registry."""

from __future__ import annotations


def models_command() -> None:
    from rich.console import Console
    from rich.table import Table

    from diffpipe.models import MODELS, model_class

    table = Table("model.family", "models", "media", "frames", "size", "trains", "reads", title="Model families")
    for name in sorted(MODELS):
        family = model_class(name)
        shape = family.geometry
        table.add_row(
            name,
            family.title,
            "image, video" if shape.fps else "image",
            f"{shape.temporal}k+1 at {shape.fps:g}/s" if shape.fps else "1",
            f"multiple of {shape.multiple}",
            "LoRA, full",
            "diffusers folder, single file (original, ComfyUI)",
        )
    Console().print(table)
