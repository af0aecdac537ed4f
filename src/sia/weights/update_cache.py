"""Updates that were made before: runs that would train the same policy twice take it over.

An entry is named by the digest of everything that an update depends on, so what is taken over is
what the run would have made. It is copied, never linked: a run directory stays whole by itself.
"""

import hashlib
import os
import platform
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from sia.errors import RunDirectoryError, WeightsError
from sia.provenance import tree_sha256
from sia.records import from_json, to_json
from sia.rundir import remove_tree, write_atomic, write_error
from sia.sandbox.environments import locked
from sia.weights.update import UPDATE_FILE, read_record

POLICY = "policy"  # in an entry
ENTRY_FILE = "entry.json"  # beside it; written last
PACKAGES = ("torch", "lightning", "peft", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An update that was made before.

    Attributes:
        report: What it did.
        seconds: What it took.
        sha256: Digest of the folder of its policy.
    """

    report: dict[str, float]
    seconds: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Ingredients:
    """What decides about every bit of a policy; their digest names the entry."""

    plan: dict[str, Any]
    base: str
    parent: str
    train: str
    data: str
    code: str
    packages: dict[str, str]
    machine: str
    processor: str


def update_key(
    plan: Mapping[str, Any], *, base: Path, parent: Path | None, train: Path, data: Path
) -> str:
    """The name of an update: the digest of what decides about every bit of its policy.

    Args:
        plan: Policy, recipe, seed and threads.
        base: Folder of the base.
        parent: Folder of the policy to start from.
        train: The task's `train.py`.
        data: The public side of the task.
    """
    whole = _Ingredients(
        plan=dict(plan),
        base=tree_sha256(base),
        parent=tree_sha256(parent) if parent else "",
        train=hashlib.sha256(train.read_bytes()).hexdigest(),
        data=tree_sha256(data),
        code=tree_sha256(Path(__file__).parent),
        packages={name: metadata.version(name) for name in PACKAGES},
        machine=platform.machine(),
        processor=_processor(),
    )
    return hashlib.sha256(to_json(whole)).hexdigest()


class UpdateCache:
    """A folder of updates. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def turn(self, key: str, *, cancelled: Callable[[], bool], within_s: float) -> Iterator[None]:
        """Waits while another process makes the same update; a killed one keeps nobody waiting.

        Args:
            key: Of the update.
            cancelled: Asked several times a second.
            within_s: After so long nobody is waited for any more.

        Raises:
            KeyboardInterrupt: It was cancelled.
            WeightsError: The folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = locked(self._folder / f".{key}.lock", cancelled, within_s=within_s)
                stack.enter_context(lock)
            except OSError as error:
                raise WeightsError(
                    f"target.update_cache={str(self._folder)!r} cannot be written: "
                    f"{error.strerror}. Choose another folder, or null."
                ) from error
            yield

    def take(self, key: str, out: Path, *, within_s: float) -> Entry | None:
        """Copies the policy of an entry to `out`.

        Args:
            key: Of the update.
            out: Folder of the policy; must not exist.
            within_s: An update that took longer is not taken over.

        Returns:
            None where there is no such entry.

        Raises:
            WeightsError: The entry is damaged.
            RunDirectoryError: The copy could not be written; `out` is not there.
        """
        folder = self._folder / key
        if not (folder / ENTRY_FILE).is_file():
            return None
        aside = out.with_name(f".{out.name}.taken")
        remove_tree(aside)
        try:
            entry = from_json((folder / ENTRY_FILE).read_bytes(), Entry)
            if entry.seconds > within_s:
                return None
            shutil.copytree(folder / POLICY, aside)
            if tree_sha256(aside) != entry.sha256:
                raise ValueError("its files are not those that were put there")
            os.replace(aside, out)
        except (ValueError, msgspec.MsgspecError) as error:
            remove_tree(aside)
            raise WeightsError(
                f"The kept update {folder} is damaged: {error}. Remove it: rm -r {folder}"
            ) from error
        except OSError as error:
            remove_tree(aside)
            raise write_error(out, error) from error
        return entry

    def put(self, key: str, policy: Path, *, report: Mapping[str, float], seconds: float) -> None:
        """Keeps a copy of what an update has made, unless its time was over before its steps were.

        An entry that is there stays as it is. A copy that cannot be written is warned of: the
        update itself is whole.
        """
        reports = [read_record(path.parent).report for path in _records(policy)]
        if any(report.ended == "wall_s" for report in reports):
            return
        # Of an update that was killed and went on, only its steps are known.
        seconds = max(seconds, sum(report.seconds for report in reports))
        folder = self._folder / key
        aside = self._folder / f".{key[:16]}-{secrets.token_hex(4)}"
        try:
            shutil.copytree(policy, aside / POLICY)
            entry = Entry(report=dict(report), seconds=seconds, sha256=tree_sha256(policy))
            write_atomic(aside / ENTRY_FILE, to_json(entry, pretty=True))
            os.replace(aside, folder)
        except (OSError, RunDirectoryError) as error:
            if not folder.exists():  # else another run has made the same
                warnings.warn(f"This update is not shared: {folder}: {error}", stacklevel=2)
        finally:
            remove_tree(aside)


def _records(policy: Path) -> list[Path]:
    """Of an update, or of the folds of a cross-fit."""
    return [*policy.glob(UPDATE_FILE), *policy.glob(f"*/{UPDATE_FILE}")]


def _processor() -> str:
    """Flags of the processor: kernels, and so last digits, are chosen by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
