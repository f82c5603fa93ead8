"""Exports from a checkpoint of an earlier run, and adapter files from one program's names to another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from diffpipe.checkpoint import read_weights
from diffpipe.config.load import load_config
from diffpipe.config.schema import ExportFormat, ModelConfig, ObjectiveConfig
from diffpipe.errors import ConfigError
from diffpipe.export.run import export_tensors, write_adapter
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.models.adapter_files import form_of, read_adapter
from diffpipe.models.adapters import plain_name
from diffpipe.models.weights import lazily, read_metadata
from diffpipe.run import checkpoint_of, config_file


def export_run(run: Path, *, formats: Sequence[str], step: int | Literal["best"] | None = None, output: Path | None = None) -> list[Path]:
    """Write the weights that a run had at a checkpoint.

    Args:
        run: its folder.
        formats: of ``ExportFormat``.
        step: which checkpoint; "best" takes the one with the lowest held-out loss, None the newest.
        output: the folder to write to; None is ``exports/step-N`` in the run.

    Raises:
        DiffpipeError: when the run or the checkpoint is not there, or a format is unknown.
    """
    _check_formats(formats)
    checkpoint = checkpoint_of(run, step)
    config = load_config(config_file(run))
    if config.adapter is None and "kohya" in formats:
        raise ConfigError("kohya names are for adapters", where="--to", expected="diffusers or comfyui for whole weights")
    weights = {plain_name(name): lazily(t.shape, t.dtype, lambda t=t: t) for name, t in read_weights(checkpoint).items()}
    return export_tensors(config, make_model(config.model, config.objective), weights, output or run / "exports" / checkpoint.name, formats)


def export_file(
    file: Path,
    *,
    formats: Sequence[str],
    source: str | None = None,
    family: str | None = None,
    base: str | None = None,
    output: Path | None = None,
) -> list[Path]:
    """Write an adapter file under the names of other programs.

    Args:
        file: a safetensors file with the names of any of the formats.
        formats: of ``ExportFormat``.
        source: the format that ``file`` must have; None takes what it has.
        family: whose adapter it is; None goes by what diffpipe wrote into the file's header.
        base: the diffusers folder or the denoiser's file of the model that it adapts; None takes the family's released size.
        output: the folder to write to; None is the file's own.

    Raises:
        DiffpipeError: when the file is no adapter of the family, or cannot be written.
    """
    _check_formats([*formats, *([source] if source else [])])
    about = read_metadata(file)
    family = family or about.get("diffpipe.family")
    if family is None:
        raise ConfigError(
            "the file does not say which family it is for", where=str(file), expected=", ".join(sorted(MODELS)), fix="name it with --family"
        )
    kind = model_class(family)
    # An adapter may be one of text encoders too, wherever these can be trained.
    given: dict[str, Any] = {"train_text_encoders": "model.train_text_encoders" in kind.options}
    if base is not None and Path(base).is_file():
        given["files"] = {kind.component: base}
    elif base is not None:
        given["path"] = base
    model = make_model(ModelConfig(family=family, **given), ObjectiveConfig())
    found = form_of(file, model)
    if source is not None and found != source:
        raise ConfigError(f"its names are those of {found}", where=str(file), expected=source, fix="leave --from out, or correct it")
    tensors = read_adapter(file, model)
    dtype = next(t.dtype for t in tensors.values())
    stem = file.stem.removesuffix(f"-{found}")
    kept = {k: v for k, v in about.items() if k.startswith("diffpipe.")} | {"diffpipe.family": family}
    return [write_adapter(tensors, model, kind, (output or file.parent) / f"{stem}-{kind}.safetensors", dtype, kept) for kind in formats]


def _check_formats(formats: Sequence[str]) -> None:
    unknown = [f for f in formats if f not in get_args(ExportFormat)]
    if unknown:
        raise ConfigError(f"there is no format {unknown[0]!r}", where="--to", expected=", ".join(get_args(ExportFormat)))
