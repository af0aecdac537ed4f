from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins.sia_multirun import replace_others
from sia.multirun import Failure, override, summary


def failure(number: int, folder: Path, **fields: str) -> Failure:
    return Failure(number=number, overrides=("task=toy", f"seed={number}"), folder=folder, **fields)


def test_launchers_of_other_plugins_do_not_check_the_settings_of_ours() -> None:
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="submitit_local", node={"theirs": 1}, provider="them")
    store.store(group="hydra/launcher", name="theirs", node={"theirs": 1}, provider="them")
    replace_others()
    assert "submitit_local.yaml" not in store.list("hydra/launcher")
    assert "theirs.yaml" in store.list("hydra/launcher")


def test_the_summary_names_what_differs_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [["task=toy", f"seed={number}"] for number in range(3)]
    first = failure(1, tmp_path / "1", reason="No.\nTry x=2.", log="/log")
    text = summary([first, failure(2, tmp_path / "2")], overrides=overrides, folder=tmp_path)
    assert text.splitlines() == [
        f"2 of 3 runs did not finish; 1 did. {tmp_path}",
        "  run 1  seed=1",
        "    No.",
        "    Try x=2.",
        "    it printed: /log",
        f"    again: python -m sia task=toy seed=1 hydra.run.dir={tmp_path}/1",
        "  run 2  seed=2",
        "    never began: its process was killed, ran out of memory, or lost its machine",
        f"    again: python -m sia task=toy seed=2 hydra.run.dir={tmp_path}/2",
    ]


def test_a_single_failure_is_still_told_apart(tmp_path: Path) -> None:
    overrides = [["task=toy", f"seed={number}"] for number in range(3)]
    text = summary([failure(2, tmp_path / "2")], overrides=overrides, folder=tmp_path)
    assert "  run 2  seed=2\n" in text


@pytest.mark.parametrize(
    "name", ["plain", "it's, a=b", "back\\slash", "quote'", "ends\\", "ü {x} $"]
)
def test_any_path_comes_back_from_hydras_grammar(name: str) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override("resume", Path(name))])
    assert parsed.value() == name
