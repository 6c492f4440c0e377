"""A Slurm of one node on this machine, for tests: Debian's `slurm-wlm` and `munge`, started by root."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONF_FILE = Path("/etc/slurm/slurm.conf")  # where jobs look: the executor hides the variable SLURM_CONF from them
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={next_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
MinJobAge=86400
AccountingStorageType=accounting_storage/none
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
PartitionName=all Nodes={host} Default=YES State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where it can."""
    absent = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    if CONF_FILE.exists():
        return f"this machine has a Slurm of its own: {CONF_FILE}"
    return "" if os.geteuid() == 0 else "Slurm's daemons want root"


@contextmanager
def one_node(folder: Path, gpus: int = 2) -> Iterator[Path]:
    """Start the daemons, yield their folder with what they note in `jobs.txt`, end them.

    gpus: how many of Slurm's generic resource `gpu` the node has; there need be no card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().split(".")[0]
    _resolve(host)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    ports = {"port": _free(), "next_port": _free()}
    CONF_FILE.parent.mkdir(exist_ok=True)
    CONF_FILE.write_text(
        CONF.format(host=host, folder=folder, cpus=os.cpu_count(), memory=int(0.9 * memory), gpus=gpus, **ports)
    )
    (CONF_FILE.parent / "gres.conf").write_text(
        "".join(f"Name=gpu File=/dev/{file}\n" for file in ("null", "zero")[:gpus])
    )
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    try:
        _munge(env)
        for daemon in ("slurmctld", "slurmd"):
            (folder / {"slurmctld": "state", "slurmd": "spool"}[daemon]).mkdir(exist_ok=True)
            subprocess.run([daemon], env=env, check=True, capture_output=True)
        _wait(lambda: "idle" in _said(["sinfo", "-h", "-o", "%T"], env), folder)
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root"], env=env, capture_output=True)
        for daemon in ("slurmd", "slurmctld"):
            if (pid := folder / f"{daemon}.pid").exists():
                subprocess.run(["kill", pid.read_text().strip()], capture_output=True)
        CONF_FILE.unlink()
        (CONF_FILE.parent / "gres.conf").unlink()


def _said(command: list[str], env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _resolve(host: str) -> None:
    """The short host name must resolve, else slurmd does not find itself."""
    try:
        socket.gethostbyname(host)
    except OSError:
        with open("/etc/hosts", "a") as file:
            file.write(f"127.0.0.1 {host}\n")


def _munge(env: dict[str, str]) -> None:
    """Start munged unless it runs."""
    if not subprocess.run(["munge", "-n"], env=env, capture_output=True).returncode:
        return
    for name in ("run", "var/log", "var/lib"):
        Path(f"/{name}/munge").mkdir(parents=True, exist_ok=True)
        shutil.chown(f"/{name}/munge", "munge", "munge")
    subprocess.run(["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged"], env=env, check=True)
    _wait(lambda: not subprocess.run(["munge", "-n"], env=env, capture_output=True).returncode, Path("/var/log/munge"))


def _wait(ready, logs: Path) -> None:
    for _ in range(100):
        if ready():
            return
        time.sleep(0.3)
    raise RuntimeError("\n".join(log.read_text()[-1000:] for log in logs.glob("*.log")))
