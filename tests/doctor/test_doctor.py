"""`diffpipe doctor` names what is wrong with a machine, with the cure, and ends with 1 where a run would stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffpipe.config.load import load_config
from diffpipe.doctor import machine, software
from diffpipe.doctor.devices import runs
from diffpipe.doctor.finding import Finding
from diffpipe.doctor.reach import torchrun_port
from tests.conftest import ROOT, Command

posix = pytest.mark.skipif(os.name == "nt", reason="sets limits that Windows does not have")


def doctor(*arguments: str, limits: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a process of its own, with limits set by a shell where asked for."""
    path = [environment.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
    command = [sys.executable, "-m", "diffpipe", "doctor", *arguments]
    if limits:
        command = ["/bin/sh", "-c", f'{limits}; exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_machine_that_tests_run_on_has_no_fault_and_its_parts_are_told_of(command: Command) -> None:
    done = command("doctor")
    lines = done.stdout.splitlines()
    for name in ("python", "torch", "diffusers", "transformers", "av", "gloo"):
        assert any(line.startswith("ok") and f" {name}: " in line for line in lines), (name, done.stdout)
    for name in ("disk of runs", "host memory"):  # how much is free is the machine's affair
        assert any(line.startswith(("ok", "warning")) and f" {name}: " in line for line in lines), (name, done.stdout)
    assert "2 processes added up 16 MiB" in done.stdout and lines[-1].endswith("0 faults")


@posix
def test_planted_faults_are_named_with_their_cures(tmp_path: Path) -> None:
    """An old package, one that does not load, no compiler, a disk that takes no more, few open files, no network interface, a driver
    without a fitting torch."""
    tools, packages = tmp_path / "tools", tmp_path / "packages"
    (packages / "diffusers-0.12.0.dist-info").mkdir(parents=True)
    (packages / "diffusers-0.12.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.12.0\n")
    (packages / "av").mkdir()
    (packages / "av" / "__init__.py").write_text("raise OSError('libavcodec.so.99: cannot open shared object file')\n")
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA Planted (UUID: GPU-0)'\n")
    (tools / "nvidia-smi").chmod(0o755)
    done = doctor(
        str(ROOT / "configs" / "quickstart.yaml"),
        "--set=memory.compile=true",
        f"--set=output_dir={tmp_path / 'runs'}",
        limits="ulimit -n 200; ulimit -f 2000",
        PATH=str(tools),
        PYTHONPATH=str(packages),
        GLOO_SOCKET_IFNAME="planted0",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    planted = {
        "diffusers": ("0.12.0 does not do", "pip install 'diffusers>="),
        "import av": ("libavcodec.so.99", "--force-reinstall av"),
        "C compiler": ("none, which memory.compile needs", "apt install build-essential"),
        "disk of runs": ("File too large", "allow larger files"),
        "open files": ("at most 200", "ulimit -n 65536"),
        "GPU": ("nvidia-smi lists 1", ""),
        "gloo": ("planted0", "GLOO_SOCKET_IFNAME is planted0"),
    }
    for name, (found, cure) in planted.items():
        number = next(i for i, line in enumerate(lines) if f" {name}: " in line)
        assert lines[number].startswith("fault") and found in lines[number], lines[number]
        assert lines[number + 1].strip().startswith("cure: ") and cure in lines[number + 1]
    assert lines[-1].endswith(f"{len(planted)} faults")
    assert not list(tmp_path.glob("**/.diffpipe-doctor*")), "the trial leaves nothing behind"


def test_a_port_that_another_program_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        finding = torchrun_port()
    assert finding.state == "warning" and "is taken" in finding.found and "--master_port" in finding.cure
    assert torchrun_port().state == "ok"
    for named in ("99999", "any"):
        monkeypatch.setenv("MASTER_PORT", named)
        assert torchrun_port().state == "fault" and named in torchrun_port().found


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    finding = machine.disk("disk", tmp_path / "file" / "runs")
    assert finding.state == "fault" and f"{tmp_path / 'file'} is a file" in finding.found
    good = machine.disk("disk", tmp_path / "not yet" / "there")
    assert "writes" in good.found and "free" in good.found and list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that is read-only even for root")
def test_a_folder_that_may_not_be_written_is_named() -> None:
    finding = machine.disk("disk", Path("/proc/runs"))
    assert finding.state == "fault" and "/proc/runs cannot be written" in finding.found


@posix
@pytest.mark.parametrize(
    ("script", "told"), [("exit 1", "ended with an error"), ("echo 'x.c: error: no room' >&2; exit 1", "error: no room")]
)
def test_a_compiler_that_makes_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    compiled = load_config(ROOT / "configs" / "quickstart.yaml", ["memory.compile=true"])
    (finding,) = software.compiler(compiled)
    assert finding.state == "fault" and str(compiler) in finding.found and told in finding.found
    (finding,) = software.compiler(None)
    assert finding.state == "warning"


def test_every_finding_that_is_not_well_has_a_cure() -> None:
    found: list[Finding] = [*software.versions(), *machine.limits(None), machine.host_memory()]
    assert all(finding.cure for finding in found if finding.state != "ok")


@pytest.mark.parametrize(
    ("arch", "capability", "fits"),
    [
        ("sm_86", (8, 6), True),
        ("sm_86", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90", (12, 0), False),
        ("sm_120", (12, 0), True),
        ("compute_90", (12, 0), True),
        ("gfx942", (9, 4), True),
    ],
)
def test_code_runs_on_cards_of_its_generation(arch: str, capability: tuple[int, int], fits: bool) -> None:
    assert runs(arch, capability) == fits


def test_a_config_that_does_not_hold_is_a_clear_error(tmp_path: Path) -> None:
    done = doctor(str(tmp_path / "none.yaml"))
    assert done.returncode == 1 and "no such file" in done.stderr and "Traceback" not in done.stderr
