"""Confinement by Docker, for machines where bubblewrap cannot be had.

What is tested is the command that this module builds; no engine runs where its tests do.
"""

import os
import subprocess
import threading

from sia.errors import TargetError
from sia.sandbox.launch import (
    CODE,
    DATA,
    FIRST_UID,
    FORWARD,
    GATEWAY,
    POLICY,
    SCRIPT,
    WORK,
    environment,
    forwarded,
    program_argv,
)
from sia.sandbox.protocol import Job, Launch

ASK_S = 10


class Docker:
    """Runs each attempt in a container of its own, without a network.

    The image brings `python` and every package that a harness needs: `requirements.txt` is not
    installed in it.

    Args:
        image: For example `python:3.11-slim`; never pulled by a run.
        cpus: Processors that a container may keep busy; None for no limit.
        tmp_mib: Size of the private /tmp, which is held in memory.
    """

    name = "docker"
    shields_data = True
    host_runtime = False

    def __init__(self, *, image: str, cpus: float | None = None, tmp_mib: int = 1024) -> None:
        self._image = image
        self._cpus = cpus
        self._tmp_mib = tmp_mib
        self._works = False
        self._lock = threading.Lock()

    @property
    def protects(self) -> str:
        """What it keeps out, and what it does not."""
        return (
            "docker: no network, no host files, no other processes, memory limited as a whole; "
            "whoever may talk to the engine is as good as root"
        )

    @staticmethod
    def available() -> str:
        """Why the engine does not answer; empty when it does. Waits a few seconds at most."""
        return _ask("version", "--format", "{{.Server.Version}}")

    def check(self) -> None:
        """Asks the engine for its version and for the image.

        Raises:
            TargetError: There is no engine, or it does not have the image.
        """
        with self._lock:
            if self._works:
                return
            if reason := self.available():
                raise TargetError(f"sandbox=docker does not work here: {reason}. Try: docker info")
            if reason := _ask("image", "inspect", "--format", "{{.Id}}", self._image):
                raise TargetError(
                    f"sandbox=docker: the engine does not have the image {self._image!r} "
                    f"({reason}). Fetch it: docker pull {self._image}"
                )
            self._works = True

    def launch(self, job: Job) -> Launch:
        """The `docker run` command."""
        uid = FIRST_UID + job.slot if os.geteuid() == 0 else os.geteuid()
        gid = uid if os.geteuid() == 0 else os.getegid()
        limits = job.limits
        container = f"sia-{job.marker}"
        variables = environment(job, home="/tmp")
        del variables["PATH"]  # the image's own
        argv = [
            "docker", "run", "--rm", "--init", "--name", container, "--pull", "never",
            "--network", "none", "--read-only", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--user", f"{uid}:{gid}",
            "--hostname", "target", "--log-driver", "none", "--ipc", "private",
            "--pids-limit", str(limits.processes),
            "--memory", f"{limits.memory_mib}m", "--memory-swap", f"{limits.memory_mib}m",
            "--ulimit", f"fsize={limits.file_mib * 2**20}", "--ulimit", "core=0",
            *(["--cpus", f"{self._cpus:g}"] if self._cpus is not None else []),
            "--tmpfs", f"/tmp:rw,nosuid,nodev,size={self._tmp_mib}m,mode=1777",
            "--mount", _bind(job.data, DATA, read_only=True),
            "--mount", _bind(job.code, CODE, read_only=True),
            "--mount", _bind(job.work, WORK),
            "--workdir", WORK,
        ]  # fmt: skip
        for name, value in variables.items():
            argv += ["--env", f"{name}={value}"]
        program = program_argv(job, python="python", data=DATA, code=CODE, work=WORK)
        if job.policy:
            argv += ["--mount", _bind(job.policy, POLICY, read_only=True)]
        if job.endpoint:
            argv += ["--mount", _bind(FORWARD, SCRIPT, read_only=True)]
            argv += ["--mount", _bind(job.endpoint.socket, GATEWAY)]
            program = forwarded(program, script=SCRIPT, socket=GATEWAY)
        argv += ["--entrypoint", program[0], self._image, *program[1:]]
        return Launch(
            argv=argv,
            env=client_environment(),
            cwd=job.work.parent,
            owner=uid if os.geteuid() == 0 else None,
            supervised=True,
            # The client's death leaves the container running.
            stop=("docker", "rm", "--force", container),
        )


def client_environment() -> dict[str, str]:
    """What the Docker client needs to find its engine; the container sees none of it."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ("HOME", "PATH", "XDG_RUNTIME_DIR") or name.startswith("DOCKER_")
    }


def _ask(*question: str) -> str:
    """Why the engine does not answer a question; empty when it does."""
    try:
        answer = subprocess.run(
            ["docker", *question], capture_output=True, text=True, timeout=ASK_S, check=False,
            stdin=subprocess.DEVNULL, errors="replace",
        )  # fmt: skip
    except FileNotFoundError:
        return "'docker' is not installed"
    except OSError as error:
        return f"'docker' cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"the engine did not answer within {ASK_S} s"
    if answer.returncode == 0:
        return ""
    lines = answer.stderr.strip().splitlines()
    return lines[-1] if lines else f"docker ended with {answer.returncode}"


def _bind(source: object, destination: str, *, read_only: bool = False) -> str:
    """A bind mount; unlike `-v`, its source may hold a colon and is not created."""
    return f"type=bind,src={source},dst={destination}" + (",readonly" if read_only else "")
