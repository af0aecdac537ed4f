"""A trained policy as MLflow's model registry shall show it: one version with its lineage."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sia.provenance import tree_sha256
from sia.records import Candidate, Update
from sia.rundir import RunInfo, policy_dir

UPDATE_FILE = "update.json"
MAX_COPIED = 32 * 2**20  # bytes; a larger policy is named by path and digest
MAX_RECORD = 16 * 2**20  # bytes of an update.json
MAX_FOLDERS = 100  # adapters of one policy


@dataclass(frozen=True, kw_only=True)
class PolicyView:
    """One version of a registered model.

    Attributes:
        model: Name of the registered model: `sia-<task>-<kind of policy>`.
        candidate: The one whose update made the policy.
        description: For people, in Markdown.
        files: Its artifacts: `lineage.json`, and the adapter itself where it is small.
    """

    model: str
    candidate: str
    description: str
    tags: dict[str, str]
    files: dict[str, bytes]


def policy_view(
    run: Path,
    info: RunInfo,
    candidate: Candidate,
    update: Update,
    *,
    parent: str,
    before: float | None,
    after: float | None,
) -> PolicyView | None:
    """The policy that an update made; None where none was made, or it is no longer there.

    Args:
        run: Run directory.
        info: Of the run.
        candidate: Whose update it was.
        update: What the journal says about it.
        parent: The candidate whose policy it started from; empty for a fresh one.
        before: Dev score of the candidate's parent.
        after: Dev score with the new policy.
    """
    folder = policy_dir(run, candidate.id)
    if update.problem or folder.is_symlink() or not folder.is_dir():
        return None
    adapters = _adapters(folder)
    first = adapters[0] if adapters else {}
    kind = str(first.get("kind") or "policy")
    contents = _contents(folder)
    size = sum(path.stat().st_size for path in contents.values())
    origin = policy_dir(run, parent) if parent else None
    lineage = {
        "run_id": info.run_id,
        "candidate": candidate.id,
        "parent": parent or None,
        "sha256": tree_sha256(folder),
        "parent_sha256": tree_sha256(origin) if origin and origin.is_dir() else None,
        "recipe": update.recipe,
        "report": dict(sorted(update.report.items())),
        "dev_before": before,
        "dev_after": after,
        "path": str(folder),
        "bytes": size,
        "adapters": adapters,
    }
    files = {"lineage.json": msgspec.json.format(msgspec.json.encode(lineage))}
    if size <= MAX_COPIED:
        files |= {name: path.read_bytes() for name, path in contents.items()}
    tags = {
        "sia.run_id": info.run_id,
        "sia.candidate": candidate.id,
        "sia.parent": parent,
        "sia.sha256": lineage["sha256"],
        "sia.parent_sha256": lineage["parent_sha256"],
        "sia.base": first.get("base"),
        "sia.base_sha256": first.get("base_sha256"),
        "sia.recipe": update.recipe,
        "sia.seed": info.seed,
        "sia.dev_before": before,
        "sia.dev_after": after,
        "sia.path": folder,
        "sia.bytes": size,
    }
    scores = " → ".join("none" if score is None else f"{score:.4f}" for score in (before, after))
    where = "The adapter is among its files." if len(files) > 1 else f"It lies in `{folder}`."
    return PolicyView(
        model=_model_name(f"sia-{info.task}-{kind}"),
        candidate=candidate.id,
        description=(
            f"`{candidate.id}` of `{info.run_id}`: recipe `{update.recipe}` on "
            f"{f'the policy of `{parent}`' if parent else 'the base'}; dev {scores}. {where}"
        ),
        tags={name: str(value)[:5000] for name, value in tags.items() if value not in (None, "")},
        files=files,
    )


def _adapters(folder: Path) -> list[dict[str, Any]]:
    """What each adapter of a policy says about its origin; a cross-fitted policy has several."""
    found = []
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())][:MAX_FOLDERS]
    for place in folders:
        path = place / UPDATE_FILE
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RECORD:
            continue
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        policy = record.get("policy")
        found.append(
            {
                "folder": place.name if place != folder else "",
                "kind": policy.get("kind") if isinstance(policy, dict) else None,
                **{
                    name: record.get(name)
                    for name in (
                        "base", "base_sha256", "parent_sha256", "data_sha256", "recipe", "seed",
                        "packages",
                    )
                },
            }
        )  # fmt: skip
    return found


def _contents(folder: Path) -> dict[str, Path]:
    """The regular files below a folder by their relative names; no link is followed."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _model_name(name: str) -> str:
    """In the alphabet of registered models."""
    return re.sub(r"[^\w.\-]", "-", name)[:250]
