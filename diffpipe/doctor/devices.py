"""The GPUs: whether torch reaches them, what they can, what lies on them already, and how they reach each other and the host."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations

from diffpipe.config.schema import Config
from diffpipe.doctor.finding import Finding
from diffpipe.metrics import amount

PINNED = 1 << 30  # bytes that are page-locked for a trial
TAKEN = 0.1  # part of a card that others may hold without a word


def cards(config: Config | None) -> Iterator[Finding]:
    """Everything about GPUs; a warning where there is none."""
    import torch

    if not torch.cuda.is_available():
        yield _none()
        return
    yield Finding("CUDA", "ok", ", ".join(_libraries()))
    for number in range(torch.cuda.device_count()):
        yield from _card(number, config)
    yield from _peers()
    yield _pinned()
    if config is not None:
        yield from _fits(config)


def _libraries() -> Iterator[str]:
    import torch
    import torch.distributed as dist

    yield str(torch.version.cuda)
    yield f"cuDNN {torch.backends.cudnn.version()}"
    if dist.is_nccl_available():
        yield "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]


def _none() -> Finding:
    """No card that torch reaches: none at all, a build without CUDA, or a driver that does not answer."""
    import torch

    listed = _listed()
    if not listed:
        return Finding("GPU", "warning", "none: everything runs on the CPU, which is for trials only", "")
    if torch.version.cuda is None:
        cure = "pip install torch from https://download.pytorch.org/whl/ of the CUDA version that nvidia-smi shows"
        return Finding("GPU", "fault", f"nvidia-smi lists {len(listed)}, but torch {torch.__version__} is built without CUDA", cure)
    try:
        torch.cuda.init()
        said = "no device is visible"
    except (RuntimeError, AssertionError) as fault:
        said = str(fault).splitlines()[0]
    cure = f"update the driver to one for CUDA {torch.version.cuda} or install torch for an older one; check CUDA_VISIBLE_DEVICES"
    return Finding("GPU", "fault", f"nvidia-smi lists {len(listed)}, but torch does not reach them: {said}", cure)


def _listed() -> list[str]:
    """The cards that the driver's own program names."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")]


def _card(number: int, config: Config | None) -> Iterator[Finding]:
    import torch

    from diffpipe.pipeline.attention import lacks_fa4

    name, card = f"GPU {number}", torch.cuda.get_device_properties(number)
    capability = (card.major, card.minor)
    built = torch.cuda.get_arch_list()
    if built and not any(runs(arch, capability) for arch in built):
        cure = "install torch for a newer CUDA; https://pytorch.org/get-started tells which"
        yield Finding(
            name, "fault", f"{card.name} is sm_{card.major}{card.minor}, for which torch has no kernels ({' '.join(built)})", cure
        )
        return
    free, total = torch.cuda.mem_get_info(number)
    told = f"{card.name}, {amount(free)} of {amount(total)} free, compute capability {card.major}.{card.minor}"
    if free < (1 - TAKEN) * total:
        yield Finding(name, "warning", told, "other programs hold memory of it: nvidia-smi tells which")
    else:
        yield Finding(name, "ok", told)
    if capability < (8, 0) and (config is None or config.model.dtype == "bfloat16"):
        yield Finding(name, "warning", "computes bfloat16 slowly or not at all", "set model.dtype: float16")
    if config is not None and config.memory.products and capability < (8, 9):
        yield Finding(name, "fault", "does not multiply fp8, which memory.products asks for", "set memory.products: null")
    if config is not None and config.model.attention == "cudnn" and not config.memory.compile:
        yield Finding(
            name,
            "warning",
            f"model.attention is cudnn: cuDNN {torch.backends.cudnn.version()} gave wrong gradients in uncompiled blocks of Flux on Hopper",
            "set model.attention: sdpa, or memory.compile: true",
        )
    if config is not None and config.model.attention == "fa4" and (why := lacks_fa4(torch.device("cuda", number))) is not None:
        yield Finding(name, "fault", f"model.attention is fa4, {why[0]}", why[1])


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``arch``, as torch names it, runs on a card of this compute capability.

    ``sm_86`` runs on cards of its own generation that are no older, ``compute_86`` is compiled for any later one; other makers' are
    not judged.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]*", arch)
    if found is None:
        return True
    own = int(found[2]), int(found[3])
    return own <= capability and (found[1] == "compute" or own[0] == capability[0])


def _peers() -> Iterator[Finding]:
    import torch

    pairs = list(combinations(range(torch.cuda.device_count()), 2))
    apart = [f"{a} and {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        cure = "stages then pass through host memory; where NCCL hangs, set NCCL_P2P_DISABLE=1"
        yield Finding("peer access", "warning", f"none between GPUs {', '.join(apart[:4])}", cure)
    elif pairs:
        yield Finding("peer access", "ok", "between all GPUs")


def _pinned() -> Finding:
    """A trial of page-locked memory, which streamed weights and activations lie in."""
    import torch

    try:
        torch.empty(PINNED, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as fault:
        cure = "ulimit -l unlimited before the start (in a container --ulimit memlock=-1), or set memory.pin: false"
        return Finding("page-locked memory", "fault", f"{amount(PINNED)} were refused: {str(fault).splitlines()[0]}", cure)
    return Finding("page-locked memory", "ok", f"{amount(PINNED)} were locked in a trial")


def _fits(config: Config) -> Iterator[Finding]:
    """Whether there are as many GPUs as the config's processes on one machine."""
    import torch

    wanted, there = config.mesh.stages * config.mesh.replicate, torch.cuda.device_count()
    if wanted > there:
        cure = "lower mesh.stages or mesh.replicate, or start torchrun on more machines"
        yield Finding("mesh", "warning", f"stages x replicate are {wanted} processes, for {there} GPUs here", cure)
