"""What a run would do, told before anything is read or encoded."""

from __future__ import annotations

from diffpipe.config.schema import Config
from diffpipe.export.run import check_formats
from diffpipe.models import make_model
from diffpipe.optim import check_optimizer
from diffpipe.pipeline.build import outline
from diffpipe.pipeline.cut import expand
from diffpipe.pipeline.split import stage_bytes
from diffpipe.toy import materialize


def dry_run(config: Config) -> str:
    """The plan of a config as text: mesh, stages with their units and weights, what trains, samples per step.

    Raises:
        DiffpipeError: for what would stop the run before its first step and needs no data to find out.
    """
    config = materialize(config)
    model = make_model(config.model, config.objective)
    whole, spans = outline(config, model)
    model.weights()
    check_formats(config, model)
    check_optimizer(config.optimizer, apart=config.adapter is None and bool(config.memory.swap))
    units = expand(whole, model.spec.units)
    sizes = stage_bytes(whole, model.spec)
    count = sum(p.numel() for p in whole.parameters())
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    mesh, batch = config.mesh, config.batch
    lines = [
        f"{model.title}: {count / 1e9:.3f} B parameters, {trained / 1e6:.2f} M of them trained in {config.model.trainable_dtype}",
        f"{mesh.stages * mesh.replicate} processes: {mesh.stages} stages x {mesh.replicate} replicas",
    ]
    share = sum(sizes)
    for i, (start, stop) in enumerate(spans):
        lines.append(
            f"  stage {i}: {units[start]} to {units[stop - 1]}, {stop - start} units, {sum(sizes[start:stop]) / share:.0%} of the weights"
        )
    lines.append(
        f"{batch.micro * batch.accumulate * mesh.replicate} samples a step: "
        f"micro {batch.micro} x accumulate {batch.accumulate} x replicate {mesh.replicate}"
    )
    lines.append(f"ends after {' or '.join(f'{n} {w}' for n, w in ((config.run.steps, 'steps'), (config.run.epochs, 'epochs')) if n)}")
    return "\n".join(lines)
