"""Names and shapes of original checkpoints: one block of each kind at released width is enough to find the map."""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _flux() -> Shapes:
    """Black Forest Labs' names for Flux.1 dev; schnell lacks guidance_in."""
    w, head = 3072, 128
    shapes = _linear("img_in", w, 64) | _linear("txt_in", w, 4096)
    for embed, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= _linear(f"{embed}.in_layer", w, columns) | _linear(f"{embed}.out_layer", w, w)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= _linear(f"{block}_mod.lin", 6 * w, w) | _linear(f"{block}_attn.qkv", 3 * w, w) | _linear(f"{block}_attn.proj", w, w)
        shapes |= {f"{block}_attn.norm.{n}_norm.scale": (head,) for n in ("query", "key")}
        shapes |= _linear(f"{block}_mlp.0", 4 * w, w) | _linear(f"{block}_mlp.2", w, 4 * w)
    single = "single_blocks.0"
    shapes |= (
        _linear(f"{single}.linear1", 7 * w, w) | _linear(f"{single}.linear2", w, 5 * w) | _linear(f"{single}.modulation.lin", 3 * w, w)
    )
    shapes |= {f"{single}.norm.{n}_norm.scale": (head,) for n in ("query", "key")}
    return shapes | _linear("final_layer.linear", 64, w) | _linear("final_layer.adaLN_modulation.1", 2 * w, w)


def _wan() -> Shapes:
    """Alibaba's names for Wan2.1 text to video."""
    w, ffn = 1536, 8960
    shapes: Shapes = {"patch_embedding.weight": (w, 16, 1, 2, 2), "patch_embedding.bias": (w,)}
    for name, rows, columns in (
        ("text_embedding.0", w, 4096),
        ("text_embedding.2", w, w),
        ("time_embedding.0", w, 256),
        ("time_embedding.2", w, w),
        ("time_projection.1", 6 * w, w),
        ("head.head", 64, w),
    ):
        shapes |= _linear(name, rows, columns)
    block = "blocks.0"
    shapes |= {"head.modulation": (1, 2, w), f"{block}.modulation": (1, 6, w)}
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            shapes |= _linear(f"{block}.{attention}.{name}", w, w)
        shapes |= {f"{block}.{attention}.norm_{n}.weight": (w,) for n in "qk"}
    shapes |= {f"{block}.norm3.{n}": (w,) for n in ("weight", "bias")}
    return shapes | _linear(f"{block}.ffn.0", ffn, w) | _linear(f"{block}.ffn.2", w, ffn)


# By diffusers class: the shapes of a shortest original checkpoint, and the config its converter wants.
ORIGINALS: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "FluxTransformer2DModel": (_flux(), {"num_layers": 1, "num_single_layers": 1}),
    "WanTransformer3DModel": (_wan(), {}),
}
