"""Descriptions of similar tasks, asked of a scripted endpoint through the real gateway."""

import pytest

from sia.gateway import scripted
from sia.similar import main
from sia.tasks import Task

WHO = ["provider=scripted", "target.model=scripted-1"]
SAYS = "Here they are.\n\n## Apples\n\nWhich are ripe?\n\n## Stones\n\nWhich float?\n"


@pytest.mark.parametrize("formats", ["[chat]", "[messages]"])
def test_descriptions_are_written_where_a_meta_backend_reads_them(
    toy: Task, monkeypatch: pytest.MonkeyPatch, formats: str
) -> None:
    rules = [{"when": {"text": "(?s)2 other tasks.*large or small"}, "say": SAYS}]
    with scripted.serving(rules) as server:
        monkeypatch.setenv("SIA_SCRIPTED_URL", server.url)
        command = [str(toy.root), "--count", "2", *WHO, f"provider.formats={formats}"]
        assert main(command) == 0
    text = (toy.public_dir / "SAMPLE_TASK_DESCRIPTIONS.md").read_text()
    assert text.startswith("## Apples")
    assert "## Stones" in text


@pytest.mark.parametrize(
    ("rule", "args", "message"),
    [
        ({"say": SAYS}, [], "described 2 tasks and not 3"),
        ({"fault": "status", "status": 400}, [], "answered 400"),
        ({"say": SAYS}, ["--count", "11"], "between 1 and 10"),
        ({"say": SAYS}, ["budget.requests=0"], "budget.requests=0"),
        ({"say": SAYS}, ["target.modl=x"], "Did you mean 'target.model'"),
        ({"say": SAYS}, ["provider=none"], "Which model is asked?"),
    ],
)
def test_what_gives_no_descriptions_is_said_and_nothing_is_written(
    toy: Task,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rule: dict[str, object],
    args: list[str],
    message: str,
) -> None:
    with scripted.serving([rule]) as server:
        monkeypatch.setenv("SIA_SCRIPTED_URL", server.url)
        assert main([str(toy.root), *WHO, *args]) == 2
    assert message in capsys.readouterr().err
    assert not (toy.public_dir / "SAMPLE_TASK_DESCRIPTIONS.md").exists()
