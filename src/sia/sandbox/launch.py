"""Starting what a sandbox has prepared, and the trial run that tells whether a sandbox works."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from sia.sandbox.environments import current_runtime
from sia.sandbox.protocol import Endpoint, Job, Launch, Limits, Sandbox

FORWARD = Path(__file__).with_name("forward.py")
FIRST_UID = 64100  # of targets, where we may give them a user id of their own
# Inside a sandbox that has a root of its own. One folder of an unusual name: /data and /work are
# home to the interpreters of many a cluster, which keep their paths.
DATA, CODE, WORK, POLICY = "/sia/data", "/sia/harness", "/sia/work", "/sia/policy"
GATEWAY, SCRIPT = "/sia/gateway.sock", "/sia/forward.py"
FORWARD_PORT = 8000  # inside a sandbox that has a loopback interface of its own
_GPU_MEMORY_MIB = 2**26  # of address space: a card's driver reserves far more than its memory
PROGRAMS = ("/usr/games",)  # of Debian, beyond /usr/bin: chess engines
TRIAL_DEADLINE_S = 20
TRIAL_AGENT = """
import sys
open(sys.argv[sys.argv.index("--working_dir") + 1] + "/done", "x").close()
"""


def gpu_devices() -> tuple[Path, ...]:
    """The device files of NVIDIA cards; empty where there is none."""
    return tuple(sorted(path for path in Path("/dev").glob("nvidia*") if not path.is_dir()))


def with_gpu(job: Job) -> Job:
    """The job with all that the cards of this machine need: devices, driver, address space."""
    return replace(
        job,
        devices=gpu_devices(),
        libraries=_gpu_libraries(),
        limits=replace(job.limits, memory_mib=_GPU_MEMORY_MIB),
    )


def _gpu_libraries() -> tuple[Path, ...]:
    """The folder of the NVIDIA driver; empty where there is none.

    It is where the dynamic loader of this process finds it, which on many a cluster is a folder of
    its own and not one of the system.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = [Path(line.split(maxsplit=5)[5]) for line in mapped if "/libcuda.so" in line]
    return tuple({path.parent: None for path in paths})


def environment(
    job: Job,
    *,
    home: str,
    port: int = FORWARD_PORT,
    policy: str = POLICY,
    programs: Sequence[str] = (),
) -> dict[str, str]:
    """Everything that a program finds in its environment.

    Args:
        job: What is run.
        home: Its home and its folder for temporary files.
        port: Where its endpoint listens, on its loopback interface.
        policy: Where it finds its policy, if it has one.
        programs: Folders at the end of its PATH, where they exist.
    """
    further = "".join(f":{folder}" for folder in programs if Path(folder).is_dir())
    threads = str(job.limits.threads)
    # Which kernels OpenBLAS picks can be corrected by the host; wrong ones give wrong numbers.
    passed_on = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("OPENBLAS_") and name != "OPENBLAS_NUM_THREADS"
    }
    return {
        **passed_on,
        "HOME": home,
        "LANG": "C.UTF-8",
        "LOGNAME": "target",
        "MKL_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PATH": f"{job.runtime.python.parent}:/usr/bin:/bin{further}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        # What was printed before a deadline must be in the log.
        "PYTHONUNBUFFERED": "1",
        "SIA_ATTEMPT": job.marker,
        "TMPDIR": home,
        "USER": "target",
        **(_library_variables(job.libraries) if job.libraries else {}),
        **({"SIA_POLICY": policy} if job.policy else {}),
        **(_model_variables(job.endpoint, port) if job.endpoint else {}),
    }


def _library_variables(folders: Sequence[Path]) -> dict[str, str]:
    """Where the dynamic loader looks first, and Triton, which would ask a program of the system."""
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, folders)),
        "TRITON_LIBCUDA_PATH": str(folders[0]),
    }


def _model_variables(endpoint: Endpoint, port: int) -> dict[str, str]:
    """What the SDKs of model vendors look for, and `SIA_MODEL`."""
    url = f"http://127.0.0.1:{port}"
    return {
        "ANTHROPIC_API_KEY": endpoint.key,
        "ANTHROPIC_BASE_URL": url,
        "OPENAI_API_KEY": endpoint.key,
        "OPENAI_BASE_URL": f"{url}/v1",
        "SIA_MODEL": endpoint.model,
    }


def program_argv(job: Job, *, python: str, data: str, code: str, work: str) -> list[str]:
    """The command as seen from inside the sandbox."""
    return [python, f"{code}/{job.entry}", "--dataset_dir", data, "--working_dir", work]


def forwarded(argv: list[str], *, script: str, socket: str) -> list[str]:
    """`argv` with a loopback port that leads to `socket`; `argv[0]` is a Python interpreter."""
    return [argv[0], "-I", "-S", script, str(FORWARD_PORT), socket, *argv]


def limits_argv(limits: Limits, *, processes: int | None) -> list[str]:
    """The prefix that sets resource limits on the command that follows it."""
    nproc = [] if processes is None else [f"--nproc={processes}"]
    return [
        "prlimit", f"--as={limits.memory_mib * 2**20}", f"--fsize={limits.file_mib * 2**20}",
        "--core=0", *nproc, "--",
    ]  # fmt: skip


def start(
    launch: Launch, work: Path, *, stdout: int | IO[bytes], stderr: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    """Starts the process in a session of its own and closes our ends of what it inherits.

    Raises:
        OSError: The program cannot be executed, or the working folder not be given away.
    """
    try:
        if launch.owner is not None:
            os.chown(work, launch.owner, launch.owner)
            os.chmod(work, 0o755)  # bwrap enters it before it changes its user id
        return subprocess.Popen(
            launch.argv,
            env=launch.env,
            cwd=launch.cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=launch.pass_fds,
            start_new_session=True,
        )
    finally:
        for fd in launch.pass_fds:
            os.close(fd)


def trial(sandbox: Sandbox) -> str:
    """Why a target that does nothing but write one file fails; empty when it does not."""
    with tempfile.TemporaryDirectory(prefix="sia-trial-") as folder:
        root = Path(folder).resolve()
        for name in ("data", "code", "work"):
            (root / name).mkdir()
        job = Job(
            data=root / "data",
            code=root / "code",
            work=root / "work",
            runtime=current_runtime(),
            limits=Limits(memory_mib=1024),
            slot=0,
            marker="trial",
        )
        (root / "code" / job.entry).write_text(TRIAL_AGENT, encoding="utf-8")
        launch = sandbox.launch(job)
        try:
            with (
                tempfile.TemporaryFile() as errors,
                start(launch, job.work, stdout=subprocess.DEVNULL, stderr=errors) as process,
            ):
                try:
                    process.wait(TRIAL_DEADLINE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    return f"a trivial target did not end within {TRIAL_DEADLINE_S} s"
                errors.seek(0)
                lines = errors.read().decode("utf-8", "replace").strip().splitlines()
        except OSError as error:
            return str(error)
        finally:
            if launch.status_fd is not None:
                os.close(launch.status_fd)
        if process.returncode != 0 or not (job.work / "done").exists():
            return lines[-1] if lines else f"a trivial target ended with {process.returncode}"
    return ""
