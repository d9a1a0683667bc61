"""A real Slurm on this machine: a controller, two nodes and munge, with their own folder, ports and processes.

Every node lives in its own namespaces: it has its own host name and process ids, and when its daemon dies everything
on it dies, as on a machine that loses power. Nothing outside the folder is written, everything listens on 127.0.0.1,
and each worker of pytest-xdist has a cluster of its own, so that no test sees another's jobs.

    python tests/slurm_cluster.py COMMAND ...      runs a command with such a cluster, and stops it
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NODES = ("node1", "node2")
NEEDED = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")

# cred_expire=5: a requeued job may start again after that, in place of two minutes.
# KillWait=15, of 30 by default: from SIGTERM to SIGKILL. Processes that are still starting need it.
# preempt_send_user_signal: a job that is preempted is sent its own --signal, and has GraceTime to save.
CONFIGURATION = """\
ClusterName=hhbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
KillWait=15
OverTimeLimit=0
MinJobAge=600
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=1-00:00:00 PriorityTier=1 GraceTime=20
PartitionName=high Nodes=node[1-2] MaxTime=1-00:00:00 PriorityTier=10
"""

# Its own mounts, so that the nodes' names resolve there and nowhere else; its own host name; its own processes.
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if lacking:
        return f"Slurm is not installed: no {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return None


def until(what: str, condition: Callable[[], T], seconds: float = 60) -> T:
    """Wait for a condition to hold, and return what it found.

    Raises:
        TimeoutError: it never did.
    """
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


class Cluster:
    """A Slurm under way.

    Attributes:
        folder: its configuration, state and logs.
        environment: what a client of it, and every job, has in its environment.
        namespaced: whether the nodes have host names of their own, which only they resolve.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        allowed = subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode == 0
        self.namespaced = allowed
        if not allowed:  # a container that may not: all ranks are on this host
            self.environment["MASTER_ADDR"] = "127.0.0.1"

    def start(self) -> None:
        """Start every daemon, and wait until both nodes are idle."""
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname().partition(".")[0],
                ports=_free_ports(3),
                # A port of the rendezvous is made of the job's id: clusters side by side have ids far apart.
                first_job=random.SystemRandom().randrange(1000, 60000),
            )
        )
        names = "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        self._start_munge()
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        for node in NODES:
            self.start_node(node)
        self.until_idle()

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        command = ["munged", "--foreground", f"--key-file={key}", f"--socket={folder / 'socket'}"]
        command += [f"--{name}-file={folder / name}" for name in ("pid", "log", "seed")]
        self._start("munged", command, user="munge", group="munge", extra_groups=[])
        self.until("munge answers", lambda: self._succeeds("munge", "-n", "-S", str(folder / "socket")))

    def _start(self, name: str, command: list[str], **arguments: Any) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            # A session of its own: Ctrl-C of the tests doesn't reach a daemon before its jobs are gone.
            self.daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True, **arguments
            )

    def start_node(self, node: str) -> None:
        """Start a node, or start it again."""
        command = ["slurmd", "-D", "-N", node]
        if self.namespaced:
            # No exec: bash is the node's first process, and buries what loses its parent.
            inside = f'mount --bind "{self.folder}/hosts" /etc/hosts && hostname {node} && "$@"; exit'
            command = [*NAMESPACES, "bash", "-c", inside, "slurmd", *command]
        self._start(node, command)

    def kill_node(self, node: str) -> None:
        """As if it lost power: its daemon is killed, and in a namespace everything else on it with it."""
        os.kill(self.first_process(node), signal.SIGKILL)
        self.daemons[node].wait()

    def first_process(self, node: str) -> int:
        """The node's daemon; in a namespace the process that the kernel ends all others with."""
        pid = self.daemons[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text()) if self.namespaced else pid

    def until_idle(self) -> None:
        """Wait until both nodes have nothing to do."""

        def idle() -> bool:
            shown = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False).stdout.split("\n")
            return {f"{node} idle" for node in NODES} <= set(shown)

        self.until("both nodes are idle", idle)

    def until(self, what: str, condition: Callable[[], T], seconds: float = 60) -> T:
        """`until`, with the ends of the daemons' logs in the complaint."""
        try:
            return until(what, condition, seconds)
        except TimeoutError as error:
            logs = sorted((self.folder / "log").iterdir())
            ends = "\n".join(f"{log.name}: {' | '.join(log.read_text().splitlines()[-5:])}" for log in logs)
            raise TimeoutError(f"{error}\n{self.run('squeue', '-t', 'all', check=False).stdout}\n{ends}") from error

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a client, or anything else, in the cluster's environment."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=check
        )

    def _succeeds(self, *command: str) -> bool:
        return self.run(*command, check=False).returncode == 0

    def jobs(self, job: str) -> dict[str, str]:
        """The state of every element of a job, by its id as squeue writes it (`7_0`)."""
        shown = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").stdout
        return dict(line.split() for line in shown.splitlines())

    def stop(self) -> None:
        """Cancel every job, and end the processes that were started here, by their ids."""
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
                self.run("scancel", "--user=root", check=False, timeout=10)
                if all(self.daemons[node].poll() is None for node in NODES):
                    until("the jobs are gone", lambda: not self.run("squeue", "-h", timeout=10).stdout, 20)
        for name in reversed(self.daemons):
            if self.daemons[name].poll() is None:
                self.kill_node(name) if name in NODES else self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def started() -> Iterator[Cluster]:
    """A cluster, stopped at the end."""
    # Not below pytest's own folder: munge's user must reach its socket, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with started() as one:
        sys.exit(subprocess.run(sys.argv[1:], env=one.environment, check=False).returncode)
