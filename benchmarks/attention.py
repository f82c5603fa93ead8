"""Speed and error of attention kernels on one GPU, at the shapes of Flux and Wan.

    python -m benchmarks.attention

Prints for each kind of kernels the time of both passes, and the relative error of the result and of the three gradients to float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffpipe.pipeline.attention import Attention, lacks_fa4

# Tokens, heads, width of a head, tokens attended to: Flux at 1024x1024; Wan 14B at 512x512 and 81 frames, to itself and to its caption;
# SDXL at 1024x1024 to its caption.
SHAPES = [(4608, 24, 128, 4608), (21504, 40, 128, 21504), (21504, 40, 128, 512), (4096, 10, 64, 77)]
KINDS = {"sdpa": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "fa4": SDPBackend.FLASH_ATTENTION}
ROUNDS = 5


def inputs(tokens: int, heads: int, width: int, others: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, and a gradient of the result, laid out as the models have them."""
    draw = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn(1, n, heads, width, device="cuda", generator=draw).bfloat16().to(dtype).transpose(1, 2)
        for n in (tokens, others, others, tokens)
    ]
    return [x.requires_grad_() for x in made[:3]], made[3]


def passed(given: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The result and the three gradients."""
    out = scaled_dot_product_attention(*given)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


def milliseconds(call: Callable[[], object]) -> float:
    """Mean of some calls, after one."""
    call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(ROUNDS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / ROUNDS


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def main() -> None:
    """Print a line for each shape and kind."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    for shape in SHAPES:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            exact = passed(*inputs(*shape, torch.float32))
        for kind, backend in KINDS.items():
            if kind == "fa4" and (why := lacks_fa4(device)) is not None:
                print(kind, why[0])
                continue
            Attention(kind, device)
            given, gradient = inputs(*shape, torch.bfloat16)
            with sdpa_kernel(backend):
                errors = [error(x, y) for x, y in zip(passed(given, gradient), exact, strict=True)]
                out = scaled_dot_product_attention(*given)
                ahead = milliseconds(lambda given=given: scaled_dot_product_attention(*given))
                back = milliseconds(lambda out=out, given=given, g=gradient: torch.autograd.grad(out, given, g, retain_graph=True))
            told = ", ".join(f"{x:.5f}" for x in errors)
            print(f"{shape} {kind:6} forward {ahead:.3f} ms, backward {back:.3f} ms, errors {told}", flush=True)


if __name__ == "__main__":
    main()
