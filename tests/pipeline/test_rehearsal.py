"""A stage rehearsed on fake tensors holds what a real one holds: against counts of a real run, and against torch's own allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import nop
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_unflatten

from diffpipe.config.schema import Config, OptimizerConfig
from diffpipe.data.buckets import Bucket
from diffpipe.flow import Key
from diffpipe.models import MODELS, make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.models.encoders import halve_tiles
from diffpipe.optim import make_optimizer, set_rates
from diffpipe.optim.size import state_bytes
from diffpipe.pipeline.build import build
from diffpipe.pipeline.cut import duplicate
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.cards import CARDS, Card
from diffpipe.pipeline.memory.compiled import Compiled
from diffpipe.pipeline.memory.decoding import measure_decoding
from diffpipe.pipeline.memory.footprint import Call
from diffpipe.pipeline.memory.ledger import Ledger, rounded
from diffpipe.pipeline.memory.tags import cut
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.pipeline.rehearsal import Dims, Rehearsal
from diffpipe.pipeline.schedule import Microbatches
from diffpipe.prompts import read_prompts
from diffpipe.sampling import Conditions, Sampler, first_asked
from tests.families import CPU, frames_of
from tests.pipeline.test_memory import config_of

Toys = Callable[[str], Path]
CARD: Card = next(c for c in CARDS if c.name == "H100")


def bucket_of(model: DiffusionModel, side: int = 12) -> Dims:
    """Large enough for activations to outweigh what is small."""
    return frames_of(model), side * model.geometry.multiple, side * model.geometry.multiple


def batch_of(model: DiffusionModel, bucket: Dims, count: int = 1) -> Microbatches:
    row = {n: torch.randn(1, *t.shape) if t.is_floating_point() else t[None] for n, t in model.blank(*bucket).items()}
    return [model.prepare(row, [Key(0, 0, i, 0)]) for i in range(count)]


def allocated(work: Callable[[], object]) -> int:
    """The most that work allocates, as torch's CPU allocator reports it to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events: Any = profile.profiler
    live = peak = 0
    for event in sorted((e for e in events.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("family", "recompute"), [*((f, "none") for f in sorted(MODELS)), ("flux", "block"), ("wan", "selective")])
def test_a_step_holds_what_was_foreseen(toys: Toys, family: str, recompute: str) -> None:
    config = config_of(family, toys(family), {"rank": 4}, {"recompute": recompute})
    model = make_model(config.model, config.objective)
    bucket = bucket_of(model)
    moment = Rehearsal(config, model, 0, CARD).estimate(bucket, config.memory).moment
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        pipeline.train(batch_of(model, bucket))
        pipeline.module.zero_grad()
        batch = batch_of(model, bucket)
        held = allocated(lambda: pipeline.train(batch))
    assert moment.whole - moment.inputs == pytest.approx(held, rel=0.05)


def test_several_microbatches_and_full_training_hold_what_was_foreseen(toys: Toys) -> None:
    config = config_of("flux", toys("flux"), None, {"recompute": "selective"}, batch={"accumulate": 3})
    model = make_model(config.model, config.objective)
    bucket = bucket_of(model)
    moment = Rehearsal(config, model, 0, CARD).estimate(bucket, config.memory).moment
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        batch = batch_of(model, bucket, 3)
        held = allocated(lambda: pipeline.train(batch))
    assert moment.whole - moment.inputs == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("family", ["flux", "ltx-video", "sdxl", "wan"])  # the second and third send both branches of guidance together
def test_a_sample_holds_what_was_foreseen(toys: Toys, family: str) -> None:
    preview: dict[str, Any] = {"prompts": ["x"], "steps": 2}
    config = config_of(family, toys(family), {"rank": 4}, {}, preview=preview)
    model = make_model(config.model, config.objective)
    frames, height, width = bucket_of(model)
    (prompt,) = read_prompts(config, model)
    wanted = replace(prompt, bucket=Bucket(frames, height, width)).blank(model)
    asked = first_asked(model, wanted, config.preview)
    moment = Rehearsal(config, model, 0, CARD).prediction(asked.microbatches, config.memory)
    with open_mesh(config.mesh) as mesh:
        sampler = Sampler(model, build(config, model, mesh))
        sampler.sample(wanted, config.preview)
        held = allocated(lambda: sampler.sample(wanted, config.preview))
    assert len(asked.microbatches) == (2 if family in ("ltx-video", "sdxl") else 1)
    # What the scheduler keeps of earlier steps, some latents, weighs more here than in models of their true size.
    assert moment.whole + asked.bytes == pytest.approx(held, rel=0.07)


def test_a_stage_and_streamed_weights_hold_less_in_a_sample_than_in_a_step(toys: Toys) -> None:
    config = config_of("flux", toys("flux"), {"rank": 4}, {"swap": "all", "recompute": "none"}, mesh={"stages": 2})
    model = make_model(config.model, config.objective)
    bucket = bucket_of(model)
    wanted = Conditions(0, *bucket, model.blank_text(), None, {})
    asked = first_asked(model, wanted, config.preview)
    for stage in range(2):
        rehearsal = Rehearsal(config, model, stage, CARD)
        step = rehearsal.estimate(bucket, config.memory)
        moment = rehearsal.prediction(asked.microbatches, config.memory)
        assert 0 < moment.whole < step.moment.whole and (moment.saved, moment.gradients) == (0, 0)
        assert rehearsal.estimate(bucket, config.memory) == step, "what steps hold is foreseen as before"


def test_a_compiled_unit_holds_no_more_in_a_sample_than_in_a_step(toys: Toys) -> None:
    # All weights: where there are adapters, steps alone add their products in place.
    config = config_of("wan", toys("wan"), None, {"compile": True, "recompute": "none"})
    model = make_model(config.model, config.objective)
    rehearsal, bucket = Rehearsal(config, model, 0, CARD), bucket_of(model)
    number, call = list(rehearsal.timeline(bucket).calls.values())[-1]
    compiled = Compiled(rehearsal.plain[number], call, rehearsal.fakes)
    alone, step = compiled.ahead(), compiled.footprint("none", None)
    assert 0 < alone.forward <= step.forward and (alone.kept, alone.held) == (0, ())
    assert (alone.ahead.full, alone.ahead.attention) == (step.ahead.full, step.ahead.attention)
    assert alone.ahead.traffic < step.ahead.traffic, "nothing is written for a backward pass"


@pytest.mark.parametrize(
    ("family", "side", "latent_frames", "halved"),
    [("sdxl", 160, 1, 0), ("wan", 160, 3, 1), ("hunyuan-video", 144, 5, 1), ("ltx-video", 320, 2, 1)],
)
def test_a_decoder_holds_what_was_foreseen(toys: Toys, family: str, side: int, latent_frames: int, halved: int) -> None:
    config = config_of(family, toys(family), {"rank": 4}, {})
    model = make_model(config.model, config.objective)
    frames = 1 + (latent_frames - 1) * model.geometry.temporal
    foreseen = measure_decoding(model, frames, side, side, halved)
    decoder = model.load_decoder(CPU)
    for _ in range(halved):
        assert halve_tiles(decoder.vae)
    latents, ledger = torch.randn(1, *model.blank_media(frames, side, side)["latents"].shape), Ledger()
    with torch.no_grad():
        if family == "sdxl":
            held = allocated(lambda: model.decode_media(decoder, latents))
        else:  # the CPU's convolutions of clips unfold them first: what no tensor shows, and no GPU does
            with ledger:
                model.decode_media(decoder, latents)
            held = ledger.peak - sum(rounded(t.nbytes) for t in [*decoder.vae.parameters(), *decoder.vae.buffers(), latents])
    assert foreseen is not None and foreseen.weights == bytes_of([*decoder.vae.parameters(), *decoder.vae.buffers()])
    assert foreseen.taken == pytest.approx(held, rel=0.05)


def bytes_of(tensors: Any) -> int:
    return sum(rounded(t.nbytes) for t in tensors)


@pytest.mark.parametrize(("family", "memory"), [("flux", {"swap": "all"}), ("sdxl", {"swap": 3})])
def test_what_stays_is_counted_to_the_byte(toys: Toys, family: str, memory: dict[str, Any]) -> None:
    config = config_of(family, toys(family), {"rank": 4}, memory)
    model = make_model(config.model, config.objective)
    bucket = bucket_of(model, 4)
    foreseen = Rehearsal(config, model, 0, CARD).estimate(bucket, config.memory)
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        part, stream = pipeline.spans[0].part, pipeline.memory.stream
        at_home = {id(s.owner._parameters[s.leaf]) for home in stream.homes.values() for s in home.slices} if stream else set()
        trained = [p for p in part.parameters() if p.requires_grad]
        optimizer = make_optimizer(config.optimizer, part.model.named_parameters())
        set_rates(optimizer, 1.0)
        for _ in range(3):
            before = stream.moved if stream else 0
            pipeline.train(batch_of(model, bucket))
            optimizer.step()
        assert foreseen.weights == bytes_of(
            t for t in [*part.parameters(), *part.buffers()] if not t.requires_grad and id(t) not in at_home
        )
        assert foreseen.trained == bytes_of(trained)
        assert foreseen.moment.gradients <= bytes_of(p.grad for p in trained if p.grad is not None)
        assert foreseen.optimizer == pytest.approx(state_of(optimizer), rel=0.02)
        if stream is not None:
            assert (foreseen.homes, foreseen.arena) == (sum(h.flat.numel() for h in stream.homes.values()), rounded(stream.arena.numel()))
            assert foreseen.to_device == pytest.approx(stream.moved - before, rel=0.02)  # each home is rounded up to what aligns it


@pytest.mark.parametrize("memory", [{}, {"swap": 2}])
def test_state_that_waits_on_the_host_is_counted_there(toys: Toys, memory: dict[str, Any]) -> None:
    config = config_of("flux", toys("flux"), None, memory, optimizer={"offload": True, "clip": None})
    model = make_model(config.model, config.objective)
    foreseen = Rehearsal(config, model, 0, CARD).estimate(bucket_of(model, 4), config.memory)
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        optimizer = make_optimizer(config.optimizer, pipeline.module.named_parameters())
        release = pipeline.memory.release_with(optimizer, mesh.mean_over_replicas)
        pipeline.train(batch_of(model, bucket_of(model, 4)))
        release.step_rest()
    waiting = sum(t.nbytes for p in release.waits_on_host() for t in optimizer.state[p].values())
    weights = sum(home.flat.numel() for home in pipeline.memory.homes.values())
    assert waiting > 0.9 * state_of(optimizer)
    assert foreseen.homes - weights == pytest.approx(waiting, rel=0.02)
    assert foreseen.optimizer < 0.6 * waiting


def state_of(optimizer: Optimizer) -> int:
    return sum(t.nbytes for t in tree_leaves(dict(optimizer.state)) if isinstance(t, Tensor))


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion"])
def test_optimizer_state_is_foreseen(kind: str) -> None:
    config, weights = OptimizerConfig(kind=kind), [nn.Parameter(torch.zeros(s)) for s in ((300, 200), (512, 64), (900,))]
    optimizer = make_optimizer(config, [(str(i), w) for i, w in enumerate(weights)])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    whole = sum(w.nbytes for w in weights)
    assert state_bytes(config, weights) == pytest.approx(state_of(optimizer), abs=0.02 * whole)


def test_8_bit_state_takes_two_bytes_and_scales() -> None:
    weights = [nn.Parameter(torch.empty(1024, 256, device="meta")), nn.Parameter(torch.empty(64, device="meta"))]
    assert state_bytes(OptimizerConfig(kind="adamw8bit"), weights) == 2 * 1024 * 256 + 2 * 4 * 1024 + 8 * 64


@pytest.mark.parametrize(("family", "policy"), [("flux", "block"), ("wan", "none")])
def test_a_compiled_unit_keeps_what_was_foreseen(toys: Toys, family: str, policy: str) -> None:
    config = config_of(family, toys(family), {"rank": 4}, {"recompute": policy, "compile": True})
    model = make_model(config.model, config.objective)
    rehearsal = Rehearsal(config, model, 0, CARD)
    number, call = list(rehearsal.timeline(bucket_of(model)).calls.values())[-1]
    unit = with_values(rehearsal.plain[number])
    foreseen = Compiled(unit, call, rehearsal.fakes).footprint(policy, None)
    kept, held, read = saved_by(unit, call, policy)
    assert foreseen.kept == pytest.approx(kept, rel=1e-3)
    assert (set(foreseen.held), foreseen.read) == (held, read)
    if family == "flux":
        modulations = {name for name, _ in unit.named_parameters() if name.startswith("norm") and name.endswith("base_layer.weight")}
        assert modulations and not modulations & read, "a modulation's result is kept, so that its weight is not read again"


def with_values(unit: nn.Module) -> nn.Module:
    made = duplicate(unit)
    for part in made.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.randn(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
    return made


def saved_by(unit: nn.Module, call: Call, policy: str) -> tuple[int, set[int], set[str]]:
    """Bytes of its own that a unit keeps which torch.compile cut in two, which of its inputs, and which of its weights."""
    leaves = [torch.randn(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in call.leaves]
    given = {x.untyped_storage().data_ptr(): i for i, x in enumerate(x for x in leaves if isinstance(x, Tensor))}
    weights = {p.untyped_storage().data_ptr(): name for name, p in unit.named_parameters()}
    args, kwargs = tree_unflatten(leaves, call.tree)
    torch._dynamo.reset()

    def halved(module: fx.GraphModule, joint: Any, **more: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        return cut(module, policy, joint, **more)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=halved, decompositions=select_decomp_table())
    compiled = torch.compile(unit.forward, backend=backend, dynamic=False)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = rounded(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        compiled(*args, **kwargs)
    own = sum(count for place, count in seen.items() if place not in weights and place not in given)
    return own, {given[place] for place in seen if place in given}, {weights[place] for place in seen if place in weights}


def test_what_is_offloaded_is_held_by_the_host_instead(toys: Toys) -> None:
    config = config_of("wan", toys("wan"), {"rank": 4}, {"recompute": "block", "offload_threshold": 0.001})
    model = make_model(config.model, config.objective)
    rehearsal, bucket = Rehearsal(config, model, 0, CARD), bucket_of(model)
    kept = rehearsal.estimate(bucket, config.memory)
    memory = config.memory.model_copy(update={"offload": True})
    moved = rehearsal.estimate(bucket, memory)
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config.model_copy(update={"memory": memory}), model, mesh)
        pipeline.train(batch_of(model, bucket))
        offload = pipeline.memory.offload
        assert offload is not None
        assert moved.to_host == pytest.approx(offload.moved, rel=0.01)
    assert moved.peak < kept.peak and moved.moment.saved < kept.moment.saved
    assert moved.buffers == moved.to_host


def test_operations_are_in_the_types_that_this_torch_has_on_cuda() -> None:
    ops = nn.functional

    def types(device: str) -> list[torch.dtype]:
        x, weight = torch.empty(4, 8, dtype=torch.bfloat16, device=device), torch.empty(8, device=device)
        same = weight.to(x.dtype)
        norms = [ops.rms_norm(x, (8,)), ops.rms_norm(x, (8,), same), ops.rms_norm(x, (8,), weight), ops.layer_norm(x, (8,))]
        return [y.dtype for y in (*norms, ops.softmax(x, -1), ops.softplus(x), ops.gelu(x), x.rsqrt(), x.cumsum(-1))]

    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)  # which torch.autocast refuses where there is no card
        try:
            wanted = types("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)
        with torch.autocast("cpu", torch.bfloat16):
            assert as_on_cuda(types)("cpu") == wanted


def test_a_norm_of_several_types_keeps_what_torch_keeps_of_one_that_it_takes_apart() -> None:
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(8)

    def kept(forward: Callable[..., Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t), lambda _: x):
            forward(x, (8,), weight)
        return [(t.dtype, t.shape) for t in seen]

    assert kept(as_on_cuda(nn.functional.rms_norm)) == kept(nn.functional.rms_norm)


def test_a_stage_is_rehearsed_with_what_crosses_its_borders(toys: Toys) -> None:
    whole = config_of("wan", toys("wan"), {"rank": 4}, {})
    model = make_model(whole.model, whole.objective)
    bucket = bucket_of(model, 4)
    cut: Config = whole.model_copy(update={"mesh": whole.mesh.model_copy(update={"stages": 2})})
    one = Rehearsal(whole, model, 0, CARD).estimate(bucket, whole.memory)
    halves = [Rehearsal(cut, model, i, CARD).estimate(bucket, cut.memory) for i in range(2)]
    assert sum(h.weights for h in halves) == pytest.approx(one.weights, rel=0.05)
    assert all(h.peak < one.peak for h in halves)
