"""A cut model is the whole model: same outputs, gradients and parameter names, for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffpipe.config.schema import AdapterConfig, Config, ModelConfig, ObjectiveConfig
from diffpipe.models import MODELS, make_model
from diffpipe.models.adapters import attach, base_name, initialise, resolve_targets
from diffpipe.models.base import DiffusionModel, StageSpec
from diffpipe.pipeline.build import outline, precision_of, read_weights
from diffpipe.pipeline.cut import Border, Fakes, Part, Probe, duplicate, expand
from diffpipe.pipeline.stage import Stage, StepInputs, sum_errors
from tests.families import apart, filled, frames_of, microbatch

CPU = torch.device("cpu")


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, toys: Callable[[str], Path]) -> DiffusionModel:
    return make_model(ModelConfig(family=request.param, path=str(toys(request.param)), dtype="float32"), ObjectiveConfig())


def whole_of(model: DiffusionModel, lora: bool) -> nn.Module:
    module = model.load_denoiser()
    adapter = AdapterConfig(rank=4)
    if lora:
        attach(module, resolve_targets(model, module, adapter), adapter, torch.float32)
    return module if lora else module.requires_grad_(True)


def cuts_of(count: int) -> list[list[int]]:
    """Two stages, three stages, and one unit a stage."""
    return [[0, count // 2, count], [0, 1, count // 2, count], list(range(count + 1))]


def run_parts(parts: list[Part], inputs: dict, targets: list) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, loss and gradients of parts that pass detached tensors on, as ranks do."""
    payload: tuple[Tensor, ...] = ()
    layout, links = None, []
    for part in parts:
        sent, layout = part(payload, layout, inputs)
        payload = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in sent)
        links.append((sent, payload))
    loss = sum_errors(links[-1][0], targets)
    loss.backward()
    for sent, arrived in reversed(links[:-1]):
        pairs = [(s, a.grad if a.grad is not None else torch.zeros_like(s)) for s, a in zip(sent, arrived, strict=True) if s.requires_grad]
        if pairs:
            torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
    gradients: dict[str, Tensor] = {}
    for part in parts:
        for name, p in part.model.named_parameters():
            if p.requires_grad:
                assert name not in gradients or name in part.repeated, f"{name} is on two stages"
                gradients[name] = gradients.get(name, 0) + (p.grad if p.grad is not None else torch.zeros_like(p))
    return links[-1][0][0].detach(), loss.detach(), gradients


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_any_cut_gives_the_whole_models_output_and_gradients(model: DiffusionModel, lora: bool) -> None:
    whole = filled(whole_of(model, lora))
    inputs, targets = microbatch(model, frames=frames_of(model))
    output = whole(**inputs, return_dict=False)[0]
    loss = sum_errors((output,), targets)
    loss.backward()
    expected = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in whole.named_parameters() if p.requires_grad}
    fakes = Fakes(CPU)
    for edges in cuts_of(len(expand(whole, model.spec.units))):
        parts = [Part(apart(whole), model.spec, a, b, fakes) for a, b in pairwise(edges)]
        got, got_loss, gradients = run_parts(parts, inputs, targets)
        assert torch.equal(got, output), f"cut at {edges}"
        assert torch.equal(got_loss, loss)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_gradient_that_goes_back_over_a_border_is_in_memory_that_no_weights_gradient_grows_in(model: DiffusionModel) -> None:
    """At one sample: there autograd gives a table and the modulation that it is added to the same memory."""
    inputs, targets = microbatch(model, count=1, frames=frames_of(model))
    whole = filled(whole_of(model, lora=False))
    fakes = Fakes(CPU)
    parts = [Part(apart(whole), model.spec, i, i + 1, fakes) for i in range(len(expand(whole, model.spec.units)))]
    stages = [Stage(part, nullcontext, CPU, ObjectiveConfig()) for part in parts]
    payload: tuple[Tensor, ...] = ()
    layout, links = None, []
    for stage in stages:
        ahead, onward = stage.part(tuple(t.detach() for t in payload), layout, inputs)
        stage.inputs = StepInputs([(inputs, targets)], layout, (None,) * len(payload), (None,) * len(ahead), [0])
        sent = stage(*payload, microbatch=torch.tensor(0))
        links.append((stage, payload, (sent,) if stage.part.last else sent))
        payload, layout = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in links[-1][2]), onward
    gradients: list[Tensor | None] = [None]
    for stage, arrived, sent in reversed(links):
        pairs = [(s, g) for s, g in zip(sent, gradients, strict=True) if s.requires_grad and (g is not None or stage.part.last)]
        torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
        gradients = [t.grad for t in arrived]
        kept = [g.untyped_storage().data_ptr() for g in [*gradients, *(p.grad for p in stage.parameters())] if g is not None]
        assert len(set(kept)) == len(kept)


