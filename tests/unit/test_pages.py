"""The read model of the pages: bounded reads, what a journal says, harmless text, charts."""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from made_runs import make_run
from sia import rundir
from sia.errors import RunDirectoryError
from sia.gateway.protocol import Role, Spend
from sia.gateway.store import STORE_FILE, Exchange, Store
from sia.pages import CandidateFolder, Chosen, Folder, NotThere, RunReader, Runs, chart, talk
from sia.pages.candidate import LOG_PIECE, tables
from sia.pages.code import side_by_side
from sia.pages.compare import compare
from sia.pages.render import marked
from sia.pages.text import clean, notes
from sia.records import Attempt, Candidate, Decision, Generation, Lever, Outcome, Proposal
from sia.rundir import RunDir


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs with one run `toy/one`."""
    make_run(tmp_path / "runs" / "toy" / "one", trajectories=3)
    return tmp_path / "runs"


def reader(runs: Path, key: str = "toy/one") -> RunReader:
    return Runs(runs).open(key)


class TestFolder:
    def test_a_file_is_read_in_pieces_from_either_end(self, tmp_path: Path) -> None:
        (tmp_path / "a.log").write_bytes(b"0123456789")
        folder = Folder(tmp_path)
        end = folder.read("a.log", start=-4, limit=100)
        assert (end.data, end.start, end.end, end.whole) == (b"6789", 6, 10, False)
        assert folder.read("a.log", start=2, limit=3).data == b"234"
        assert folder.read("a.log", start=50, limit=3).data == b""

    @pytest.mark.parametrize("name", ["../secret", "in/../../secret", "/../secret", "in/\0x", ""])
    def test_no_name_leads_out(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "secret").write_text("secret")
        (tmp_path / "runs" / "in").mkdir(parents=True)
        with pytest.raises(NotThere):
            Folder(tmp_path / "runs").read(name, limit=10)

    def test_no_link_is_followed_in_any_place(self, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "secret").write_text("secret")
        root = tmp_path / "runs"
        root.mkdir()
        (root / "file").symlink_to(tmp_path / "outside" / "secret")
        (root / "folder").symlink_to(tmp_path / "outside")
        folder = Folder(root)
        for name in ("file", "folder/secret"):
            with pytest.raises(NotThere):
                folder.read(name, limit=10)
            assert folder.state(name) is None
            assert list(folder.lines(name, 0)) == []
        assert folder.names("") == []
        assert folder.names("folder") == []
        assert folder.tree("", limit=10) == []

    def test_a_pipe_does_not_hold_a_reader(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(NotThere):
            Folder(tmp_path).read("pipe", limit=10)

    def test_names_that_are_not_plain_text_are_left_out(self, tmp_path: Path) -> None:
        for name in (b"good", b"bad\xff", b"bad\n", b"bad\x1b[31m"):
            (tmp_path / os.fsdecode(name)).write_text("")
        assert Folder(tmp_path).names("") == ["good"]


class TestRun:
    def test_a_finished_run_is_whole(self, runs: Path) -> None:
        page = reader(runs).page()
        assert page.status == "finished"
        assert page.arm == "both"
        assert page.incumbent == "g001-c0"
        assert page.metric.name == "accuracy"
        assert page.failures == {"crashed": 1}
        assert [one.lever for one in page.generations] == [
            Lever.HARNESS, Lever.HARNESS, Lever.WEIGHTS, Lever.HARNESS,
        ]  # fmt: skip
        accepted = [one.accepted for one in page.candidates.values()]
        assert accepted == [True, True, False, False]

    def test_what_is_added_to_a_journal_is_seen_and_nothing_is_read_twice(
        self, tmp_path: Path
    ) -> None:
        path = make_run(tmp_path / "runs" / "one", generations=2, failed=None, ended=False)
        journal = path / rundir.JOURNAL_FILE
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # its last line is being written
        read = reader(tmp_path / "runs", "one")
        first = read.page()
        assert first.candidates["g000-c0"].doing == "verifier"
        assert read.page() is first
        journal.write_bytes(b"".join(lines))
        second = read.page()
        assert [one.index for one in second.generations] == [0, 1]
        assert second.candidates["g001-c0"].score == 1.0

    def test_the_evaluation_of_a_candidate_is_read_where_it_is_written(self, runs: Path) -> None:
        read = reader(runs)
        read.page()
        found = read.evaluation("g002-c0")
        assert found is not None
        assert found.candidate == "g002-c0"
        assert len(found.items) == 40
        assert read.evaluation("g003-c0") is None

    def test_a_damaged_line_hides_only_what_comes_after_it(self, runs: Path) -> None:
        path = runs / "toy" / "one" / rundir.JOURNAL_FILE
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:5], b"{damaged}\n", *lines[5:]]))
        page = reader(runs).page()
        assert "damaged after byte" in page.problem
        assert list(page.candidates) == ["g000-c0"]

    def test_a_run_is_running_while_its_lock_is_held(self, runs: Path) -> None:
        path = runs / "toy" / "one"
        (path / rundir.RESULT_FILE).unlink()
        assert reader(runs).page().status == "killed"
        held = RunDir.resume(path)
        try:
            assert reader(runs).page().status == "running"
        finally:
            held.close()

    def test_candidates_without_an_attempt_have_their_outcome(self, tmp_path: Path) -> None:
        path = make_run(tmp_path / "runs" / "one", generations=1)
        run = RunDir.resume(path)
        made = [
            ("0001/0", Candidate(id="g001-c0", generation=1, index=0, parent="g000-c0",
                                 proposal=Proposal(hypothesis=""), problem="unchanged")),
            ("0001/1", Candidate(id="g001-c1", generation=1, index=1, parent="g000-c0",
                                 proposal=Proposal(hypothesis=""), duplicate_of="g000-c0")),
        ]  # fmt: skip
        for key, candidate in made:
            run.journal.step(f"{key}/candidate", Candidate, lambda one=candidate: one)  # type: ignore[misc]
        run.close()
        page = reader(tmp_path / "runs", "one").page()
        assert page.candidates["g001-c0"].outcome is Outcome.BAD_PROPOSAL
        twin = page.candidates["g001-c1"]
        assert (twin.outcome, twin.score) == (Outcome.DUPLICATE, page.candidates["g000-c0"].score)

    def test_a_new_run_in_the_same_place_is_a_new_run(self, runs: Path) -> None:
        all_runs = Runs(runs)
        assert len(all_runs.open("toy/one").page().generations) == 4
        shutil.rmtree(runs / "toy" / "one")
        make_run(runs / "toy" / "one", generations=1, seed=3)
        assert len(all_runs.open("toy/one").page().generations) == 1


class TestRuns:
    def test_the_list_is_filtered_and_ordered(self, runs: Path) -> None:
        make_run(runs / "toy" / "two", seed=1, created_at="2026-11-26T10:00:00+00:00", ended=False)
        make_run(runs / "deep" / "er" / "three", generations=1)
        found = Runs(runs)
        assert found.lines(Chosen())[0].key == "toy/two"
        assert [line.key for line in found.lines(Chosen(status="killed"))] == ["toy/two"]
        assert [line.key for line in found.lines(Chosen(text="ER three"))] == ["deep/er/three"]
        assert found.lines(Chosen(task="lawbench")) == []
        assert next(line.best_score for line in found.lines(Chosen(order="best"))) == 1.0

    def test_a_damaged_run_is_listed_with_its_problem(self, runs: Path) -> None:
        (runs / "broken").mkdir()
        (runs / "broken" / rundir.RUN_FILE).write_text("{}")
        line = next(line for line in Runs(runs).lines(Chosen()) if line.key == "broken")
        assert line.status == "damaged"
        assert "run.json" in line.problem

    def test_linked_folders_are_no_runs(self, runs: Path, tmp_path: Path) -> None:
        make_run(tmp_path / "elsewhere")
        (runs / "link").symlink_to(tmp_path / "elsewhere")
        found = Runs(runs)
        assert [line.key for line in found.lines(Chosen())] == ["toy/one"]
        with pytest.raises(NotThere):
            found.open("link")

    def test_one_run_can_be_shown_alone(self, runs: Path) -> None:
        make_run(runs / "toy" / "two")
        found = Runs(runs / "toy" / "one")
        assert [line.key for line in found.lines(Chosen())] == ["one"]
        with pytest.raises(NotThere):
            found.open("two")


class TestCandidate:
    def test_the_diff_is_that_to_the_parent(self, runs: Path) -> None:
        files = {file.name: file for file in CandidateFolder(reader(runs), "g001-c0").diff()}
        assert files["readme.md"].status == "same"
        changed = [row for row in files["target_agent.py"].rows if row.kind == "changed"]
        assert "0.5" in changed[0].left.html
        assert "0.49" in changed[0].right.html
        assert changed[0].left.number == changed[0].right.number == 5

    def test_trajectories_are_found_by_their_text_and_by_their_score(self, runs: Path) -> None:
        folder = CandidateFolder(reader(runs), "g001-c0")
        assert folder.trajectories().total == 3
        found = folder.trajectories(text="NUMBER 2")
        assert [line.item for line in found.lines] == ["n00002"]
        assert "number 2" in found.lines[0].excerpt
        assert folder.trajectories(which="wrong").found == 0
        assert folder.trajectories(which="right").found == 3

    def test_letters_are_found_whether_a_file_escapes_them_or_not(self, runs: Path) -> None:
        folder = runs / "toy" / "one" / "gen-001" / "cand-0" / "agent_execution"
        message = [{"role": "user", "content": "盗窃罪"}]
        (folder / "execution_qn00000.json").write_text(json.dumps(message))
        (folder / "execution_qn00001.json").write_text(json.dumps(message, ensure_ascii=False))
        found = CandidateFolder(reader(runs), "g001-c0").trajectories(text="盗窃")
        assert [line.item for line in found.lines] == ["n00000", "n00001"]
        assert all("盗窃" in line.excerpt for line in found.lines)

    def test_a_log_is_shown_from_its_end_and_by_pieces(self, runs: Path) -> None:
        log = runs / "toy" / "one" / "gen-001" / "cand-0" / "stdout.log"
        log.write_bytes(b"begin" + b"x" * LOG_PIECE + b"end")
        folder = CandidateFolder(reader(runs), "g001-c0")
        end = folder.log("stdout.log")
        assert end.data.endswith(b"end")
        assert len(end.data) == LOG_PIECE
        assert folder.log("stdout.log", start=0).data.startswith(b"begin")
        with pytest.raises(NotThere):
            folder.log("usage.json")

    def test_the_curves_of_an_update_are_read(self, runs: Path) -> None:
        (curve,) = CandidateFolder(reader(runs), "g002-c0").curves()
        assert curve.series["loss"][0] == (1.0, 2.0)
        assert len(curve.series["reward"]) == 20
        assert CandidateFolder(reader(runs), "g001-c0").curves() == []

    def test_any_breakdown_becomes_tables(self) -> None:
        found = tables({"recall": {"a": 0.5, "b": {"c": 1}}, "list": [["x", 2], "y"], "one": 3})
        assert [(one.name, list(one.rows)) for one in found] == [
            ("recall", [("a", 0.5)]),
            ("recall / b", [("c", 1)]),
            ("list", [("x", 2), ("y",)]),
            ("one", [("", 3)]),
        ]


class TestTalk:
    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[" * 100_000, b"null", b"7", b'{"messages": 3}', b"[1, 2]", b"\xff\xfe"],
    )
    def test_a_file_that_is_no_conversation_is_text(self, data: bytes) -> None:
        assert talk.read(data).turns == ()

    def test_messages_are_read_in_the_shapes_of_both_vendors(self) -> None:
        blocks = [
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "name": "look", "input": {"at": 1}},
        ]
        call = {"function": {"name": "look", "arguments": '{"at": 1}'}}
        read = talk.read(
            json.dumps(
                {
                    "messages": [
                        {"role": "assistant", "content": blocks},
                        {"role": "assistant", "content": None, "tool_calls": [call, 3]},
                        {"role": 7, "content": {"odd": True}},
                        "text",
                    ]
                }
            ).encode()
        )
        assert [turn.calls[0].name for turn in read.turns[:2]] == ["look", "look"]
        assert read.turns[0].text.startswith("Let me see.")
        assert '"odd"' in read.turns[2].text
        assert read.turns[3].text == "text"

    def test_long_conversations_and_texts_are_cut_and_say_so(self) -> None:
        many = [{"role": "user", "content": "x" * 50_000}] * 1_000
        read = talk.read(json.dumps(many).encode())
        assert len(read.turns) == talk.MAX_TURNS
        assert read.left_out == 600
        assert read.turns[0].left_out == 30_000


class TestText:
    @pytest.mark.parametrize(
        ("given", "shown"),
        [
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
            ("\x9b2Jcleared", "cleared"),
            ("\x1bPdevice\x1b\\control", "control"),
            ("bell\x07, null\x00, back\x08", "bell, null, back"),
            ("a\r\nb\rc\td", "a\nb\nc\td"),
            ("x\u202ey", "x[U+202E]y"),
            ("zero\u200bwidth", "zero[U+200B]width"),
            ("half \ud800", "half [U+D800]"),
            ("\x1b[", ""),
        ],
    )
    def test_nothing_reaches_a_terminal_or_hides(self, given: str, shown: str) -> None:
        assert clean(given) == shown

    @pytest.mark.parametrize(
        "given",
        [
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "[click](javascript:alert(1))",
            "[click](https://evil.example)",
            "![pixel](https://evil.example/p.png)",
            "<https://evil.example>",
            "[a]: javascript:alert(1)\n\n[a]",
            "| a |\n|---|\n| <b onmouseover=alert(1)>x</b> |",
            '```"><script>alert(1)</script>\nx\n```',
            "&lt;script&gt;",
        ],
    )
    def test_notes_hold_no_element_but_those_of_plain_markdown(self, given: str) -> None:
        html = notes(given)
        assert "<script" not in html
        assert "<a" not in html
        assert "<img" not in html
        assert "<b " not in html
        assert "href" not in html.replace("&lt;", "<").split("<")[0]

    def test_what_was_searched_for_is_marked_and_escaped(self) -> None:
        assert marked("<b>Yes</b> YES", "yes") == (
            "&lt;b&gt;<mark>Yes</mark>&lt;/b&gt; <mark>YES</mark>"
        )
        assert marked("İ i", "i") == "İ i"

    def test_code_is_escaped_in_both_columns(self) -> None:
        rows = side_by_side("a.py", "x = '<script>'\n", "x = '<img onerror=1>'\n")
        assert "<script>" not in rows[0].left.html
        assert "<img" not in rows[0].right.html
        rows = side_by_side("a.unknown", "<script>", "<b>")
        assert rows[0].left.html == "&lt;script&gt;"


class TestChart:
    def test_marks_say_what_they_are_and_are_escaped(self) -> None:
        point = chart.Point(x=0, y=0.5, mark="weights accepted", title="<g000>", href="/a?b&c")
        svg = chart.plot(label="<l>", x_label="x", y_label="y", points=[point])
        assert 'class="mark weights accepted"' in svg
        assert "&lt;g000&gt;" in svg
        assert "/a?b&amp;c" in svg
        assert "<l>" not in svg

    @pytest.mark.parametrize(
        "values", [[0.0], [1.0, 1.0], [-5.0, 1e9], [1e-12], [float("nan"), 1.0]]
    )
    def test_any_numbers_can_be_drawn(self, values: list[float]) -> None:
        line = chart.Line(name="a", points=list(enumerate(values)))
        svg = chart.plot(label="l", x_label="x", y_label="y", lines=[line])
        assert "nan" not in svg
        assert svg.startswith("<svg")

    def test_nothing_is_drawn_of_nothing(self) -> None:
        assert chart.plot(label="l", x_label="x", y_label="y") == ""
        assert chart.bars(label="l", x_label="x", y_label="y", values={0: 0.0}) == ""


def test_runs_are_paired_item_by_item(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in range(2):
        make_run(runs / str(seed), seed=seed, exam=True)
    make_run(runs / "other", items=20)
    found = Runs(runs)
    same, better, other = compare([found.open(key) for key in ("0", "1", "other")])
    assert same.gain is None
    assert better.gain is not None
    assert better.gain.value == 0.0
    assert better.test_gain is not None
    assert better.test_gain.value == pytest.approx(-0.1)
    assert better.test_gain.low < better.test_gain.value < better.test_gain.high
    assert other.gain is None
    assert "items" in other.problem


def test_attempts_of_an_open_generation_are_shown_as_they_come(tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs" / "one", generations=1, ended=False)
    run = RunDir.resume(path)
    decision = Decision(lever=Lever.WEIGHTS, hypothesis="", recipe="sft")
    candidate = Candidate(
        id="g001-c0", generation=1, index=0, parent="g000-c0",
        proposal=Proposal(hypothesis=""), lever=Lever.WEIGHTS, policy="g001-c0",
    )  # fmt: skip
    try:
        run.journal.step("0000/decision", Decision, lambda: decision)
        read = reader(tmp_path / "runs", "one")
        assert read.page().next_decision == decision
        run.journal.step("0001/0/candidate", Candidate, lambda: candidate)
        assert read.page().candidates["g001-c0"].doing == "update"
        attempt = Attempt(candidate="g001-c0", outcome=Outcome.TIMEOUT, reason="too slow")
        run.journal.step("0001/0/attempt", Attempt, lambda: attempt)
        assert read.page().candidates["g001-c0"].outcome is Outcome.TIMEOUT
        assert read.page().generations[-1].closed is None
        closed = Generation(
            index=1, candidates=("g001-c0",), incumbent="g000-c0", best_score=1.0, accepted=False
        )
        run.journal.step("0001/generation", Generation, lambda: closed)
        assert read.page().generations[-1].closed == closed
    finally:
        run.close()


class TestCalls:
    @pytest.fixture
    def run(self, tmp_path: Path) -> RunReader:
        """A run with a decision, a session that was told to try again, and calls of the target."""
        path = make_run(tmp_path / "runs" / "one", ended=False)
        store = Store(path / STORE_FILE, mode="record", now=0.0)
        scopes = [
            ("g000/decision", Role.FEEDBACK), ("g001-c0/meta", Role.FEEDBACK),
            ("g001-c0/meta-2", Role.FEEDBACK), *[("g001-c0/target", Role.TARGET)] * 60,
        ]  # fmt: skip
        for number, (scope, role) in enumerate(scopes):
            store.add(call(scope, role, store.session, number))
        store.close()
        return reader(tmp_path / "runs", "one")

    def test_they_count_for_the_generation_that_they_lead_to(self, run: RunReader) -> None:
        page = run.page()
        assert page.generations[0].spend == Spend()
        assert page.generations[1].spend.calls == 63
        assert page.spend[Role.FEEDBACK].cost_usd == pytest.approx(1.5)

    def test_a_session_is_one_conversation(self, run: RunReader) -> None:
        folder = CandidateFolder(run, "g001-c0")
        assert folder.scopes() == {
            "g000/decision": 1, "g001-c0/meta": 1, "g001-c0/meta-2": 1, "g001-c0/target": 60,
        }  # fmt: skip
        turns = folder.call("g001-c0/meta", 0).turns
        assert [(turn.role, turn.text) for turn in turns] == [
            ("user", "question 1"),
            ("assistant", "answer 1"),
        ]

    def test_calls_of_a_target_come_page_by_page(self, run: RunReader) -> None:
        folder = CandidateFolder(run, "g001-c0")
        assert len(folder.calls("g001-c0/target")) == 50
        assert len(folder.calls("g001-c0/target", page=2)) == 10
        assert folder.call("g001-c0/target", 60).turns[0].text == "question 62"
        with pytest.raises(NotThere):
            folder.call("g001-c0/target", 61)

    def test_a_damaged_recording_hides_only_the_calls(self, run: RunReader) -> None:
        path = run.path / STORE_FILE
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
        page = run.page()
        assert "cannot be read" in page.problem
        assert len(page.generations) == 4
        with pytest.raises(RunDirectoryError):
            CandidateFolder(run, "g001-c0").scopes()


def call(scope: str, role: Role, session: int, number: int) -> Exchange:
    request = {"messages": [{"role": "user", "content": f"question {number}"}]}
    answer = {"choices": [{"message": {"role": "assistant", "content": f"answer {number}"}}]}
    return Exchange(
        id=0, session=session, scope=scope, role=role, format="chat", provider="p",
        requested_model="m", model="m", served_model="m", key=f"k{number}", exact=f"e{number}",
        occurrence=0, stream=False, status=200, headers={}, finish="stop", failure="", source="",
        input_tokens=10, cached_tokens=0, cache_write_tokens=0, output_tokens=1, estimated=False,
        counted=True, cost_usd=0.5, attempts=1, started_at=0.0, wall_s=0.1,
        request_zlib=zlib.compress(json.dumps(request).encode()),
        body_zlib=zlib.compress(json.dumps(answer).encode()),
    )  # fmt: skip
