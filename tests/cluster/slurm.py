"""A real Slurm on this machine's loopback: munged, slurmctld and a slurmd for each node, with private configuration, keys and ports.

Each slurmd lives in mount, host-name and process namespaces of its own, so that ``hostname`` and /etc/hosts behave as on a real node, and
nothing of this machine's configuration is read or changed. Ends only the processes that it started.
"""

import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.components import missing, require

DEBIAN_PACKAGES = "slurmctld slurmd slurm-client munge"

CONFIGURATION = """
ClusterName=test{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
CommunicationParameters=NoCtldInAddrAny
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
FirstJobId={first_job}
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=10
MinJobAge=600
NodeName=DEFAULT CPUs=8 RealMemory=8000 State=UNKNOWN
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> object:
    """The condition's value once it is true; after ``seconds`` an AssertionError that shows ``what()``."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what()}")
        time.sleep(0.1)
    return value


class Cluster:
    """A running cluster; use it as a context manager."""

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder, self._names, self._processes = folder, [f"node{i}" for i in range(1, nodes + 1)], []
        self._port = self._free_ports(nodes + 1)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        for program in ("sbatch", "slurmctld", "slurmd", "munged"):
            require(program, apt=DEBIAN_PACKAGES)
        if subprocess.run(["unshare", "-m", "-u", "-p", "-f", "true"], capture_output=True).returncode:
            missing("a Slurm node needs namespaces of its own, which this user may not make; run the cluster tests as root")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()  # unshare passes no other signal on; its death takes the whole node along
            process.wait()

    def run(self, *command: str, **options: object) -> str:
        """Output of a Slurm client."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, **options).stdout

    def submit(self, folder: Path, *command: str, directory: Path, **variables: str) -> "Job":
        """``sbatch command`` from ``directory``; the job's output goes to ``folder``."""
        log = folder / "job.out"
        sbatch = ["sbatch", "--parsable", f"--output={log}", *command]
        told = subprocess.run(sbatch, cwd=directory, env=self.environment | variables, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        return Job(self, told.stdout.strip(), log)

    def _start(self) -> None:
        folder = self.folder
        for name in ("munge", "state", *(f"spool.{node}" for node in self._names)):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        hosts = "".join(f"127.0.1.{i} {name}\n" for i, name in enumerate(self._names, 1))
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.1.{i} Port={self._port + i}" for i, name in enumerate(self._names, 1)
        ]
        host, first_job = socket.gethostname().split(".")[0], random.randint(1, 9000)
        text = CONFIGURATION.format(host=host, port=self._port, folder=folder, nodes="\n".join(lines), first_job=first_job)
        (folder / "slurm.conf").write_text(text)
        munge = {"key-file": key, "socket": folder / "munge/socket", "pid-file": folder / "munge/pid", "seed-file": folder / "munge/seed"}
        # --force: the folder is root's alone, which munged would take for a mistake.
        self._daemon("munged", "munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        wait_for(munge["socket"].exists, 10, self._logs)
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf"))
        for name in self._names:
            inside = f"hostname {name} && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N {name} -f {folder}/slurm.conf"
            namespaces = ["unshare", "-m", "-u", "-p", "-f", "--kill-child", "--mount-proc", "--propagation", "private"]
            self._daemon(name, *namespaces, "bash", "-c", inside)
        wait_for(self._all_idle, 30, self._logs)

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "w") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._processes.append(process)

    def _all_idle(self) -> bool:
        told = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=self.environment, capture_output=True, text=True)
        return len(told.stdout.split()) == len(self._names)

    def _logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.out")))

    @staticmethod
    def _free_ports(count: int) -> int:
        """First of so many neighbouring ports that nobody listens on, below those that the system hands out."""
        for base in random.sample(range(10000, 19000, 10), 100):
            with_socket = [socket.socket() for _ in range(count)]
            try:
                for offset, probe in enumerate(with_socket):
                    probe.bind(("0.0.0.0", base + offset))
                return base
            except OSError:
                continue
            finally:
                for probe in with_socket:
                    probe.close()
        raise OSError("no free ports for a cluster")


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster, self.number, self._log = cluster, number, log

    def figures(self) -> dict[str, str]:
        """What ``scontrol show job`` tells: JobState, ExitCode, Restarts and more."""
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.run("scontrol", "show", "job", "-o", self.number)))

    def log(self) -> str:
        """The job's output so far, over all attempts."""
        return self._log.read_text() if self._log.exists() else ""

    def ended(self, seconds: float) -> dict[str, str]:
        """Waits for the end of the last attempt; the job's figures then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.figures()["JobState"] in over, seconds, lambda: f"{self.figures()}\n{self.log()}")
        return self.figures()

    def signal_batch_shell(self, name: str) -> None:
        """What ``--signal=B:`` does two minutes before the time limit."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)