def test_a_probe_on_fake_tensors_knows_what_crosses_every_border(model: DiffusionModel) -> None:
    """Of adapters, behind which some of it has no gradient; what all weights send is compared in mixed precision below."""
    inputs, _ = microbatch(model, frames=frames_of(model))
    whole = filled(whole_of(model, lora=True))
    count = len(expand(whole, model.spec.units))
    fakes, others = Fakes(CPU), Fakes(CPU)
    twins = [Part(duplicate(whole), model.spec, i, i + 1, fakes) for i in range(count)]
    for twin in twins:
        fakes.fill(twin)
    probe = Probe(twins, fakes, nullcontext, model.spec.lengths)
    payload: tuple[Tensor, ...] = ()
    layout = None
    for i, border in enumerate(probe.borders(inputs)):
        sent, layout = Part(duplicate(whole), model.spec, i, i + 1, others)(payload, layout, inputs)
        assert kinds(sent) == kinds(shortened(border, probe.unused(inputs)))
        assert layout == border.layout
        payload = tuple(t.detach().requires_grad_(t.requires_grad) for t in sent)


def kinds(tensors: Iterable[Tensor]) -> list[tuple[torch.Size, torch.dtype, bool]]:
    return [(t.shape, t.dtype, t.requires_grad) for t in tensors]


def shortened(border: Border, unused: int) -> list[Tensor]:
    """What crosses a border of a microbatch whose longest caption is ``unused`` shorter than could be."""
    return [t if d is None else t.narrow(d, 0, t.shape[d] - unused) for t, d in zip(border.tensors, border.ragged, strict=True)]


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_probe_knows_the_types_that_mixed_precision_makes(model: DiffusionModel, adapter: dict[str, int] | None) -> None:
    raw = {
        "run": {"steps": 1},
        "mesh": {"stages": 2},
        "model": {"family": model.name, "path": model.config.path, "dtype": "bfloat16"},
        "adapter": adapter,
        "data": {"folders": [{"path": "unused"}]},
    }
    config = Config.model_validate(raw)
    model = make_model(config.model, config.objective)
    whole, spans = outline(config, model)
    precision, fakes = precision_of(config, CPU), Fakes(CPU)
    twins = [Part(duplicate(whole), model.spec, *span, fakes) for span in spans]
    for twin in twins:
        fakes.fill(twin)
    inputs, _ = microbatch(model, frames=frames_of(model))
    probe = Probe(twins, fakes, precision, model.spec.lengths)
    part = Part(whole, model.spec, *spans[0], Fakes(CPU))
    read_weights([part], model, config, CPU, lambda done, total: None)
    weights = dict(part.model.named_parameters())
    assert {n: p.dtype for n, p in weights.items()} == {
        n: torch.float32 if p.requires_grad else model.dtype_of(base_name(n)) for n, p in weights.items()
    }
    with precision():
        sent, _ = part((), None, inputs)
    assert kinds(sent) == kinds(shortened(probe.borders(inputs)[0], probe.unused(inputs)))


def test_parameter_names_are_those_of_diffusers(model: DiffusionModel) -> None:
    whole = whole_of(model, False)
    names = [n for n, _ in whole.named_parameters()]
    count = len(expand(whole, model.spec.units))
    parts = [Part(duplicate(whole), model.spec, i, i + 1, Fakes(CPU)) for i in range(count)]
    held = [n for part in parts for n, _ in part.model.named_parameters() if part.first or n not in part.repeated]
    assert sorted(held) == sorted(names)
    assert set(names) <= model.weights().names()


def test_dropping_a_carried_module_from_the_spec_changes_the_output(model: DiffusionModel) -> None:
    whole = filled(whole_of(model, False))
    inputs, _ = microbatch(model, frames=frames_of(model))
    output = whole(**inputs, return_dict=False)[0]
    for dropped in model.spec.carry:
        spec = StageSpec(model.spec.units, tuple(c for c in model.spec.carry if c != dropped), model.spec.replicate, model.spec.post)
        first, last = (Part(duplicate(whole), spec, a, b, Fakes(CPU)) for a, b in ((0, 1), (1, len(expand(whole, spec.units)))))
        payload, layout = first((), None, inputs)
        got, _ = last(tuple(t.detach() for t in payload), layout, inputs)
        assert not torch.allclose(got[0], output, atol=1e-4), dropped


def test_adapters_start_equal_on_any_cut(model: DiffusionModel) -> None:
    adapter = AdapterConfig(rank=4)
    whole = whole_of(model, True)
    count = len(expand(whole, model.spec.units))
    parts = [Part(apart(whole), model.spec, a, b, Fakes(CPU)).model for a, b in ((0, count), (0, 2), (2, count))]
    for part in parts:
        initialise(part, adapter, 3, CPU, None, lambda layer: torch.ones(1, 1))
    one = dict(parts[0].named_parameters())
    for part in parts[1:]:
        for name, p in part.named_parameters():
            if p.requires_grad:
                assert torch.equal(p, one[name]), name
