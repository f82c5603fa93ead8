"""Versions of what diffpipe stands on, whether it can be imported at all, and a compiler for compiled blocks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from diffpipe.config.schema import Config
from diffpipe.doctor.finding import Finding

NEWEST_TORCH = Version("2.15")  # up to this one, in its first two numbers, the tests were run
SHOWN = ("torch", "diffusers", "transformers", "av", "bitsandbytes")  # told of also where nothing is wrong with them
LOADED = ("av", "torch", "bitsandbytes")  # have libraries of their own, which may not fit the system; the last needs the one before


def versions() -> Iterator[Finding]:
    """Python, and every package that diffpipe needs."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    try:
        wanted = [Requirement(text) for text in metadata.requires("diffpipe") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("packages", "warning", "diffpipe is not installed, so that nothing says what it needs", "pip install -e .")
        return
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from _package(requirement)


def _package(requirement: Requirement) -> Iterator[Finding]:
    name, cure = requirement.name, f"pip install '{requirement}'".replace(f"; {requirement.marker}", "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        yield Finding(name, "fault", "is not installed", cure)
        return
    if not requirement.specifier.contains(version, prereleases=True):
        yield Finding(name, "fault", f"{version} does not do, {requirement.specifier} is needed", cure)
    elif name == "torch" and Version(version).release[:2] > NEWEST_TORCH.release[:2]:
        yield Finding(name, "warning", f"{version} is newer than what was tried, {NEWEST_TORCH}", f"pip install 'torch<={NEWEST_TORCH}.*'")
    elif name in SHOWN:
        yield Finding(name, "ok", version)


def imports() -> Iterator[Finding]:
    """The packages whose own libraries do not load here."""
    for name in LOADED:
        try:
            import_module(name)
        except metadata.PackageNotFoundError:
            continue
        except Exception as fault:  # whatever a broken library makes the loader stumble on
            if isinstance(fault, ModuleNotFoundError) and fault.name == name:
                continue  # told of by its version
            said = (str(fault) or type(fault).__name__).splitlines()[0]
            yield Finding(f"import {name}", "fault", said, f"pip install --force-reinstall {name}, of the build for this system")
            if name == "torch":
                return


def video() -> Iterator[Finding]:
    """Whether PyAV decodes what most clips are in."""
    from av.codec import codecs_available

    missing = sorted({"h264", "hevc", "vp9", "av1"} - codecs_available)
    if missing:
        yield Finding("video decoders", "warning", f"PyAV has none for {', '.join(missing)}", "pip install --force-reinstall av, its wheel")


def compiler(config: Config | None) -> Iterator[Finding]:
    """A C compiler that makes a Python module, as torch.compile's kernels need one."""
    needed = config is not None and config.memory.compile
    state, why = ("fault", "which memory.compile needs") if needed else ("warning", "which memory.compile: true would need")
    found = _compiler()
    if found is None:
        cure = "install Visual Studio's build tools" if os.name == "nt" else "apt install build-essential, or set CC to a compiler"
        yield Finding("C compiler", state, f"none, {why}", cure)
        return
    if os.name != "nt" and (said := _refused(found)):
        headers = "Python.h" in said
        cure = "apt install python3-dev, the headers of this Python" if headers else "install another compiler and set CC to it"
        yield Finding("C compiler", state, f"{found} makes nothing, {why}: {said}", cure)
        return
    yield Finding("C compiler", "ok", found)


def _compiler() -> str | None:
    """The path of the compiler that torch and Triton would take."""
    given = os.environ.get("CC")
    return next((path for name in ([given] if given else ["cc", "gcc", "clang", "cl"]) if (path := shutil.which(name))), None)


def _refused(compiler: str) -> str:
    """What a compiler says against a module of one line; nothing where it makes it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.c"
        source.write_text("#include <Python.h>\nint trial(void) { return 0; }\n", encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", str(source.with_suffix(".so")), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as fault:
            return str(fault)
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["it ended with an error"]
    return lines[0] if done.returncode else ""
