"""What a sandbox is given, what it makes of it, and what it promises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one attempt may use.

    Attributes:
        memory_mib: Address space of each process.
        processes: Processes and threads alive at once.
        file_mib: Size of any one file.
        disk_mib: Size of the working folder as a whole, watched while the target runs.
        output_kib: How much of stdout, and of stderr, is kept; the rest is read and dropped.
        threads: Threads of numerical libraries; fixed, so that results do not depend on the host.
    """

    memory_mib: int
    processes: int = 256
    file_mib: int = 512
    disk_mib: int = 1024
    output_kib: int = 256
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """An interpreter with the packages of a harness, and the paths it needs read-only."""

    python: Path
    roots: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a sandboxed process finds its model; see `sia.gateway`.

    Attributes:
        socket: Unix socket of the gateway, for sandboxes without a network.
        port: Its port on the loopback interface, for those that share ours.
        key: Throw-away key: names the caller, and is worth nothing elsewhere.
        model: The one model that this caller may ask for.
    """

    socket: Path
    port: int
    key: str
    model: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One Python program to be run in a sandbox: a harness, or the driver of an agent.

    Attributes:
        data: The public side; nothing inside must be able to change it.
        code: The folder of the program, read-only.
        entry: The program, a file of `code`; called with --dataset_dir and --working_dir.
        work: The program's own folder, the only one it can write to besides a private /tmp.
        slot: Distinct among attempts that run side by side on this machine; separates their user
            ids.
        marker: A token in the environment by which strays of this attempt are found.
        policy: What an update of the weights has left, read-only; None: nothing.
        endpoint: The only thing outside that the program can reach; None: nothing.
        links: Symbolic links inside, path -> where it leads; bubblewrap alone can make them.
        devices: Device files that bwrap shows inside, for instance those of a GPU.
        libraries: Folders of shared libraries that the program finds besides those of the system,
            for instance of a GPU's driver.
    """

    data: Path
    code: Path
    work: Path
    runtime: Runtime
    limits: Limits
    slot: int
    marker: str
    entry: str = "target_agent.py"
    endpoint: Endpoint | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()
    policy: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to give to `sia.sandbox.launch.start`.

    Attributes:
        env: The whole environment of the process; nothing is inherited.
        pass_fds: Inherited by the process, and closed on our side once it has started.
        owner: User id that the working folder must belong to; None where it is ours.
        supervised: The process is the sandbox's own. It ends after every process of the target
            has, and reports a target that died from signal n as exit code 128 + n.
        status_fd: Read end of a pipe on which a supervisor names its child and reports its end, in
            the JSON lines of `bwrap --json-status-fd`. Whoever starts the process closes it.
        stop: A command that ends what a signal to the process would not reach.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    pass_fds: tuple[int, ...] = ()
    owner: int | None = None
    supervised: bool = False
    status_fd: int | None = None
    stop: tuple[str, ...] = ()


class Sandbox(Protocol):
    """Turns a job into a command that confines it.

    Attributes:
        name: `bwrap`, `docker` or `process`.
        shields_data: Whether the target cannot change `Job.data` and `Job.code`; if not, it gets
            copies.
        host_runtime: Whether `Job.runtime` is used; if not, the sandbox brings its own interpreter.
    """

    name: str
    shields_data: bool
    host_runtime: bool

    @property
    def protects(self) -> str:
        """One line for the user: what it keeps out, and what it does not."""
        ...

    def check(self) -> None:
        """Finds out, by really running something, whether this sandbox works here.

        Cheap after the first success.

        Raises:
            TargetError: It does not; the message has the reason and what to do.
        """
        ...

    def launch(self, job: Job) -> Launch:
        """The command for `python <code>/<entry> --dataset_dir D --working_dir W`."""
        ...
