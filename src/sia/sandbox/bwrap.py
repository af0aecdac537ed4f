"""Confinement by bubblewrap: namespaces, an own root, an own user id, a seccomp filter."""

import os
import shutil
import stat
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from sia.errors import TargetError
from sia.sandbox.launch import (
    CODE,
    DATA,
    FIRST_UID,
    FORWARD,
    GATEWAY,
    POLICY,
    PROGRAMS,
    SCRIPT,
    WORK,
    environment,
    forwarded,
    limits_argv,
    program_argv,
    trial,
)
from sia.sandbox.protocol import Job, Launch
from sia.sandbox.seccomp import filter_bytes, filter_fd

# Programs, libraries and tables of the system. Not /usr as a whole: checkouts live in /usr/src.
SYSTEM = (
    "/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/share",
    "/usr/local/lib", "/bin", "/lib", "/lib32", "/lib64", "/libx32",
    "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime",
)  # fmt: skip
# What a driver wants to see of the machine besides its device files.
DEVICE_SYSTEM = ("/sys/devices", "/sys/bus/pci")
SHM_MIB = 64
# Process 1 of the sandbox. It waits for the target and reports it; when it ends, the kernel has
# killed everything else in there. `exit` keeps the shell from replacing itself by the target.
INIT = ("sh", "-c", '"$@"; exit $?', "sh")


