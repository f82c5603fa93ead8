"""Families that pack captions by their length have one shape on the wire, and the whole model's numbers, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffpipe.config.schema import AdapterConfig, ModelConfig, ObjectiveConfig
from diffpipe.flow import Key
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.models.adapters import attach, resolve_targets
from diffpipe.models.base import DiffusionModel, StageSpec
from diffpipe.pipeline.cut import Border, Fakes, Part, Probe, expand
from diffpipe.pipeline.schedule import Microbatches
from diffpipe.pipeline.stage import Stage, StepInputs, sum_errors
from tests.families import CPU, encoded, encoders_of, filled, frames_of

SHORT, MIDDLE, LONG = "a square", "a red circle on a blue background", "a red circle on a blue background " * 9
STEPS = {
    "one-each": [[MIDDLE], [SHORT], [LONG]],
    "one-each-and-none-full": [[SHORT], [MIDDLE]],
    "mixed": [[SHORT, MIDDLE], [LONG, SHORT], [SHORT, SHORT]],
    "longest-first": [[LONG, LONG], [MIDDLE, SHORT]],
}


FAMILIES = sorted(f for f in MODELS if isinstance(spec := model_class(f).spec, StageSpec) and spec.lengths)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, toys: Callable[[str], Path]) -> DiffusionModel:
    return make_model(ModelConfig(family=request.param, path=str(toys(request.param)), dtype="float32"), ObjectiveConfig())


def whole_of(model: DiffusionModel, lora: bool) -> nn.Module:
    module = model.load_denoiser().requires_grad_(True)
    if lora:
        adapter = AdapterConfig(rank=4)
        attach(module, resolve_targets(model, module, adapter), adapter, torch.float32)
    return module


def microbatches_of(model: DiffusionModel, captions: list[list[str]]) -> Microbatches:
    found: Microbatches = []
    for i, some in enumerate(captions):
        batch = encoded(model, frames=frames_of(model), count=len(some), seed=i)
        with torch.no_grad():
            batch |= model.encode_text(encoders_of(model), some)
        found.append(model.prepare(batch, [Key(i, 0, n, 0) for n in range(len(some))]))
    return found


def spoiled(tensor: Tensor, dim: int | None, unused: int) -> Tensor:
    """What arrived, where no caption reaches replaced by what would spoil every number that it enters."""
    arrived = tensor.detach().clone()
    if dim is not None and unused:
        arrived.narrow(dim, arrived.shape[dim] - unused, unused).fill_(torch.nan)
    return arrived.requires_grad_(tensor.requires_grad)


class Step:
    """The stages of a cut model on the microbatches of one step, as ranks run them."""

    def __init__(self, model: DiffusionModel, lora: bool, edges: list[int], microbatches: Microbatches) -> None:
        fakes = Fakes(CPU)
        twins = [Part(whole_of(model, lora), model.spec, a, b, fakes) for a, b in pairwise(edges)]
        for twin in twins:
            fakes.fill(twin)
        probe = Probe(twins, fakes, nullcontext, model.spec.lengths)
        self.count, self.borders = len(microbatches), probe.borders(microbatches[0][0])
        self.unused = [probe.unused(inputs) for inputs, _ in microbatches]
        self.stages: list[Stage] = []
        before = Border((), None, ())
        for (a, b), border in zip(pairwise(edges), self.borders, strict=True):
            stage = Stage(Part(filled(whole_of(model, lora)), model.spec, a, b, Fakes(CPU)), nullcontext, CPU, model.objective)
            stage.inputs = StepInputs(microbatches, before.layout, before.ragged, border.ragged, self.unused)
            self.stages.append(stage)
            before = border

    def forward(self, i: int) -> tuple[Tensor, list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]]:
        """A microbatch's loss, and what each border sent and received."""
        payload: tuple[Tensor, ...] = ()
        links = []
        for stage, border in zip(self.stages[:-1], self.borders, strict=False):
            sent = stage(*payload, microbatch=torch.tensor(i))
            assert [(t.shape, t.dtype, t.requires_grad) for t in sent] == [(t.shape, t.dtype, t.requires_grad) for t in border.tensors]
            payload = tuple(spoiled(t, d, self.unused[i]) for t, d in zip(sent, border.ragged, strict=True))
            links.append((sent, payload))
        loss = self.stages[-1](*payload, microbatch=torch.tensor(i))
        assert isinstance(loss, Tensor)
        return loss, links

    def train(self) -> Tensor:
        losses = []
        for i in range(self.count):
            loss, links = self.forward(i)
            loss.backward()
            for sent, arrived in reversed(links):
                pairs = [(s, a.grad) for s, a in zip(sent, arrived, strict=True) if a.grad is not None]
                torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
            losses.append(loss.detach())
        return torch.stack(losses).sum()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("captions", STEPS.values(), ids=STEPS)
def test_captions_of_any_length_give_the_whole_models_loss_and_gradients(
    model: DiffusionModel, captions: list[list[str]], stages: int, lora: bool
) -> None:
    microbatches = microbatches_of(model, captions)
    whole = filled(whole_of(model, lora))
    total = torch.stack([sum_errors(whole(**inputs, return_dict=False), targets) for inputs, targets in microbatches]).mean()
    total.backward()
    count = len(expand(whole, model.spec.units))
    step = Step(model, lora, [i * count // stages for i in range(stages + 1)], microbatches)
    assert any(d is not None for border in step.borders[:-1] for d in border.ragged)
    assert len(set(step.unused)) > 1
    torch.testing.assert_close(step.train(), total.detach(), rtol=1e-6, atol=0)
    gradients = {n: p.grad for stage in step.stages for n, p in stage.part.model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_gives_the_whole_models_loss(model: DiffusionModel) -> None:
    microbatches = microbatches_of(model, STEPS["mixed"])
    whole = filled(whole_of(model, False))
    with torch.no_grad():
        expected = [sum_errors(whole(**inputs, return_dict=False), targets) for inputs, targets in microbatches]
        step = Step(model, False, [0, 2, len(expand(whole, model.spec.units))], microbatches)
        got = [step.forward(i)[0] * len(microbatches) for i in range(len(microbatches))]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-6, atol=0)


def test_the_length_of_a_microbatch_is_that_of_its_longest_caption(model: DiffusionModel) -> None:
    lengths = model.spec.lengths
    assert lengths is not None
    probe = Probe([], Fakes(CPU), nullcontext, lengths)
    for some in ([SHORT], [SHORT, MIDDLE], [LONG, SHORT]):
        ((inputs, _),) = microbatches_of(model, [some])
        longest = max(int(microbatches_of(model, [[caption]])[0][0][lengths].sum()) for caption in some)
        assert probe.unused(inputs) == inputs[lengths].shape[1] - longest
    assert probe.unused(microbatches_of(model, [[LONG]])[0][0]) == 0
