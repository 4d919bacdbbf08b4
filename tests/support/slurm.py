"""A Slurm of our own for tests: munged, slurmctld and two slurmd on this machine, all state in one folder, nothing of the system touched.

Both "nodes" are this machine at 127.0.0.1 under names that resolve to nothing, each with its own port.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import environment, free_port, wait_for

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("tlnode1", "tlnode2")
# linuxproc follows parents, as cgroups do on a real cluster: a signal to a job reaches what its launchers started, too
CONFIG = """
ClusterName=trilevel
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
KillWait=60
InactiveLimit=0
SlurmdTimeout=300
MessageTimeout=60
PlugStackConfig={folder}/plugstack.conf
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why Slurm can't be had here; "" where it can."""
    if os.geteuid() != 0:
        return "not root: slurmd and munged of our own can't be started"
    for name in (*DAEMONS, "sbatch", "srun", "scontrol", "squeue"):
        if _where(name) is None:
            return f"{name} is not installed (Debian: apt-get install slurm-wlm munge)"
    return ""


def _where(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


@dataclass(frozen=True)
class Batch:
    folder: Path

    def env(self, **more: str) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.folder / "slurm.conf"), **more)

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env(), capture_output=True, text=True, timeout=300, check=False)
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; "" where the controller does not know it, "?" where it does not answer."""
        row = self.ask("scontrol", "--oneliner", "show", "job", job)
        if "JobState=" not in row:
            return "" if "Invalid job id" in row else "?"
        return row.partition("JobState=")[2].partition(" ")[0]

    def lose(self, node: str) -> None:
        """A node is gone with all its processes, and is set down at the controller (which else would wait SlurmdTimeout)."""
        there = [one for one in _family(self.folder) if _variable(one, "SLURMD_NODENAME") == node]
        above = [parent for one in there if (parent := one.parent()) and parent.name().startswith("slurmstepd")]
        service = [one for one in psutil.process_iter() if one.name() == "slurmd" and ["-N", node] == one.cmdline()[2:4]]
        for one in [*service, *above, *there]:
            with contextlib.suppress(psutil.Error):
                one.kill()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def reported(self) -> str:
        """The end of every log, for a failed test."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def batch(folder: Path) -> Iterator[Batch]:
    """Two idle nodes; skips the test visibly where that can't be. Everything that it started, jobs too, ends with it."""
    if reason := missing():
        pytest.skip(reason)
    folder.chmod(0o755)
    made = Batch(folder)
    ports: list[int] = []
    while len(ports) < 3:
        ports = list(dict.fromkeys([*ports, free_port()]))
    host = os.uname().nodename.partition(".")[0]
    (folder / "plugstack.conf").touch()
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    with ExitStack() as daemons:
        # slurmstepd makes sockets there, whose paths may have 107 bytes: below pytest's folder jobs stay in the queue for ever
        spool = Path(daemons.enter_context(tempfile.TemporaryDirectory(prefix="slurmd-", ignore_cleanup_errors=True)))
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, spool=spool, host=host, ports=ports, nodes=NODES))
        munged = ["munged", "--foreground", "--force", "--socket", f"{folder}/munge.socket", "--key-file", str(key)]
        munged += ["--log-file", f"{folder}/munged.log", "--pid-file", f"{folder}/munged.pid", "--seed-file", f"{folder}/seed"]
        try:
            daemons.enter_context(_daemon(made, *munged))
            wait_for(lambda: (folder / "munge.socket").exists(), 60)
            daemons.enter_context(_daemon(made, "slurmctld", "-D", "-f", f"{folder}/slurm.conf"))
            for node in NODES:
                (spool / node).mkdir()
                daemons.enter_context(_daemon(made, "slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf"))
            wait_for(lambda: made.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES), 120)
        except AssertionError:  # nothing of ours is in it yet
            pytest.skip(f"Slurm does not start here: {made.ask('sinfo', '-N', '-l')} {made.reported()[-1500:]}")
        yield made


@contextmanager
def _daemon(made: Batch, name: str, *words: str) -> Iterator[None]:
    """A service in the foreground, which dies with this process; at the end it goes with all that it has started."""
    out = (made.folder / f"{name}-{len(list(made.folder.glob(f'{name}-*.out')))}.out").open("wb")
    argv = ["setpriv", "--pdeathsig", "KILL", str(_where(name)), *words]
    service = subprocess.Popen(argv, env=made.env(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        family = psutil.Process(service.pid).children(recursive=True) if service.poll() is None else []
        service.kill()  # first: a slurmd that still lives may start another step
        family += _family(made.folder) if name == "slurmd" else []
        for one in family:
            try:
                one.kill()
            except psutil.Error:
                continue
        service.wait(30)
        out.close()


def _variable(process: psutil.Process, name: str) -> str:
    try:
        return process.environ().get(name, "")
    except psutil.Error:
        return ""


def _family(folder: Path) -> list[psutil.Process]:
    """Steps and their processes: slurmstepd leaves its slurmd, so they are known by the configuration in their environment."""
    found = []
    for process in psutil.process_iter():
        if _variable(process, "SLURM_CONF") == f"{folder}/slurm.conf" and process.pid != os.getpid():
            found.append(process)
    return [one for one in found if one.name() not in ("munged", "slurmctld")]