class Bwrap:
    """Runs targets under bubblewrap.

    Started by root, targets get a user id of their own, which makes the process limit binding.
    Started by anybody else, or by root in a container without the needed capabilities, they get a
    user namespace in which nobody is root.

    Args:
        tmp_mib: Size of the target's private /tmp, which is held in memory.
        programs: Folders of programs to be shown besides those of the system, where they exist.
    """

    name = "bwrap"
    shields_data = True
    host_runtime = True

    def __init__(self, *, tmp_mib: int = 1024, programs: Sequence[str] = PROGRAMS) -> None:
        self._tmp_mib = tmp_mib
        self._programs = tuple(programs)
        self._own_uid = os.geteuid() == 0
        self._works = False
        self._lock = threading.Lock()

    @property
    def protects(self) -> str:
        """What it keeps out, and what it does not."""
        gaps = "; memory is limited per process"
        if os.geteuid() == 0 and not self._own_uid:
            gaps += "; the number of processes is not limited (root in a user namespace)"
        if filter_bytes() is None:
            gaps += "; no seccomp filter (install libseccomp: apt install libseccomp2)"
        return f"bwrap: no network, no host files, no other processes{gaps}"

    def check(self) -> None:
        """Runs a trivial target, as root first with an own user id, then in a user namespace.

        Raises:
            TargetError: Neither works here.
        """
        with self._lock:
            if self._works:
                return
            for program, package in (("bwrap", "bubblewrap"), ("setpriv", "util-linux")):
                if shutil.which(program) is None:
                    raise TargetError(
                        f"sandbox=bwrap needs {program!r}, which is not installed here: "
                        f"apt install {package}"
                    )
            reasons = []
            for own_uid in (True, False) if os.geteuid() == 0 else (False,):
                self._own_uid = own_uid
                reason = trial(self)
                if not reason:
                    self._works = True
                    return
                reasons.append(reason)
            raise TargetError(
                f"sandbox=bwrap does not work here: {'; then: '.join(reasons)}. {_advice(reasons)}"
            )

    def launch(self, job: Job) -> Launch:
        """The bwrap command. Opens the descriptors named in the result.

        Raises:
            TargetError: The task lies inside a folder that targets can read.
        """
        mounts = self._mounts(job)
        uid = FIRST_UID + job.slot
        status_read, status_write = os.pipe()
        fds = [status_write]
        argv = [
            "bwrap", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--hostname", "target", "--die-with-parent", "--new-session",
            "--as-pid-1", "--clearenv", "--json-status-fd", str(status_write), "--cap-drop", "ALL",
        ]  # fmt: skip
        if self._own_uid:
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
                argv += ["--cap-add", capability]
        else:
            argv += ["--unshare-user", "--disable-userns", "--uid", str(uid), "--gid", str(uid)]
        if (rules := filter_bytes()) is not None:
            fds.append(filter_fd(rules))
            argv += ["--seccomp", str(fds[-1])]
        for name, value in environment(job, home="/tmp", programs=self._programs).items():
            argv += ["--setenv", name, value]
        argv += mounts
        argv += [
            "--chdir",
            WORK,
            "--",
            *INIT,
            *limits_argv(job.limits, processes=job.limits.processes),
        ]
        if self._own_uid:
            argv += [
                "setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups",
                "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--",
            ]  # fmt: skip
        program = program_argv(job, python=str(job.runtime.python), data=DATA, code=CODE, work=WORK)
        if job.endpoint:
            program = forwarded(program, script=SCRIPT, socket=GATEWAY)
        argv += program
        return Launch(
            argv=argv,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin"},
            cwd=job.work,
            pass_fds=tuple(fds),
            owner=uid if self._own_uid else None,
            supervised=True,
            status_fd=status_read,
        )

    def _mounts(self, job: Job) -> list[str]:
        """Everything that exists inside, in the order in which it is put there."""
        tmpfs = ["--perms", "1777", "--size"]
        devices = [part for path in job.devices for part in ("--dev-bind", str(path), str(path))]
        # /proc is read-only: to the kernel, root in a user namespace is still the owner of
        # /proc/sys, and a core_pattern runs programs on the host. A GPU's driver has to name its
        # threads there; then all of it is but the processes.
        read_only = ["--remount-ro", "/proc"]
        if job.devices:
            read_only = [part for path in _of_the_kernel() for part in ("--ro-bind", path, path)]
        argv = [
            "--proc", "/proc", *read_only, "--dev", "/dev", *devices,
            *tmpfs, str(SHM_MIB * 2**20), "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
            *tmpfs, str(self._tmp_mib * 2**20), "--tmpfs", "/tmp",
        ]  # fmt: skip
        shown: list[Path] = []
        for path in map(Path, (*SYSTEM, *self._programs)):
            if path.is_symlink() and path.parent == Path("/"):
                argv += ["--symlink", os.readlink(path), str(path)]  # a merged /usr
            elif path.exists():
                shown.append(path)
        if job.devices:
            shown += [path for path in map(Path, DEVICE_SYSTEM) if path.exists()]
        for path in (*job.runtime.roots, *job.libraries):
            if not any(folder == path or folder in path.parents for folder in shown):
                shown.append(path)
        for path in shown:
            if path in job.data.parents:
                raise TargetError(
                    f"The task's data {str(job.data)!r} lie inside {str(path)!r}, which every "
                    "target can read. Move the task: task.dir=/path/to/task"
                )
        binds = [("--ro-bind", str(path), str(path)) for path in shown]
        binds += [
            ("--ro-bind", str(job.data), DATA),
            ("--ro-bind", str(job.code), CODE),
            ("--bind", str(job.work), WORK),
        ]
        if job.policy:
            binds.append(("--ro-bind", str(job.policy), POLICY))
        if job.endpoint:
            binds += [
                ("--ro-bind", str(FORWARD), SCRIPT),
                ("--ro-bind", str(job.endpoint.socket), GATEWAY),
            ]
        # bwrap makes parent folders that only its own user can enter.
        for parent in _parents([*(destination for _, _, destination in binds), *job.links]):
            argv += ["--perms", "0755", "--dir", parent]
        for bind in binds:
            argv += bind
        for link, place in job.links.items():
            argv += ["--symlink", place, link]
        return [*argv, "--remount-ro", "/"]


def _of_the_kernel() -> list[str]:
    """What /proc holds besides processes, as far as its owner may write to it."""
    found = []
    for path in sorted(Path("/proc").iterdir()):
        if not path.name.isdigit() and not path.is_symlink():
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode) or mode & 0o222:
                found.append(str(path))
    return found


def _parents(paths: Iterable[str]) -> list[str]:
    """All folders above `paths`, each before those below it; not the root."""
    folders = {str(parent) for path in paths for parent in Path(path).parents}
    return sorted(folders - {"/"})


def _advice(reasons: list[str]) -> str:
    """What to do about a bwrap that cannot start."""
    text = " ".join(reasons)
    if "Unknown option" in text:
        return "bubblewrap 0.8 or newer is needed: bwrap --version"
    if "mount proc" in text:
        return (
            "A container that masks parts of /proc does not let bwrap mount its own. Start it "
            "with --security-opt systempaths=unconfined"
        )
    if "uid map" in text or "user namespace" in text or "Operation not permitted" in text:
        return (
            "This machine does not let you make user namespaces. On Ubuntu: "
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return "Without it: sandbox=process"
