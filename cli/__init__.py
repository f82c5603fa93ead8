"""The command line: one command a function, no logic and nothing heavy imported until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffpipe.cli.console import run_command

app = typer.Typer(
    help="Train diffusion models that do not fit one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CFG", help="Config file (YAML).", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.", show_default=False)]


@app.command()
def init(
    output: Annotated[Path, typer.Argument(metavar="[CFG]", help="File to write.")] = Path("config.yaml"),
    family: Annotated[str | None, typer.Option(metavar="NAME", help="Model family.", show_default="asked for")] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help="Its folder, file or hf: name.", show_default="asked for")] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of media.", show_default="asked for")] = None,
    controls: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of control pictures.", show_default="asked for")] = None,
    card: Annotated[float | None, typer.Option(metavar="GB", help="Memory of the card.", show_default="asked for")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="Cards of that size.", show_default="asked for")] = None,
    what: Annotated[str | None, typer.Option("--train", metavar="WHAT", help="lora or full.", show_default="asked for")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="N", min=1, help="Side in pixels.", show_default="asked for")] = None,
    frames: Annotated[str | None, typer.Option(metavar="N,N", help="Frame counts of clips.", show_default="asked for")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take what is usual where no option says.")] = False,
) -> None:
    """Ask a few questions and write a config that fits the card. Every question may be answered by an option."""
    from diffpipe.cli.init import init_command

    given = {"family": family, "model": model, "data": data, "controls": controls, "card": card, "gpus": gpus, "train": what}
    run_command(lambda: init_command(output, {**given, "resolution": resolution, "frames": frames}, yes))


@app.command()
def train(
    config: ConfigFile,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="[RUN]", help="Go on with RUN (name or folder); without RUN, the newest.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - Typer reads the default, nothing changes it
) -> None:
    """Encode what is not cached yet, then train. Under torchrun, one process per GPU."""
    from diffpipe.cli.train import train_command

    run_command(lambda: train_command(config, overrides, resume))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    card: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for this card, such as 'RTX 4090'.", show_default="the one here")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Compare all meshes of N devices instead.", show_default="the config's mesh")
    ] = None,
) -> None:
    """Show what a run would hold, copy and take; needs no GPU. By stage and bucket, with what is chosen by itself."""
    from diffpipe.cli.plan import plan_command

    run_command(lambda: plan_command(config, overrides, card, devices))


@app.command()
def cache(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte first; what is damaged is encoded again.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Encode again what is cached too.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove afterwards what this config does not use.")] = False,
) -> None:
    """Encode the data of a config, and train nothing. Tells what was encoded, reused and left out."""
    from diffpipe.cli.cache import cache_command

    run_command(lambda: cache_command(config, overrides, verify, rebuild, prune))


@app.command()
def inspect(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder for pictures.", show_default="OUTPUT_DIR/inspect")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Also encode some samples and show what the VAE gives back.")] = False,
) -> None:
    """Show buckets, captions, dropped files and every crop. Trains and caches nothing."""
    from diffpipe.cli.inspect import inspect_command

    run_command(lambda: inspect_command(config, overrides, output, decode))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="Run folder, or adapter file.", show_default=False)],
    formats: Annotated[list[str], typer.Option("--to", "--format", metavar="FORMAT", help="diffusers, comfyui, kohya; repeatable.")] = [  # noqa: B006
        "diffusers"
    ],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="STEP|best", help="RUN: step of the checkpoint, or best.", show_default="the newest")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to.", show_default="RUN/exports/step-N, or FILE's")
    ] = None,
    form: Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="FILE: format it must have.", show_default="any")] = None,
    family: Annotated[str | None, typer.Option(metavar="FAMILY", help="FILE: family it is for.", show_default="as its header says")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="FILE: folder or file of its model.", show_default="the released size")
    ] = None,
) -> None:
    """Take weights out of a checkpoint, or rename an adapter file. RUN's are those that it trained."""
    from diffpipe.cli.export import export_command

    run_command(lambda: export_command(source, formats, checkpoint, output, form, family, base))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="What to sample; repeatable.", show_default="the run's preview.prompts")
    ] = [],  # noqa: B006
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What to guide it away from.", show_default="as preview")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Decides the noise.", show_default="as preview")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps from noise to a picture.", show_default="as preview")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="SCALE", help="Guidance scale.", show_default="as preview")] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Pixels across.", show_default="as preview")] = None,
    height: Annotated[int | None, typer.Option(metavar="N", help="Pixels down.", show_default="as preview")] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", help="Frames of a clip.", show_default="as preview")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture that each prompt begins from.", show_default="none")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="STEP|best", help="Step of the checkpoint, or best.", show_default="the newest")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default="RUN/samples/step-N")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Sample pictures or clips with the weights of a run's checkpoint. Under torchrun, on its mesh."""
    from diffpipe.cli.sample import sample_command

    own = {"negative": negative, "image": None if image is None else str(image)}
    preview = {"seed": seed, "steps": steps, "guidance": guidance, "width": width, "height": height, "frames": frames}
    run_command(lambda: sample_command(run, prompt, own, preview, checkpoint, output, overrides))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="OLD", help="Main config of diffusion-pipe (TOML).", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="NEW", help="File to write (YAML).", show_default="the screen")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="GPUs that it ran on.", show_default="one for each pipeline stage")
    ] = None,
) -> None:
    """Turn diffusion-pipe's configs into one of ours. Reads the dataset configs too, and tells what became of every key."""
    from diffpipe.cli.convert import convert_command

    run_command(lambda: convert_command(source, output, gpus))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CFG]", help="Config of the run to come.", show_default=False)] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Look for what would stop a run here, with its cure. Versions, GPUs, disks, limits, and how processes meet."""
    from diffpipe.cli.doctor import doctor_command

    run_command(lambda: doctor_command(config, overrides))


@app.command()
def models(markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False) -> None:
    """List the model families and what each supports."""
    from diffpipe.cli.models import models_command

    run_command(lambda: models_command(markdown))


@app.command()
def schema(
    reference: Annotated[bool, typer.Option("--reference", help="Print every key with its default as YAML instead.")] = False,
) -> None:
    """Print the JSON Schema of the config, for editors."""
    from diffpipe.cli.schema import schema_command

    run_command(lambda: schema_command(reference))


def main() -> None:
    """Run the command line; `--resume` may stand without a run."""
    from diffpipe.cli.console import fill_bare_resume

    app(args=fill_bare_resume())
