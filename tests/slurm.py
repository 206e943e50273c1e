"""Slurm on machines of network namespaces, with host names of their own, for the tests of the scripts for it."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from machines import Network, possible

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=moekit
SlurmctldHost=n0({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={temp}/munge.sock
StateSaveLocation={temp}/state
SlurmdSpoolDir={temp}/spool-%n
SlurmdPidFile={temp}/%n.pid
SlurmctldPidFile={temp}/slurmctld.pid
SlurmdLogFile={temp}/%n.log
SlurmctldLogFile={temp}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str | None:
    """What is missing here to run Slurm on machines of network namespaces; None if nothing is."""
    if lacking := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"needs Slurm: apt-get install slurm-wlm munge ({', '.join(lacking)} is not installed)"
    if not possible():
        return "makes network namespaces, as root and with iproute2"
    return None


class Slurm(Network):
    """Nodes n0, n1 and on, with two cores each. As in Debian, each takes its own name for a loopback address."""

    def _begin(self) -> None:
        for number in range(self.count):
            names = [f"{self.address(other)} n{other}" for other in range(self.count) if other != number]
            hosts = ["127.0.0.1 localhost", f"127.0.1.1 n{number}", *names]
            (self.temp / f"hosts-{number}").write_text("\n".join(hosts) + "\n")
            (self.temp / f"spool-n{number}").mkdir()
        (self.temp / "state").mkdir()
        nodes = [f"NodeName=n{number} NodeAddr={self.address(number)} CPUs=2" for number in range(self.count)]
        config = CONFIG.format(address=self.address(0), temp=self.temp)
        (self.temp / "slurm.conf").write_text(config + "\n".join(nodes) + "\n")
        key = self.temp / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.sock", "key-file": key.name, "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self._daemon(
            0, "munged", "--foreground", "--force", *(f"--{k}={self.temp / v}" for k, v in files.items())
        )
        self._daemon(0, "slurmctld", "-D")
        for number in range(self.count):
            self._daemon(number, "slurmd", "-D")
        self._until(lambda: self.say("sinfo", "--noheader", "--format=%T").split() == ["idle"], 60)

    def _daemon(self, number: int, *command: str) -> None:
        with open(self.temp / f"{command[0]}-{number}.out", "wb") as out:
            subprocess.Popen(self._command(number, *command), stdout=out, stderr=out, env=self._environment())

    def _command(self, number: int, *command: str) -> list[str]:
        there = f'hostname n{number} && mount --bind {self.temp}/hosts-{number} /etc/hosts && exec "$@"'
        # ip netns would put a new /sys in place, without the control groups that slurmd looks for.
        enter = ["nsenter", f"--net=/run/netns/{self._name(number)}", "unshare", "--uts", "--mount"]
        return [*enter, "bash", "-c", there, "bash", *command]

    def _environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.temp / "slurm.conf")} | more

    def say(self, *command: str, **environment: str) -> str:
        """What a command says on the first node."""
        done = subprocess.run(
            self._command(0, *command),
            env=self._environment(**environment),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    def _until(self, there, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"not within {seconds} s: {self.say('sinfo')}{self.say('squeue')}"
            time.sleep(0.5)

    def run(
        self, script: Path, *arguments: str, options: list[str], seconds: float = 300, **environment: str
    ):
        """Whether a job ended well, and what it said."""
        out = self.temp / f"{script.name}.out"
        said = self.say(
            "sbatch", "--parsable", f"--output={out}", *options, str(script), *arguments, **environment
        )
        job = said.strip()
        assert job.isdecimal(), said
        self._until(lambda: not self.say("squeue", "--noheader"), seconds)
        state = self.say("scontrol", "--oneliner", "show", "job", job)
        return "JobState=COMPLETED" in state, out.read_text()
