"""A task folder, read: what is public about it, and where its splits lie.

tasks/<name>/
    task.yaml    facts: metric, splits, limits, submission, source, controls, published scores
    task.md      what the meta backend and the target read
    prepare.py   prepare(raw, public, private, *, seed), reveal_dev(public, private_dev, out)
    verify.py    verify(submission_dir, labels_dir) -> dict
    controls.py  oracle(labels_dir, submission_dir), null(public_dir, submission_dir)
    harness/     the reference target: target_agent.py, harness.yaml, space.yaml
    harness_*/   further harnesses to start from, named in task.yaml
    baselines/   further harnesses that the exam puts beside the result
    data/        raw/, public/, private/dev/, private/test/: made by DVC, never in git
                 sources/<source>/ the same again, for each further source in task.yaml
"""

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import yaml

from sia.errors import SiaError, TaskError

ENTRY_POINT = "target_agent.py"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The one number that a task is judged by; `floor` and `best` are its ends."""

    name: str
    direction: str = "maximize"
    floor: float = 0.0
    best: float = 1.0

    def better(self, a: float, b: float) -> bool:
        """Whether `a` beats `b`; equal scores do not."""
        return a > b if self.direction == "maximize" else a < b

    def gain(self, new: float, old: float) -> float:
        """Improvement of `new` over `old`, positive when better."""
        return new - old if self.direction == "maximize" else old - new


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is collected from the target's working folder.

    Attributes:
        files: Relative paths, all of them required.
        any_of: Patterns such as `results/*.json`; of the first that matches, the last file by name
            is taken, and one must match. `files` is empty then.
        tree: All regular files of the working folder are taken, and there may be none.
        max_mib: Size of all files together.
    """

    files: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    tree: bool = False
    max_mib: float = 16.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Deadlines in seconds and memory of one process in MiB."""

    attempt_s: float = 600.0
    verify_s: float = 60.0
    memory_mib: int = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the raw data come from.

    Attributes:
        kind: `wheel` for members of a wheel on the package index; `url` for one file; `by_hand` for
            one file that a person has to fetch; `generated` for tasks whose prepare.py makes its
            data from the seed; `file` where they lie beside prepare.py; `folder` for tasks that
            were staged from a folder of another form, and whose splits were made by that.
        file: The wheel; of `url` and `by_hand`, the name of the file among the raw data.
        sha256: Of `file`. Needed for a wheel; without it a file of another kind is taken as it
            comes, and its hash is written down.
        url: Of the file, or of the page where a person finds it.
        note: What that person has to know.
        reference: What to cite.
        members: Name in `data/raw` -> member of the wheel.
        also: Further wheels, for data that no single one holds.
    """

    kind: str
    package: str = ""
    version: str = ""
    file: str = ""
    sha256: str = ""
    url: str = ""
    note: str = ""
    licence: str = ""
    reference: str = ""
    members: dict[str, str] = field(default_factory=dict)
    also: tuple["Source", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Published:
    """A score that somebody else reports: on the same test items, unless `source` says more."""

    name: str
    score: float
    source: str


@dataclass(frozen=True, kw_only=True)
class FurtherSource:
    """The same task on other raw data: everything in `task.yaml` that differs with them.

    Attributes:
        task_md: File beside `task.yaml` that stands in for `task.md`.
    """

    title: str
    source: Source
    submission: Submission
    splits: dict[str, int]
    limits: Limits
    task_md: str = "task.md"
    published: tuple[Published, ...] = ()
    report: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """`task.yaml`, typed.

    Attributes:
        sources: Name for `task.source` -> the same task on further raw data.
        harnesses: Name for `target.harness` -> folder, besides `reference`.
        baselines: Name in the report -> folder of a harness that the exam runs.
        policy: What updates of the weights train, for targets without a model of their own.
        recipes: Recipe of an update -> its settings for this policy.
        report: Metric -> header of a further column.
        warnings: What the task cannot promise; shown at the start of a run and below its exam.
        needs: Package that the task cannot do without -> extra of SIA that brings it.
    """

    name: str
    version: int
    title: str
    metric: Metric
    submission: Submission
    source: Source
    splits: dict[str, int]
    sources: dict[str, FurtherSource] = field(default_factory=dict)
    task_md: str = "task.md"
    limits: Limits = field(default_factory=Limits)
    controls: dict[str, Any] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    harnesses: dict[str, str] = field(default_factory=dict)
    baselines: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    needs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The public side of a task. Labels are reached only through `labels_dir`, by the verifier.

    Attributes:
        source: Name of the further source whose data are used; None for the task's own.
    """

    facts: TaskFacts
    root: Path
    source: str | None = None

    @property
    def name(self) -> str:
        """The task's name, equal to its folder's; with a further source, `name@source`."""
        return self.facts.name if self.source is None else f"{self.facts.name}@{self.source}"

    @property
    def metric(self) -> Metric:
        """The metric of the task."""
        return self.facts.metric

    @property
    def source_packages(self) -> tuple[str, ...]:
        """Packages on the index that hold the raw data, answers included; not for targets."""
        sources = (self.facts.source, *self.facts.source.also)
        return tuple(source.package for source in sources if source.package)

    @property
    def text(self) -> Path:
        """What the meta backend and the target read; the public side has a copy."""
        return self.root / self.facts.task_md

    @property
    def data_dir(self) -> Path:
        """Everything that is fetched and split: `raw`, `public` and `private`."""
        data = self.root / "data"
        return data if self.source is None else data / "sources" / self.source

    @property
    def raw_dir(self) -> Path:
        """The raw data, answers included."""
        return self.data_dir / "raw"

    @property
    def public_dir(self) -> Path:
        """What the target sees, read-only."""
        return self.data_dir / "public"

    @property
    def private_dir(self) -> Path:
        """The labels of all splits."""
        return self.data_dir / "private"

    @property
    def reference_harness(self) -> Path:
        """The harness a newcomer would write first."""
        return self.root / "harness"

    @property
    def harnesses(self) -> dict[str, Path]:
        """All harnesses that a run can start from, by name."""
        further = {name: self.root / folder for name, folder in self.facts.harnesses.items()}
        return {"reference": self.reference_harness, **further}

    def labels_dir(self, split: str) -> Path:
        """Private labels of `dev` or `test`; for the verifier alone."""
        return self.private_dir / split

    def stage(self, step: str) -> str:
        """Address of the DVC stage that makes data of this task, seen from the repository's root.

        Args:
            step: `fetch` or `split`.
        """
        if self.source is None:
            return f"{step}@{self.facts.name}"
        return f"{self.root.parent.name}/{self.root.name}/dvc.yaml:{step}@{self.source}"

    @property
    def restore(self) -> str:
        """Command that brings the splits back as DVC has recorded them."""
        # What is not in DVC's cache is made once more, from the same raw data and seed.
        return f"dvc {'checkout' if self.source is None else 'repro'} {self.stage('split')}"

    def check_needs(self) -> None:
        """Finds out whether the packages that the task needs are installed.

        Raises:
            TaskError: One is not, with the command that installs it.
        """
        for package, extra in self.facts.needs.items():
            if importlib.util.find_spec(package) is None:
                raise TaskError(
                    f"Task {self.name!r} needs the package {package!r}, which is not installed. "
                    f"Install it: pip install -e '.[{extra}]'"
                )

    def has_data(self) -> bool:
        """Whether the splits have been made on this machine."""
        return all(
            folder.is_dir() and any(folder.iterdir())
            for folder in (self.public_dir, self.labels_dir("dev"), self.labels_dir("test"))
        )


def load_task(root: Path, source: str | None = None) -> Task:
    """Reads a task folder.

    Args:
        root: The folder.
        source: One of the further sources that its `task.yaml` names; None for its own data.

    Raises:
        TaskError: The folder, its `task.yaml`, or a file of the contract is missing or wrong; or
            there is no such source.
    """
    path = root / "task.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        facts = msgspec.convert(raw, TaskFacts)
    except OSError as error:
        raise TaskError(
            f"{root} is not a task folder: {path.name} cannot be read ({error.strerror}). "
            "Bundled tasks: ls tasks"
        ) from error
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise TaskError(f"{path} breaks the task contract: {error}") from error
    if source is not None:
        facts = _with_source(facts, source)
    entries = [f"{folder}/{ENTRY_POINT}" for folder in ("harness", *facts.harnesses.values())]
    prepare = () if facts.source.kind == "folder" else ("prepare.py",)
    for name in (facts.task_md, *prepare, "verify.py", *entries):
        if not (root / name).is_file():
            raise TaskError(f"Task {facts.name!r} in {root} has no {name}. See docs/tasks.md.")
    if facts.metric.direction not in ("maximize", "minimize"):
        raise TaskError(
            f"{path}: metric.direction={facts.metric.direction!r} is neither maximize nor minimize."
        )
    return Task(facts=facts, root=root, source=source)


def _with_source(facts: TaskFacts, name: str) -> TaskFacts:
    """The facts of the same task on the data of a further source."""
    if name not in facts.sources:
        known = (
            f"Its further sources: {', '.join(facts.sources)}" if facts.sources else "It has none"
        )
        raise TaskError(
            f"Task {facts.name!r} has no source {name!r}. {known}. "
            "Its own data are those without: task.source=null"
        )
    chosen = facts.sources[name]
    return replace(facts, **{key: getattr(chosen, key) for key in chosen.__dataclass_fields__})


def open_folder(*, dir: str, source: str | None = None) -> Task:
    """The task in a folder of our own contract; see `find_task_dir` and `load_task`."""
    return load_task(find_task_dir(dir), source)


def load_module(path: Path) -> ModuleType:
    """Imports a file of a task folder under a private name."""
    spec = importlib.util.spec_from_file_location(f"sia_task_{path.parent.name}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bundled_task(name: str) -> Task | None:
    """The bundled task that a run names, as `task` or `task@source`; None for any other.

    A name is a word: one that would leave the folder of tasks is no bundled task's.
    """
    folder, _, source = name.partition("@")
    if "/" in folder or ".." in folder:
        return None
    try:
        return load_task(find_task_dir(f"tasks/{folder}"), source or None)
    except SiaError:
        return None


def find_task_dir(folder: str) -> Path:
    """Resolves `tasks/lawbench` against the working directory, then against the source checkout."""
    path = Path(folder).expanduser()
    if path.is_absolute() or path.is_dir():
        return path.resolve()
    checkout = Path(__file__).resolve().parents[3] / folder
    if checkout.is_dir():
        return checkout
    raise TaskError(
        f"There is no task folder {folder!r}, neither here ({Path.cwd()}) nor in the checkout. "
        "Run from the repository, or give task.dir=/path/to/task"
    )
