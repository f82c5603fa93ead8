"""`diffpipe models`: a table of the registry."""

from __future__ import annotations


def models_command() -> None:
    from rich.console import Console
    from rich.table import Table

    from diffpipe.models import MODELS, model_class

    table = Table("model.family", "models", "media", "frames", "sizes in pixels")
    for name in sorted(MODELS):
        family = model_class(name)
        shape = family.geometry
        frames = f"{shape.temporal}k+1 at {shape.fps:g}/s" if shape.fps else "1"
        table.add_row(name, family.title, "image, video" if shape.fps else "image", frames, f"multiples of {shape.multiple}")
    console = Console()
    console.print(table)
    console.print("Each trains LoRAs and all weights, from a diffusers folder or a single file (original or ComfyUI names).")
