"""Updates that were made before: what names them, what is kept, what is taken over."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sia.errors import WeightsError
from sia.records import to_json
from sia.weights.update import UPDATE_FILE, Record, Report
from sia.weights.update_cache import ENTRY_FILE, POLICY, UpdateCache, update_key

REPORT = Report(
    ended="steps", steps=5, tokens=80, seconds=1.5, tokens_per_s=53.3, peak_memory_mib=100.0,
    reward_before=0.1, reward_after=0.9, kl=1.0, entropy=0.5, silent_share=None, answers=80,
    unscored=0, cut=0, rounds=5, empty_rounds=0, parameters=10, device="cpu",
)  # fmt: skip
RECORD = Record(
    parent=None, parent_sha256="", base="base", base_sha256="", recipe={"name": "sft"},
    policy={"kind": "label"}, data_sha256="", job_sha256="", seed=0, packages={}, report=REPORT,
    curve=[],
)  # fmt: skip
SAID = {"steps": 5.0, "reward_after": 0.9}


def policy(folder: Path, *ended: str) -> Path:
    """What a cross-fit leaves: an adapter a fold."""
    for k, word in enumerate(ended):
        fold = folder / f"fold{k}"
        fold.mkdir(parents=True)
        record = replace(RECORD, report=replace(REPORT, ended=word))
        (fold / UPDATE_FILE).write_bytes(to_json(record))
    (folder / "scores.npz").write_bytes(b"scores")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> UpdateCache:
    return UpdateCache(tmp_path / "shared")


def test_what_was_put_is_taken_with_its_report_and_its_time(
    cache: UpdateCache, tmp_path: Path
) -> None:
    made = policy(tmp_path / "made", "steps", "steps")
    cache.put("key", made, report=SAID, seconds=12.5)
    entry = cache.take("key", tmp_path / "out", within_s=60)
    assert entry is not None
    assert (entry.report, entry.seconds) == (SAID, 12.5)
    assert {p.relative_to(made): p.read_bytes() for p in made.rglob("*.*")} == {
        p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")
    }
    assert cache.take("other", tmp_path / "nothing", within_s=60) is None
    assert not (tmp_path / "nothing").exists()


def test_the_first_of_two_equal_updates_stays(cache: UpdateCache, tmp_path: Path) -> None:
    made = policy(tmp_path / "made", "steps")
    cache.put("key", made, report=SAID, seconds=3)
    cache.put("key", made, report=SAID, seconds=4)
    entry = cache.take("key", tmp_path / "out", within_s=60)
    assert entry is not None
    assert entry.seconds == 3
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["key"]


def test_an_update_that_went_on_counts_at_least_the_time_of_its_steps(
    cache: UpdateCache, tmp_path: Path
) -> None:
    cache.put("key", policy(tmp_path / "made", "steps", "steps"), report=SAID, seconds=0.5)
    entry = cache.take("key", tmp_path / "out", within_s=60)
    assert entry is not None
    assert entry.seconds == 2 * REPORT.seconds


def test_whoever_makes_an_update_is_waited_for_and_nobody_else(cache: UpdateCache) -> None:
    began, order = threading.Event(), []

    def second() -> None:
        began.wait()
        with cache.turn("key", cancelled=lambda: False, within_s=60):
            order.append("second")

    with ThreadPoolExecutor() as pool, cache.turn("key", cancelled=lambda: False, within_s=60):
        waiting = pool.submit(second)
        with cache.turn("other", cancelled=lambda: False, within_s=60):
            began.set()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        order.append("first")
    assert order == ["first", "second"]


def test_a_wait_ends_when_it_is_cancelled_or_its_time_is_over(cache: UpdateCache) -> None:
    with cache.turn("key", cancelled=lambda: False, within_s=60):
        with (
            pytest.raises(KeyboardInterrupt),
            cache.turn("key", cancelled=lambda: True, within_s=60),
        ):
            pass
        with cache.turn("key", cancelled=lambda: False, within_s=0.1):
            pass  # and makes the update itself


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file")
    turn = UpdateCache(tmp_path / "shared").turn("key", cancelled=lambda: False, within_s=1)
    with (
        pytest.raises(WeightsError, match=r"target\.update_cache=.*shared' cannot be written"),
        turn,
    ):
        pass


def test_an_update_that_its_deadline_cut_is_not_kept(cache: UpdateCache, tmp_path: Path) -> None:
    cache.put("key", policy(tmp_path / "made", "steps", "wall_s"), report=SAID, seconds=1)
    assert cache.take("key", tmp_path / "out", within_s=60) is None


def test_an_update_that_would_not_have_been_ready_in_time_is_not_taken(
    cache: UpdateCache, tmp_path: Path
) -> None:
    cache.put("key", policy(tmp_path / "made", "steps"), report=SAID, seconds=61)
    assert cache.take("key", tmp_path / "out", within_s=60) is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [ENTRY_FILE, f"{POLICY}/scores.npz"])
def test_a_damaged_entry_is_refused_with_the_command_that_removes_it(
    cache: UpdateCache, tmp_path: Path, file: str
) -> None:
    cache.put("key", policy(tmp_path / "made", "steps"), report=SAID, seconds=1)
    (tmp_path / "shared" / "key" / file).write_bytes(b"{")
    with pytest.raises(WeightsError, match=r"is damaged: .* rm -r .*shared/key"):
        cache.take("key", tmp_path / "out", within_s=60)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_update(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file")
    made = policy(tmp_path / "made", "steps")
    with pytest.warns(UserWarning, match="is not shared"):
        UpdateCache(tmp_path / "shared").put("key", made, report=SAID, seconds=1)
    assert (made / "scores.npz").is_file()


def test_whatever_decides_about_a_policy_is_in_its_name(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra `train` is not installed")
    for name in ("base", "data", "parent"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "train.py").write_text("def items(): ...")
    plan = {"policy": {"kind": "label"}, "recipe": {"name": "sft", "steps": 5}, "seed": 0}

    def key(parent: Path | None = None, **changes: Any) -> str:
        return update_key(
            {**plan, **changes}, base=tmp_path / "base", parent=parent,
            train=tmp_path / "train.py", data=tmp_path / "data",
        )  # fmt: skip

    seen = [key()]
    assert key() == seen[0]
    seen += [key(seed=1), key(recipe={"name": "sft", "steps": 6}), key(threads=1)]
    seen.append(key(parent=tmp_path / "parent"))
    for name in ("base/file", "data/file", "train.py"):
        (tmp_path / name).write_text("changed")
        seen.append(key())
    assert len(set(seen)) == len(seen)
