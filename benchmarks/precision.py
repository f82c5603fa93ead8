"""How far the loss and a LoRA's gradients are from float32 in each form that frozen weights are kept in, on one GPU or the CPU.

    python -m benchmarks.precision [flux wan] [--depth 2 8 all] [--size 1024x1024x1] [--forms fp8 nf4] [--compile] [--attention cudnn]

Blocks of released width with random weights, the same for each form, as are the sample, its noise and the LoRA: both of its
factors are drawn, since at the start of a run one is zero, and with it half of the gradients. Random weights have none of a
trained model's outliers. The reference is float32 throughout, without TF32.

Prints a table: the relative error of the loss; of the gradient of each factor the relative error, median and largest; and the
cosine of all gradients as one vector, and the lowest of a factor.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.synthetic import Config, drawn, make_random, microbatches

# By family: what a depth is in the config of its class; all its blocks; height, width and frames.
FAMILIES: dict[str, tuple[Any, int, tuple[int, int, int]]] = {
    "flux": (lambda n: {"num_layers": max(1, n // 3), "num_single_layers": n - max(1, n // 3)}, 57, (1024, 1024, 1)),
    "wan": (lambda n: {"num_layers": n}, 40, (512, 512, 17)),
}
MODULATION = r"norm\d?(_context)?\.linear"
# By name: the memory section, and patterns of layers that stay in bf16. Products are left out where the device has none, and
# modulation where a family's blocks have no layers for it.
FORMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantize": "fp8", "products": False},
    "fp8, modulation in bf16": {"quantize": "fp8", "products": False, "kept": (MODULATION,)},
    "fp8, products": {"quantize": "fp8", "products": True},
    "fp8-plain": {"quantize": "fp8-plain", "products": False},
    "fp8-plain, products": {"quantize": "fp8-plain", "products": True},
    "fp8-block": {"quantize": "fp8-block"},
    "fp7": {"quantize": "fp7", "products": False},
    "fp7, products": {"quantize": "fp7", "products": True},
    "nf4": {"quantize": "nf4"},
}


@dataclass
class Step:
    """What one step gave."""

    loss: float
    gradients: dict[str, Tensor]  # float32, on the CPU


def step_of(
    family: str, depth: int, size: tuple[int, int, int], dtype: str, form: dict[str, Any], compiles: bool = False, attention: str = "sdpa"
) -> Step:
    """Loss and gradients of one sample."""
    from diffpipe.pipeline.build import build
    from diffpipe.pipeline.mesh import open_mesh

    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"family": family, "dtype": dtype, "trainable_dtype": "float32", "attention": attention},
            # diffusers' Flux rounds t to the type of the computation, whatever is done here: this one it need not round.
            "objective": {"min_t": 0.5, "max_t": 0.500001},
            "adapter": {"rank": 32},
            "data": {"folders": [{"path": "unused"}]},
            "memory": {**{key: value for key, value in form.items() if key != "kept"}, "compile": compiles},
        }
    )
    model = make_random(config, FAMILIES[family][0](depth), form.get("kept", ()))
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        trained = {n: p for n, p in pipeline.module.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(drawn(name, tuple(parameter.shape), parameter.device) * (0.01 if ".lora_B." in name else 0.02))
        loss = pipeline.train(microbatches(model, *size, count=1)).item()
        return Step(loss, {n: p.grad.float().cpu() for n, p in trained.items() if p.grad is not None})


def row(form: str, got: Step, wanted: Step) -> str:
    """A form's row of the table."""
    assert got.gradients.keys() == wanted.gradients.keys() and wanted.gradients
    pairs = [(got.gradients[n].flatten(), g.flatten()) for n, g in wanted.gradients.items()]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    cosines = [torch.cosine_similarity(a, b, 0).item() for a, b in pairs]
    whole = (
        sum(torch.dot(a, b).item() for a, b in pairs)
        / (sum(a.square().sum().item() for a, _ in pairs) * sum(b.square().sum().item() for _, b in pairs)) ** 0.5
    )
    loss = abs(got.loss - wanted.loss) / wanted.loss
    return f"| {form} | {loss:.2e} | {statistics.median(errors):.4f} | {max(errors):.4f} | {whole:.6f} | {min(cosines):.6f} |"


def main() -> None:
    from diffpipe.pipeline.memory.quantize import has_products

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("families", nargs="*", default=list(FAMILIES))
    options.add_argument("--depth", nargs="+", default=["2", "8", "all"], help="blocks; all of them in float32 take 80 GB")
    options.add_argument("--size", help="height x width x frames, such as 256x256x1")
    options.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    options.add_argument("--compile", action="store_true", help="compile the blocks, but those of the reference")
    options.add_argument("--attention", default="sdpa", choices=["sdpa", "fa4", "cudnn"], help="kernels, but those of the reference")
    given = options.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    cuda = torch.cuda.is_available()
    forms = [f for f in given.forms if not FORMS[f].get("products") or has_products(torch.device("cuda" if cuda else "cpu"))]
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}", flush=True)
    for family in given.families:
        size = tuple(int(n) for n in given.size.split("x")) if given.size else FAMILIES[family][2]
        for depth in (FAMILIES[family][1] if d == "all" else int(d) for d in given.depth):
            print(f"\n{family}, {depth} blocks, {'x'.join(map(str, size))}\n")
            print("| frozen weights | loss | gradients, median | worst | cosine, all | lowest |\n| --- | --- | --- | --- | --- | --- |")
            wanted = step_of(family, depth, size, "float32", {})
            for form in forms:
                if "kept" in FORMS[form] and family == "wan":
                    continue
                release()
                got = step_of(family, depth, size, "bfloat16", FORMS[form], given.compile, given.attention)
                print(row(form, got, wanted), flush=True)
            release()


def release() -> None:
    """Give the last model's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
