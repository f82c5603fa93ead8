"""Two agents of torchrun, a stage each, as on two machines: one is killed with all its processes and started again.

    python -m benchmarks.agents [--namespaces]

Agents talk over loopback, or, with --namespaces (Linux, as root), each from a network namespace of its own over a bridge. The run that
was broken must go on by itself and end with the weights of the unbroken one, bit for bit. Then it shows what is said of a port in use and
of a machine that never comes. Ends with 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.synthetic import BRIEF, ROOT
from diffpipe.checkpoint import list_checkpoints, read_weights

STEPS = 8
SETTINGS = {**BRIEF, "run.steps": STEPS, "mesh.stages": 2}


class Agent:
    """A torchrun with its processes, in a session of its own."""

    def __init__(self, node: Node, output: Path, log: Path, *rendezvous: str) -> None:
        settings = {**SETTINGS, "output_dir": output, "data.cache_dir": output.parent / "cache"}
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", *node.given, *rendezvous]
        command = [*node.enter, sys.executable, *launcher]
        command += ["-m", "diffpipe", "train", str(ROOT / "configs/quickstart.yaml"), *(f"--set={k}={v}" for k, v in settings.items())]
        # Each start has a store of its own: that which torchrun's agents share by default lets none take another's place.
        environment = {**os.environ, **node.environment, "OMP_NUM_THREADS": "1"}
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.log = log
        with open(log, "a") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)

    def kill(self) -> None:
        """As when its machine goes down."""
        members = subprocess.run(["ps", "-o", "pid=,ppid=", "-A"], capture_output=True, text=True, check=True).stdout.split("\n")
        parents = dict(map(int, line.split()) for line in members if line)
        gone = {self.process.pid}
        while found := {child for child, parent in parents.items() if parent in gone} - gone:
            gone |= found
        for each in gone:
            os.kill(each, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        return self.process.wait(timeout=300)


class Node:
    """Where an agent runs.

    Attributes:
        enter: what its command line begins with.
        given: what its torchrun is told besides.
    """

    def __init__(self, enter: Sequence[str] = (), given: Sequence[str] = (), **environment: str) -> None:
        self.enter, self.given, self.environment = enter, given, environment


@contextmanager
def namespaces() -> Iterator[list[Node]]:
    """Two nodes with a network each, joined by a bridge."""
    name = f"dp{os.getpid() % 10000}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    nodes = []
    try:
        ip("link", "add", name, "type", "bridge")
        ip("link", "set", name, "up")
        for number in (1, 2):
            space, inside, outside = f"{name}-{number}", f"{name}i{number}", f"{name}o{number}"
            ip("netns", "add", space)
            ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
            ip("link", "set", outside, "master", name, "up")
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", inside)
            ip("-n", space, "link", "set", inside, "up")
            ip("-n", space, "link", "set", "lo", "up")
            enter = ["ip", "netns", "exec", space]
            nodes.append(Node(enter, [f"--local-addr=10.77.0.{number}"], GLOO_SOCKET_IFNAME=inside))
        yield nodes
    finally:
        for number in (1, 2):
            subprocess.run(["ip", "netns", "del", f"{name}-{number}"], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", name], stderr=subprocess.DEVNULL)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """What the one run there ended with."""
    (run,) = (path.parent for path in output.glob("*/config.yaml"))
    last = list_checkpoints(run / "checkpoints")[-1]
    assert last.name == f"step-{STEPS:08d}", last
    return read_weights(last)


def meeting(address: str, port: int, number: int, conf: str = "") -> list[str]:
    """What torchrun is told of the rendezvous; the first of the nodes holds its store."""
    first = str(number == 0).lower()
    return ["--rdzv_id=benchmark", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}:{port}", f"--rdzv_conf=is_host={first}{conf}"]


def unbroken(nodes: Sequence[Node], home: Path, address: str) -> dict[str, torch.Tensor]:
    agents = [Agent(node, home / "unbroken", home / f"unbroken-{i}.log", *meeting(address, 29513, i)) for i, node in enumerate(nodes)]
    check([agent.end() for agent in agents] == [0, 0], "two agents train", agents)
    return weights(home / "unbroken")


def broken(nodes: Sequence[Node], home: Path, address: str) -> dict[str, torch.Tensor]:
    """The agent that does not hold the store is killed once there is a checkpoint."""
    output = home / "broken"
    agents = [Agent(node, output, home / f"broken-{i}.log", *meeting(address, 29514, i)) for i, node in enumerate(nodes)]
    while not list(output.glob("*/checkpoints/step-*")):
        check(all(agent.process.poll() is None for agent in agents), "until the first checkpoint", agents)
        time.sleep(0.02)
    agents[1].kill()
    begun = time.monotonic()
    agents[1] = Agent(nodes[1], output, home / "broken-again.log", *meeting(address, 29514, 1))
    check([agent.end() for agent in agents] == [0, 0], "an agent is killed and started again", agents)
    log = next(output.glob("*/log.txt")).read_text()
    check("resumed from step-" in log, "goes on from a checkpoint", agents)
    print(f"an agent killed and started again: ended {time.monotonic() - begun:.0f} s later", flush=True)
    return weights(output)


def check(holds: bool, what: str, agents: Sequence[Agent]) -> None:
    if not holds:
        for agent in agents:
            if agent.process.poll() is None:
                agent.kill()
        raise SystemExit(f"not so: {what}\n" + "\n".join(agent.log.read_text()[-3000:] for agent in agents))


def told(what: str, agent: Agent) -> None:
    """What an agent that cannot begin says, and when."""
    begun = time.monotonic()
    code = agent.end()
    check(code != 0, f"{what} is a fault", [agent])
    lines = [line for line in agent.log.read_text().splitlines() if "Error" in line]
    print(f"{what}: exit code {code} after {time.monotonic() - begun:.0f} s: {lines[-1].strip() if lines else ''}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--namespaces", action="store_true")
    given = options.parse_args()
    if not given.namespaces:
        return run([Node(), Node()], "127.0.0.1")
    with namespaces() as nodes:
        return run(nodes, "10.77.0.1")


def run(nodes: Sequence[Node], address: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        expected, got = unbroken(nodes, home, address), broken(nodes, home, address)
        same = expected.keys() == got.keys() and all(torch.equal(got[key], value) for key, value in expected.items())
        print(f"weights after {STEPS} steps are {'the same bits' if same else 'NOT THE SAME'}", flush=True)
        alone = meeting(address, 29515, 0, ",join_timeout=10")
        told("a machine that never comes", Agent(nodes[0], home / "alone", home / "alone.log", *alone))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            static = ["--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={taken.getsockname()[1]}"]
            told("a port in use", Agent(Node(), home / "taken", home / "taken.log", *static))
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
