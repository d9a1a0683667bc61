"""torchrun in place of a cluster's scheduler: a script that each machine runs, one config after the other."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hhbench.errors import UsageError
from hhbench.result import TOLD
from hhbench.stopping import USUAL_NOTICE

FIRST_PORT = 29_400


@dataclass(frozen=True, kw_only=True)
class Work:
    """One config to run: its file, where its result is told, what it says, and further flags of `hhbench run`."""

    config: Path
    told: Path
    log: Path
    flags: Sequence[str] = ()


def script(works: Sequence[Work], *, hosts: Sequence[str], devices: int, workdir: Path) -> str:
    """A script of shell. With hosts, its one argument is the machine's number: 0 for the first of them.

    A config that fails doesn't keep the later ones from running; the exit code is 1 then.

    Args:
        hosts: the machines; none where this one is enough.
        devices: processes on each.
    """
    lines = [
        "#!/bin/bash",
        "# Written by hhbench submit. To start again what isn't done: run this file again.",
        f"cd {shlex.quote(str(workdir))} || exit",
        "trap 'exit 130' INT",
        "trap 'exit 143' TERM",
        "set -o pipefail",
        # What is told to stop ends its step and keeps a checkpoint: torch 2.12 and later give it this long, not 30 s.
        f'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{USUAL_NOTICE // 2}}}"',
        "failed=0",
    ]
    for i, work in enumerate(works):
        run = [sys.executable, "-u", "-m", "torch.distributed.run", f"--nproc-per-node={devices}"]
        if hosts:
            # A port for each config: a machine that is ahead must not meet the one before.
            run += [f"--nnodes={len(hosts)}", f"--master-addr={hosts[0]}", f"--master-port={FIRST_PORT + i % 1000}"]
        else:
            run += ["--standalone"]
        number = ' --node-rank="$1"' if hosts else ""
        rest = ["-m", "hhbench", "run", "--config", str(work.config), *work.flags, "--resume"]
        told = f"{TOLD}={shlex.quote(str(work.told))}"
        earlier = shlex.join(["rm", "-f", f"{work.told}.failed", f"{work.told}.stopped"])
        lines.append(f'[ "$1" != 0 ] || {earlier}' if hosts else earlier)
        tee = shlex.join(["tee", "-ai", str(work.log)])  # not ended by Ctrl-C before what it listens to
        lines.append(f"{told} {shlex.join(run)}{number} {shlex.join(rest)} 2>&1 \\\n  | {tee} || failed=1")
    return "\n".join([*lines, 'exit "$failed"']) + "\n"


def commands(script: Path, hosts: Sequence[str]) -> list[str]:
    """What starts a script: a command for each host, in their order, or the one for this machine."""
    if not hosts:
        return [f"bash {shlex.quote(str(script))}"]
    return [f"on {host}: bash {shlex.quote(str(script))} {number}" for number, host in enumerate(hosts)]


def hosts_of(text: str | None, nodes: int) -> list[str]:
    """The machines of --hosts; none where one is enough.

    Raises:
        UsageError: they are not as many as the machines asked for.
    """
    hosts = [host.strip() for host in text.split(",") if host.strip()] if text else []
    if nodes == 1 and len(hosts) <= 1:
        return []
    if len(hosts) != nodes:
        raise UsageError(
            f"--num-nodes {nodes} needs the names of {nodes} machines, as --hosts a,b; {len(hosts)} are given"
        )
    if len(set(hosts)) < nodes:
        raise UsageError(f"--hosts {text} names a machine twice")
    return hosts
