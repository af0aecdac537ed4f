"""The weights lever of a run: updates in a process of their own, inside the sandbox.

An update sees the public side of the task, its `train.py`, the base and the parent's adapter, and
nothing else: the private side does not exist where it runs. What it makes is moved into place
whole.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sia
from sia.errors import WeightsError
from sia.records import Choice, Outcome, Update
from sia.sandbox.environments import current_runtime
from sia.sandbox.execution import Cancel, Cancels, Execution, execute, free_slot
from sia.sandbox.launch import gpu_devices, with_gpu
from sia.sandbox.protocol import Job, Limits, Runtime, Sandbox
from sia.sandbox.staging import copy_read_only, hand_over, remove, write_logs
from sia.tasks.task import Task
from sia.weights.recipes import RECIPES, Recipe
from sia.weights.recipes import recipe as find_recipe
from sia.weights.update_cache import UpdateCache, update_key

INSIDE = Path(__file__).with_name("inside.py")
TRAIN = "train.py"  # of the task: what may be trained on
POLICY = "policy"  # in the working folder of an update
STAGED = ("base", "code", "data")  # for an update, and removed after it
LAST_WORDS_S = 30.0  # that an update has to write down what it did, once its time is over
# Of an update: PyTorch reserves much more address space than it uses.
LIMITS = Limits(memory_mib=65_536, processes=512, file_mib=8_192, disk_mib=16_384)


class NoWeights:
    """The lever is off."""

    menu: Sequence[Choice] = ()

    def update(
        self,
        candidate: str,
        *,
        recipe: str,
        settings: Mapping[str, Any],
        parent: Path | None,
        out: Path,
        seed: int,
        deadline_s: float,
    ) -> Update:
        """Says that there is nothing to be updated."""
        return Update(candidate=candidate, recipe=recipe, problem="weights=none")

    def cancel(self) -> None:
        """There is nothing to cancel."""


class Updates:
    """Updates of one task's policy.

    Args:
        recipes: What may be chosen, with its settings; by name.
        task: Says what is trained on.
        policy: What is trained: `kind`, `base` (a folder), further arguments of the policy, and
            `folds` where every train item is to be scored by a model that has not seen it.
        sandbox: The same that confines targets.
        threads: Of numerical libraries.
        cache: Where updates of other runs are taken over from; None: every update is made.
        first: The adapter that the first update starts from; None: the base as it is.
    """

    def __init__(
        self,
        *,
        recipes: Mapping[str, Recipe],
        task: Task,
        policy: Mapping[str, Any],
        sandbox: Sandbox,
        threads: int,
        cache: Path | None = None,
        first: Path | None = None,
    ) -> None:
        self._recipes = recipes
        self._cache = UpdateCache(cache) if cache else None
        self._first = first
        self._task = task
        self._policy = dict(policy)
        self._sandbox = sandbox
        self._limits = replace(LIMITS, threads=threads)
        self._cancels = Cancels()

    @property
    def menu(self) -> Sequence[Choice]:
        """The recipes, in their own order."""
        return [
            Choice(name=name, needs=made.needs, when=made.when)
            for name, made in RECIPES.items()
            if name in self._recipes
        ]

    def update(
        self,
        candidate: str,
        *,
        recipe: str,
        settings: Mapping[str, Any],
        parent: Path | None,
        out: Path,
        seed: int,
        deadline_s: float,
    ) -> Update:
        """One update; the contract is that of `sia.weights.protocol.WeightUpdate`.

        An update that was killed goes on at its step. One that another run has made is taken over.
        """
        try:
            if recipe not in self._recipes:
                known = ", ".join(self._recipes)
                raise WeightsError(f"recipe {recipe!r} is not on the menu of this run: {known}")
            chosen = find_recipe({**vars(self._recipes[recipe]), **settings})
        except WeightsError as error:
            return Update(candidate=candidate, recipe=recipe, problem=str(error))
        remove(out)
        parent = parent or self._first
        plan = {"policy": self._policy, "recipe": vars(chosen), "seed": seed}
        blank = Update(candidate=candidate, recipe=recipe)
        with self._cancels.flag() as cancel:
            if self._cache is None:
                return self._made(blank, plan, parent, out, deadline_s, cancel)
            key = self._key(plan, parent)
            with self._cache.turn(key, cancelled=cancel.is_set, within_s=deadline_s):
                if entry := self._cache.take(key, out, within_s=deadline_s):
                    return replace(blank, report=entry.report, taken_s=entry.seconds)
                begun = time.monotonic()
                made = self._made(blank, plan, parent, out, deadline_s, cancel)
                if not made.problem:
                    seconds = time.monotonic() - begun
                    self._cache.put(key, out, report=made.report, seconds=seconds)
                return made

    def cancel(self) -> None:
        """Makes every `update`, in progress or to come, kill its processes and raise."""
        self._cancels.set()

    def _key(self, plan: Mapping[str, Any], parent: Path | None) -> str:
        return update_key(
            {
                **plan,
                "policy": {name: value for name, value in self._policy.items() if name != "base"},
                "threads": self._limits.threads,
                "gpu": bool(gpu_devices()),
            },
            base=Path(self._policy["base"]),
            parent=parent,
            train=self._task.root / TRAIN,
            data=self._task.public_dir,
        )

    def _made(
        self,
        blank: Update,
        plan: Mapping[str, Any],
        parent: Path | None,
        out: Path,
        deadline_s: float,
        cancel: Cancel,
    ) -> Update:
        """Makes it; fills in its report, or its problem."""
        execution = self._run(plan, parent, out, deadline_s, cancel)
        if execution.outcome is not Outcome.OK or not out.is_dir():
            return replace(blank, problem=execution.reason or "the update left nothing")
        return replace(blank, report=json.loads(execution.stdout.text().strip().splitlines()[-1]))

    def _run(
        self,
        plan: Mapping[str, Any],
        parent: Path | None,
        out: Path,
        deadline_s: float,
        cancel: Cancel,
    ) -> Execution:
        self._sandbox.check()
        place = out.with_name("update").resolve()
        code, work = place / "code", place / "work"
        for name in STAGED:
            remove(place / name)
        work.mkdir(parents=True, exist_ok=True)  # a killed update has left its checkpoints there
        code.mkdir()
        shutil.copyfile(INSIDE, code / INSIDE.name)
        shutil.copyfile(self._task.root / TRAIN, code / TRAIN)
        base = Path(self._policy["base"])
        if not all(path.stat().st_mode & 0o004 for path in base.iterdir()):
            # transformers writes weights for their owner alone, who is not the user of a sandbox
            base = copy_read_only(base, place / "base", follow_links=True)
        located = {
            **plan,
            "policy": {**self._policy, "base": str(base)},
            "parent": None if parent is None else str(parent.resolve()),
            "limits": {"wall_s": deadline_s},
        }
        (code / "job.json").write_text(json.dumps(located, indent=1) + "\n", encoding="utf-8")
        data = self._task.public_dir.resolve()
        if not self._sandbox.shields_data:
            data = copy_read_only(data, place / "data", follow_links=True)
        read = [Path(sia.__file__).parent, *_folders(base)]
        read += [parent.resolve()] if parent else []
        with free_slot() as slot:
            job = Job(
                data=data,
                code=code,
                work=work,
                runtime=_with(current_runtime(), read),
                limits=self._limits,
                slot=slot,
                marker=secrets.token_hex(8),
                entry=INSIDE.name,
            )
            if gpu_devices():
                job = with_gpu(job)
            launch = self._sandbox.launch(job)
            hand_over(work, launch.owner)
            execution = execute(launch, job, deadline_s=deadline_s + LAST_WORDS_S, cancel=cancel)
        write_logs(
            place,
            stdout=execution.stdout.text(),
            stderr=execution.stderr.text(),
            usage={**execution.usage, "sandbox": self._sandbox.name},
        )
        if execution.outcome is Outcome.OK and (work / POLICY).is_dir():
            hand_over(work, os.geteuid() if launch.owner is not None else None)
            os.replace(work / POLICY, out)
        for name in (*STAGED, "work"):
            remove(place / name)
        return execution


def _folders(base: Path) -> list[Path]:
    """Where the files of a model lie; those of the hub's cache are links into another folder."""
    return list(dict.fromkeys([base, *(path.resolve().parent for path in sorted(base.iterdir()))]))


def _with(runtime: Runtime, folders: Sequence[Path]) -> Runtime:
    """The interpreter, and further folders that its program reads."""
    roots = list(runtime.roots)
    for folder in folders:
        path = folder.resolve()
        if not any(root == path or root in path.parents for root in roots):
            roots.append(path)
    return replace(runtime, roots=tuple(roots))
