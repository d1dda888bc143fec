"""A real SLURM of several nodes on this one machine, for the integration tests: munge, slurmctld, one slurmd per node.

Needs root (each node gets its own host name and hosts file in a mount namespace of its own) and Debian's packages
`slurmctld slurmd slurm-client munge`. Everything lives in one folder, with its own key, ports, addresses and job numbers:
several clusters may run side by side, nothing of the machine's own is touched, and `stop` ends what was started, only that.

    with SlurmCluster(nodes=2) as cluster:
        cluster.run("sinfo")
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest

from tests.patience import patience
from tests.require import require, require_program

CONF = """
ClusterName=geoloom
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again: 120 s by default, 5 at least
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
FirstJobId={first_job}
SlurmctldParameters=preempt_send_user_signal
# short timers, so that failures show in seconds
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
CompleteWait=0
InactiveLimit=0
MinJobAge=600
OverTimeLimit=0
BatchStartTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=10000,batch_sched_delay=0
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


class SlurmCluster:
    """`nodes` nodes with `cpus` CPUs and `gpus` fake GPUs each; partitions `train` (default, preemptable) and `urgent`."""

    def __init__(self, nodes: int = 2, cpus: int = 4, gpus: int = 1) -> None:
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        self.cpus, self.gpus = cpus, gpus
        self.root = Path(
            tempfile.mkdtemp(prefix="gls-", dir="/tmp")
        )  # short: a socket's path holds at most 108 characters
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    # --- life

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(keep=error is not None)

    def stop(self, keep: bool = False) -> None:
        """Cancels every job, ends our daemons and whatever their jobs left behind, removes the folder."""
        if "slurmctld" in self.daemons:
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.run("scancel", "--user=root", check=False)
        for name in [*self.names, "slurmctld", "munged"]:
            self._end(name)
        for process in self._processes_of(None):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if not keep or os.environ.get("GEOLOOM_KEEP_SLURM") != "1":
            shutil.rmtree(self.root, ignore_errors=True)

    def start_node(self, name: str) -> None:
        """Brings a node up, with its own host name and hosts file (no DNS: a reverse look-up would wait 10 s on it)."""
        inner = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf; ' \
                'exec slurmd -D -f "$2/slurm.conf" -N "$1"'  # fmt: skip
        self._spawn(name, ["unshare", "--uts", "--mount", "bash", "-c", inner, "_", name, str(self.root)])

    def crash_node(self, name: str) -> None:
        """A power cut: slurmd, its step daemons and every task on the node die at once."""
        daemon = self.daemons.pop(name)
        doomed = self._processes_of(name)
        for process in [daemon.pid, *doomed]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        daemon.wait()

    def crash_controller(self) -> None:
        """kill -9 of slurmctld. Nodes and what runs on them go on; it comes back with `start_controller`."""
        daemon = self.daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait()

    def start_controller(self) -> None:
        """Starts slurmctld; it takes up what it had saved."""
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.root / "slurm.conf")])

    def has_saved(self, text: str) -> bool:
        """Whether the controller's state on disk holds `text`, say a job's working directory: one that is killed forgets what it
        has not saved (it does so some seconds after each change)."""
        try:
            return text.encode() in (self.root / "state" / "job_state").read_bytes()
        except FileNotFoundError:
            return False

    # --- use

    def run(self, *command: str, check: bool = True, timeout: float = 30, cwd: Path | None = None) -> str:
        """stdout of a SLURM command run against this cluster."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout * patience(),
            check=False,
            cwd=cwd,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as key → value; an array or a job it no longer knows: empty or its first element."""
        text = self.run("scontrol", "-o", "show", "job", job, check=False).splitlines()
        pairs = [word.partition("=") for word in text[0].split(" ")] if text else []
        return {key: value for key, separator, value in pairs if separator}

    def wait(self, condition: Callable[[], object], what: str, timeout: float = 60) -> object:
        """Polls until `condition` holds and returns its value. On a machine with more to do than cores it is more patient."""
        end = time.monotonic() + timeout * patience()
        while not (value := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {timeout:.0f} s\n{self.run('squeue', '-l', check=False)}")
            time.sleep(0.1)
        return value

    def wait_state(self, job: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Waits for one of `states`; fails at once when the job has ended in another."""

        def reached() -> bool:
            state = self.job(job).get("JobState")
            if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") and state not in states:
                raise AssertionError(f"job {job} ended {state}, awaited was {' or '.join(states)}")
            return state in states

        self.wait(reached, f"job {job} {' or '.join(states)}", timeout)
        return self.job(job)

    def task_processes(self, name: str, job: str) -> list[int]:
        """Processes of a job's tasks on a node, shells first, without SLURM's own."""
        return [p for p in self._processes_of(name, job) if _comm(p) not in ("slurmstepd", "slurmd", "srun")]

    # --- inside

    def _configure(self) -> None:
        for folder in ("state", "log", "dev", *[f"spool/{name}" for name in self.names]):
            (self.root / folder).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "munge").mkdir(mode=0o700)
        key = self.root / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = _free_ports(1 + len(self.names))
        network = f"127.{random.randint(1, 250)}.{random.randint(1, 250)}"
        addresses = {name: f"{network}.{i}" for i, name in enumerate(self.names, 1)}
        hosts = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        switch = [line for line in Path("/etc/nsswitch.conf").read_text().splitlines() if not line.startswith("hosts:")]
        (self.root / "nsswitch.conf").write_text("\n".join([*switch, "hosts: files", ""]))
        gres = f" Gres=gpu:fake:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={addresses[name]} Port={port} CPUs={self.cpus} "
            f"RealMemory=16000{gres} State=UNKNOWN"
            for name, port in zip(self.names, ports[1:])
        )
        conf = CONF.format(
            root=self.root, host=socket.gethostname(), ctld_port=ports[0], nodes=nodes,
            first_job=random.randint(1000, 19000),
        )  # fmt: skip
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "cgroup.conf").write_text("ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n")
        for gpu in range(self.gpus):  # GRES wants device files: clones of /dev/null do
            os.mknod(self.root / "dev" / f"gpu{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        devices = f"File={self.root}/dev/gpu[0-{self.gpus - 1}]"
        lines = [f"NodeName={name} Name=gpu Type=fake {devices}" for name in self.names] if self.gpus else []
        (self.root / "gres.conf").write_text("\n".join([*lines, ""]))

    def _start_daemons(self) -> None:
        munge = self.root / "munge"
        self._spawn(
            "munged",
            ["munged", "--foreground", "--force", f"--key-file={munge}/munge.key", f"--socket={self.root}/munge.socket",
             f"--pid-file={munge}/munged.pid", f"--log-file={munge}/munged.log", f"--seed-file={munge}/munged.seed"],
        )  # fmt: skip
        self.wait((self.root / "munge.socket").exists, "munged's socket", 20)
        self.start_controller()
        for name in self.names:
            self.start_node(name)

        def idle() -> bool:
            return self.run("sinfo", "-h", "-o", "%t", "-N", "-p", "train", check=False).split() == ["idle"] * len(
                self.names
            )

        self.wait(idle, f"{len(self.names)} idle nodes (logs under {self.root}/log)", 40)

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _end(self, name: str) -> None:
        daemon = self.daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _processes_of(self, name: str | None, job: str | None = None) -> list[int]:
        """Processes that carry this cluster's SLURM_CONF (the node's name, the job), and the step daemons above them."""
        found: set[int] = set()
        for process, environment in _environments():
            inside = (
                environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURMD_NODENAME" in environment
            )
            if (
                inside
                and name in (None, environment["SLURMD_NODENAME"])
                and job in (None, environment.get("SLURM_JOB_ID"))
            ):
                found.add(process)
                parent = _parent(process)
                if _comm(parent) == "slurmstepd":
                    found.add(parent)
        return sorted(found)


@contextlib.contextmanager
def slurm_cluster(nodes: int = 2, cpus: int = 4, gpus: int = 1) -> Iterator[SlurmCluster]:
    """`SlurmCluster`, or a skip that says what is missing."""
    require_program("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    require(os.geteuid() == 0, "root (for one mount namespace per node)", "run the tests as root in a container or VM")
    with SlurmCluster(nodes, cpus, gpus) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Two nodes for the tests of one module."""
    with slurm_cluster() as cluster:
        yield cluster


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed test run leaves no daemons behind


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _environments() -> Iterator[tuple[int, Mapping[str, str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "environ").read_bytes().split(b"\0")
                yield int(folder.name), dict(w.decode(errors="replace").partition("=")[::2] for w in words if w)


def _parent(process: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _comm(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""
