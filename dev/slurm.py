#!/usr/bin/env python3
"""Starts a small SLURM on this machine: a controller and two simulated machines of one core each.

    dev/slurm.py --install                  apt-get install slurm-wlm munge, as root
    dev/slurm.py sbatch --wait job.sh       runs a command with this SLURM, then ends SLURM
    dev/slurm.py bash                       the same with a shell

All its files are in a temporary folder and it uses free ports, so it does not affect a SLURM or
munge that is already installed. The two simulated machines, node1 and node2, are daemons.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Dict, Iterator, Optional

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
NODES = ("node1", "node2")

_CONFIG = """\
ClusterName=refbn
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthInfo=socket={folder}/munge.socket,cred_expire=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# Neither cgroups nor a data base: SLURM looks at /proc itself, and kills what takes too much.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=2000
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SlurmdTimeout=10
KillWait=20
ReturnToService=2
MpiDefault=none
NodeName=node[1-2] NodeHostname={host} Port=[{ports[1]},{ports[2]}] CPUs=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=60
"""


def missing() -> Optional[str]:
    """The reason why SLURM cannot be started here, or None."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"{program} is not installed: dev/slurm.py --install"
    return None if os.getuid() == 0 else "slurmd starts jobs as root only"


def start_node(name: str, env: Dict[str, str]) -> subprocess.Popen:
    """Starts the daemon of one simulated machine; SIGTERM or SIGKILL ends it."""
    return subprocess.Popen(["slurmd", "-D", "-N", name], env=env, **_QUIET)


_QUIET = {k: subprocess.DEVNULL for k in ("stdin", "stdout", "stderr")}


@contextmanager
def cluster() -> Iterator[Dict[str, str]]:
    """Context manager with a SLURM of two machines; the processes of its jobs end with it.

    Yields:
        The environment for its commands.

    Raises:
        RuntimeError: If the machines are not ready after half a minute.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        folder.chmod(0o755)  # required by munge
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        config = folder / "slurm.conf"
        host = socket.gethostname()
        config.write_text(
            _CONFIG.format(folder=folder, host=host, user="root", ports=_free_ports(3))
        )
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        env.update(SLURM_CONF=str(config), PATH=f"{env['PATH']}:/usr/sbin")
        munged = ["munged", "--foreground", f"--socket={folder}/munge.socket"]
        munged += [f"--{k}-file={folder}/munge.{k}" for k in ("key", "log", "pid", "seed")]
        for command in (munged, ["slurmctld", "-D"]):
            stack.callback(_end, subprocess.Popen(command, env=env, **_QUIET))
            time.sleep(0.5)
        for node in NODES:
            stack.callback(_end, start_node(node, env))
        stack.callback(subprocess.run, ["scancel", "--state=R", "--full"], env=env, **_QUIET)
        end = time.monotonic() + 30
        while _ask("sinfo", "--noheader", "--format=%t %D", env=env) != "idle 2":
            if time.monotonic() > end:
                raise RuntimeError(f"SLURM does not start: {_ask('sinfo', env=env)}")
            time.sleep(0.2)
        yield env


def _ask(*command: str, env: Dict[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()


def _free_ports(count: int) -> list:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("", 0))
        return [s.getsockname()[1] for s in sockets]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="what is needed, from Debian")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="to run in it")
    args = parser.parse_args()
    if args.install and missing():
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(
            INSTALL.split(), check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
    if not args.command:
        return 0
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with cluster() as env:
        return subprocess.run(args.command, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
