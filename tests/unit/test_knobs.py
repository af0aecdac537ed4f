from pathlib import Path

import pytest

from sia.errors import TaskError
from sia.meta.knobs import When, load_space, read_knobs, settle, write_knobs

HARNESS = """\
# the views
views:
  words: false  # off at first
rerank: {use: false, top_k: 3}
"""
SPACE = """\
knobs:
  views.words: {values: [false, true], idea: words}
  rerank.use: {values: [false, true], idea: rerank}
  rerank.top_k: {values: [3, 5], needs: {rerank.use: true}, idea: depth}
moves:
  - {when: {symptom: in_top5_share, above: 0.1}, set: {rerank.use: true}, hypothesis: h, expect: e}
"""


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    (tmp_path / "harness.yaml").write_text(HARNESS)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def test_setting_a_knob_changes_its_line_and_keeps_the_comments(harness: Path) -> None:
    write_knobs(harness, {"views.words": True, "rerank.top_k": 5})
    text = (harness / "harness.yaml").read_text()
    expected = HARNESS.replace("words: false ", "words: true  ").replace("top_k: 3", "top_k: 5")
    assert text == expected  # the comment stays in its column
    assert read_knobs(harness, load_space(harness)) == {
        "views.words": True,
        "rerank.use": False,
        "rerank.top_k": 5,
    }


def test_knobs_that_do_not_matter_do_not_make_a_new_configuration(harness: Path) -> None:
    space = load_space(harness)
    base = read_knobs(harness, space)
    assert settle(space, {**base, "rerank.top_k": 5}, base) == base
    turned_on = {**base, "rerank.use": True, "rerank.top_k": 5}
    assert settle(space, turned_on, base) == turned_on


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("knobs: {absent: {values: [1], idea: i}}", "no value for the knob 'absent'"),
        ("knobs: {rerank.use: {idea: i}}", "needs either values, or low and high"),
        ("knobs: {rerank.use: {values: [1], low: 0, high: 1, idea: i}}", "needs either values"),
        ("knobs: {rerank.top_k: {values: [5], idea: i}}", "cannot have its present value 3"),
        ("knobs: {rerank.top_k: {low: 4, high: 9, idea: i}}", "cannot have its present value 3"),
        ("knobs: {rerank.use: {values: [0], idea: i}}", "cannot have its present value False"),
        ("knobs: {rerank.use: {values: [1], idea: i, vlaues: [2]}, x: 3}", "not a valid space"),
        (
            "knobs: {rerank.use: {values: [false], idea: i}}\n"
            "moves: [{set: {rerank.us: true}, hypothesis: h, expect: e}]",
            "names 'rerank.us'",
        ),
    ],
)
def test_a_wrong_space_is_refused_with_the_reason(harness: Path, space: str, message: str) -> None:
    (harness / "space.yaml").write_text(space)
    with pytest.raises(TaskError, match=message):
        load_space(harness)


def test_a_name_that_yaml_takes_for_a_boolean_is_explained(harness: Path) -> None:
    (harness / "harness.yaml").write_text("on: 1\n")
    (harness / "space.yaml").write_text("knobs: {'on': {values: [1], idea: i}}")
    with pytest.raises(TaskError, match="reads this name as a boolean"):
        load_space(harness)


def test_conditions_on_symptoms() -> None:
    assert When().holds({})
    assert When(symptom="a", above=0.1).holds({"a": 0.2})
    assert not When(symptom="a", above=0.1).holds({"a": 0.1})
    assert not When(symptom="a", above=0.1).holds({"b": 0.9})
    assert When(symptom="a", below=0.1).holds({"a": 0.0})
