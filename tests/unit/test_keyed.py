"""Files that answer items by id: what is found, and what is left of a hostile one."""

import json
from pathlib import Path
from typing import Any

import pytest

from sia.tasks.keyed import Key, find_key, keep


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.csv", "label,id\nx,1\ny,2\n", "id"),
        ("a.csv", "PassengerId,x\n1,a\n2,b\n", "PassengerId"),
        ("a.json", [{"id": 1, "y": 0}, {"id": 2, "y": 0}], "id"),
        ("a.json", {"items": [{"question_id": "1"}, {"question_id": "2"}], "n": 2}, "question_id"),
        ("a.json", {"1": ["a"], "2": "b"}, None),
    ],
)
def test_items_are_found_in_tables_lists_and_objects(
    file: Any, name: str, content: Any, column: str | None
) -> None:
    assert find_key(file(name, content)) == Key(column=column, ids=("1", "2"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,x\n1,a\n1,b\n"),
        ("a.csv", "x,y\n1,a\n2,b\n"),
        ("a.json", [1, 2]),
        ("a.json", [{"id": True}, {"id": 2}]),
        ("a.json", "[" * 5000),
        ("a.json", '{"1": 1, "1": 2}'),
        ("a.txt", "id\n1\n2\n"),
    ],
)
def test_what_does_not_tell_items_apart_is_no_key(file: Any, name: str, content: Any) -> None:
    assert find_key(file(name, content)) is None


def test_a_field_that_is_named_counts_instead_of_the_usual_ones(file: Any) -> None:
    path = file("a.csv", "id,case\n1,x\n2,y\n")
    assert find_key(path, "case") == Key(column="case", ids=("x", "y"))
    assert find_key(path, "absent") is None


def test_only_wanted_rows_are_kept_and_repeated_ones_are_dropped(file: Any) -> None:
    path = file("a.csv", "id,label\n1,a\n2,b\n2,b\n01,c\n1.0,d\n3,e\n4,\n")
    kept = keep(path, ["1", "2", "4"])
    assert kept.text == "id,label\n1,a\n4,\n"
    assert kept.answers == {"1": "a", "4": ""}
    assert kept.repeated == ("2",)
    assert kept.unknown == 3


@pytest.mark.parametrize(
    "content",
    [
        [{"id": 1, "answer": "a"}, {"id": 2, "answer": "b"}, {"id": 2, "answer": "c"}, {"id": 9}],
        {"details": [{"question_id": "1", "answer": "a"}, {"question_id": "2"}, {"qid": 2}]},
        {"answers": {"1": "a", "7": "x", "true": "y"}, "model": "m"},
    ],
)
def test_json_is_filtered_wherever_its_entries_lie(file: Any, content: Any) -> None:
    kept = keep(file("a.json", content), ["1", "2"])
    assert kept.answers == {"1": "a"}
    assert "7" not in kept.text
    assert '"2"' not in kept.text
    assert json.loads(kept.text)


def test_an_entry_with_two_ids_and_one_that_is_no_object_answer_nothing(file: Any) -> None:
    content = [{"id": 1, "question_id": 2, "answer": "a"}, 5, {"id": 1.0}, {"id": True}, {"id": 2}]
    kept = keep(file("a.json", content), ["1", "2"])
    assert json.loads(kept.text) == [{"id": 2}]
    assert kept.unknown == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "has no column of ids"),
        ("a.csv", "id,id\n1,2\n", "names a column twice"),
        ("a.csv", "id,y\n1\n", "has 1 cells, not 2"),
        ("a.json", "[1, NaN]", "NaN"),
        ("a.json", '{"1": "A", "1": "B"}', "names '1' twice"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", "{", "Expecting"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(
    file: Any, name: str, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        keep(file(name, content), ["1", "2"])


def test_links_and_other_encodings_are_refused(file: Any, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(file("a.json", "[]"))
    with pytest.raises(ValueError, match="not a plain file"):
        keep(tmp_path / "link.json", ["1"])
    (tmp_path / "b.csv").write_bytes("id,y\n1,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        keep(tmp_path / "b.csv", ["1"])


def test_a_lone_surrogate_can_be_written(file: Any, tmp_path: Path) -> None:
    kept = keep(file("a.json", '[{"id": 1, "answer": "\\ud800"}]'), ["1"])
    (tmp_path / "out.json").write_text(kept.text, encoding="utf-8")
