"""Sessions of an agent in a real sandbox: what they leave, and what becomes of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostile.stage import SANDBOXES, Remembering, why_not
from rehearsal.stage import REFERENCE, Stage

from sia.errors import BadProposal, BudgetExceeded, MetaBackendError
from sia.gateway.protocol import Role
from sia.records import Choice, Failure, Lever, Outcome, Proposal, Update
from sia.sandbox import Process

REASONS = {kind: why_not(kind) for kind in ("bwrap", "process")}

GOOD = "Path('harness/target_agent.py').write_text('print(2)\\n')"
STATES = (
    "Path('proposal.json').write_text(json.dumps({'hypothesis': 'Two is more.',"
    " 'evidence': 'I counted.', 'expected_effect': '+1'}))"
)
NOTHING = "pass"
BROKEN = "Path('harness/target_agent.py').write_text('def (')"
STOPS = "Path('decision.json').write_text(json.dumps({'lever': 'stop', 'hypothesis': 'Enough.'}))"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """In the sandbox that works everywhere, where paths are those of this machine."""
    return Stage(root=tmp_path, sandbox=Process())


@pytest.fixture(params=["bwrap", "process"])
def confined(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    if REASONS[request.param]:
        pytest.skip(REASONS[request.param])
    return Stage(root=tmp_path, sandbox=Remembering(SANDBOXES[request.param]()))


def test_an_edit_arrives_with_its_reasons(confined: Stage) -> None:
    proposal, harness = confined.edit(f"{GOOD}; {STATES}")
    assert (harness / "target_agent.py").read_text() == "print(2)\n"
    assert proposal == Proposal(
        hypothesis="Two is more.",
        evidence="I counted.",
        expected_effect="+1",
        source="rehearsed",
        changes={"target_agent.py": "+1 -1 lines"},
    )
    assert confined.door.leases == [(Role.FEEDBACK, "g001-c0/meta")]
    assert not confined.sandbox.alive()


def test_an_agent_sees_its_workspace_the_data_and_nothing_of_this_machine(confined: Stage) -> None:
    look = (
        "Path('harness/target_agent.py').write_text('x = ' + repr(["
        "sorted(os.listdir('.')), Path('data/train.csv').read_text(), os.environ['SIA_MODEL'],"
        "os.path.samefile('.', sys.argv[4]), sorted(os.listdir('harness'))]))"
    )
    _, harness = confined.edit(look)
    found = (harness / "target_agent.py").read_text()
    seen = ["data", "feedback", "harness", "history.md", "python", "task.md"]
    assert found == "x = " + repr(
        [seen, "id,answer\n0,b\n", "rehearsed-1", True, ["target_agent.py"]]
    )


def test_the_interpreter_of_targets_is_at_hand(confined: Stage) -> None:
    tries = (
        "import subprocess;"
        "out = subprocess.run(['./python', 'harness/target_agent.py'], capture_output=True);"
        "Path('harness/target_agent.py').write_text('# ' + out.stdout.decode() + 'print()')"
    )
    _, harness = confined.edit(tries)
    assert (harness / "target_agent.py").read_text() == f"# {REFERENCE[7:-3]}\nprint()"


def test_the_first_harness_is_the_meta_agents(stage: Stage) -> None:
    proposal, _ = stage.first(f"{GOOD}; {STATES}")
    assert proposal.hypothesis == "Two is more."
    assert stage.door.leases == [(Role.META, "g000-c0/meta")]
    prompt = (stage.run / "gen-000/cand-0/prompt.md").read_text()
    assert prompt.startswith("# Write the first harness")


def test_a_first_harness_that_is_left_alone_is_the_baseline(stage: Stage) -> None:
    proposal, harness = stage.first(NOTHING)
    assert (harness / "target_agent.py").read_text() == REFERENCE
    assert proposal.changes == {}
    assert "it is the baseline" in proposal.evidence
    assert len(stage.door.leases) == 1


def test_an_unchanged_harness_is_sent_back_once_and_then_counted(stage: Stage) -> None:
    with pytest.raises(BadProposal, match=r"is what it was before.*the second session ended: done"):
        stage.edit(NOTHING)
    assert [scope for _, scope in stage.door.leases] == ["g001-c0/meta", "g001-c0/meta-2"]
    second = (stage.run / "gen-001/cand-0/prompt-2.md").read_text()
    assert "is what it was before" in second
    assert "## The contract of the target" in second


def test_a_syntax_error_is_mended_in_the_second_session(stage: Stage) -> None:
    proposal, harness = stage.edit(f"{BROKEN}; {STATES}", GOOD)
    assert (harness / "target_agent.py").read_text() == "print(2)\n"
    assert proposal.hypothesis == "Two is more."
    assert proposal.evidence.endswith("the second session ended: done after 1 turns")
    prompt = (stage.run / "gen-001/cand-0/prompt-2.md").read_text()
    assert "target_agent.py is not valid Python" in prompt


def test_an_edit_without_words_counts(stage: Stage) -> None:
    for words in (NOTHING, "Path('proposal.json').write_text('{\"hypothesis\": 3}')"):
        proposal, _ = stage.edit(f"{GOOD}; {words}")
        assert proposal.hypothesis == "(none given)"


def test_work_in_the_wrong_place_is_named_to_the_agent(stage: Stage) -> None:
    astray = "Path('target_agent.py').write_text('print(2)\\n'); Path('task.md').write_text('x')"
    with pytest.raises(BadProposal, match=r"where they do not belong: target_agent\.py\. "):
        stage.edit(astray, "assert 'REHEARSAL' in Path('task.md').read_text()")
    prompt = (stage.run / "gen-001/cand-0/prompt-2.md").read_text()
    assert "where they do not belong: target_agent.py; task.md. " in prompt
    moved = "os.rename('target_agent.py', 'harness/target_agent.py')"
    proposal, harness = stage.edit("Path('target_agent.py').write_text('print(2)\\n')", moved)
    assert (harness / "target_agent.py").read_text() == "print(2)\n"
    assert "dropped" not in proposal.evidence


def test_strays_beside_a_good_edit_are_sent_back_once_then_dropped_and_named(stage: Stage) -> None:
    litter = "os.mkdir('extra'); Path('extra/a.py').touch()"
    proposal, harness = stage.edit(f"{GOOD}; {litter}", NOTHING)
    assert "Written outside harness/, and dropped: extra/a.py." in proposal.evidence
    assert len(stage.door.leases) == 2
    assert sorted(path.name for path in harness.iterdir()) == ["target_agent.py"]
    kept = sorted(path.name for path in (harness.parent / "workspace").rglob("*") if path.is_file())
    assert kept == ["history.md", "scores.json", "task.md"]


def test_scratch_has_its_place(stage: Stage) -> None:
    stage.edit(f"{GOOD}; os.mkdir('notes'); Path('notes/idea.md').touch(); Path('.x').touch()")
    assert len(stage.door.leases) == 1


def test_caches_and_hidden_files_are_no_change(stage: Stage) -> None:
    leave = (
        "os.mkdir('harness/__pycache__'); Path('harness/__pycache__/x.pyc').touch();"
        "os.mkdir('harness/.cache'); Path('harness/.cache/x').touch()"
    )
    with pytest.raises(BadProposal, match="is what it was before"):
        stage.edit(leave)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("os.symlink('/etc/hostname', 'harness/name')", "harness/name is a symbolic link"),
        ("os.symlink('/etc', 'harness/etc')", "harness/etc is a symbolic link"),
        ("os.mkfifo('harness/pipe')", "harness/pipe is not a regular file"),
        ("open('harness/big', 'wb').truncate(65 * 2**20)", "harness/big is too large"),
        ("os.makedirs('harness/' + 'd/' * 60); Path('harness/' + 'd/' * 60 + 'x').touch()",
         "too many folders within one another"),
        ("[Path(f'harness/{i}').touch() for i in range(2100)]", "more than 2000 files"),
        ("Path('harness/a\\nb').touch()", "a name that is not plain text"),
        ("import shutil; shutil.rmtree('harness'); os.symlink('notes', 'harness')",
         "harness is a symbolic link"),
        ("import shutil; shutil.rmtree('harness'); Path('harness').touch()",
         r"no file target_agent\.py"),
        ("Path('harness/target_agent.py').unlink(missing_ok=True);"
         "os.symlink('/etc/hostname', 'harness/target_agent.py')",
         "target_agent.py is a symbolic link"),
    ],
    ids=["link", "folder link", "pipe", "huge", "deep", "many", "name", "linked", "file", "entry"],
)  # fmt: skip
def test_what_an_agent_sets_as_a_trap_is_refused_with_its_name(
    confined: Stage, act: str, message: str
) -> None:
    with pytest.raises(BadProposal, match=message):
        confined.edit(f"os.makedirs('harness', exist_ok=True); {act}")
    assert not confined.sandbox.alive()


def test_what_was_refused_is_told_and_may_stay_away(stage: Stage) -> None:
    _, harness = stage.edit(f"{GOOD}; os.symlink('/etc', 'harness/etc')", NOTHING)
    assert [path.name for path in harness.iterdir()] == ["target_agent.py"]
    prompt = (stage.run / "gen-001/cand-0/prompt-2.md").read_text()
    assert "harness/etc is a symbolic link" in prompt


def test_folders_without_files_are_not_carried_along(stage: Stage) -> None:
    _, harness = stage.edit(f"{GOOD}; os.makedirs('harness/' + 'd/' * 9)")
    assert sorted(path.name for path in harness.rglob("*")) == ["target_agent.py"]


def test_renamed_and_removed_files_are_gone(stage: Stage) -> None:
    (stage.task_folder / "harness/lib").mkdir()
    (stage.task_folder / "harness/lib/old.py").write_text("a\nb\n")
    (stage.task_folder / "harness/.hidden").write_text("kept")
    act = (
        "import shutil; shutil.rmtree('harness/lib'); Path('harness/new.bin').write_bytes(b'\\xff')"
    )
    proposal, harness = stage.edit(act)
    assert sorted(path.name for path in harness.rglob("*")) == [
        ".hidden", "new.bin", "target_agent.py",
    ]  # fmt: skip
    assert proposal.changes == {"lib/old.py": "removed", "new.bin": "new, 1 bytes"}


def test_a_session_that_the_end_of_the_run_cuts_short_counts_for_nothing(stage: Stage) -> None:
    stage.left_s = 1
    with pytest.raises(BudgetExceeded, match=r"budget\.wall_s is used up"):
        stage.edit(f"{GOOD}; import time; time.sleep(60)")


@pytest.mark.parametrize("end", ["turns", "tokens", "error"])
def test_a_session_that_was_cut_off_is_used_for_what_it_left(stage: Stage, end: str) -> None:
    said = f"said.update(end={end!r}, detail='far enough', turns=40)"
    proposal, _ = stage.edit(f"{GOOD}; Path('stray.py').touch(); {said}")
    assert len(stage.door.leases) == 1
    assert f"the session ended: {end} (far enough) after 40 turns" in proposal.evidence
    usage = json.loads((stage.run / "gen-001/cand-0/session/usage.json").read_text())
    assert (usage["end"], usage["turns"]) == (end, 40)


def test_a_session_that_runs_out_of_time_is_used_for_what_it_left(confined: Stage) -> None:
    confined.session_s = 2
    proposal, harness = confined.edit(f"{GOOD}; import time; time.sleep(60)")
    assert (harness / "target_agent.py").read_text() == "print(2)\n"
    assert "the session ended: timeout (ran longer than 2 s)" in proposal.evidence
    assert not confined.sandbox.alive()


def test_a_session_that_fills_the_disk_is_ended(stage: Stage) -> None:
    stage.limits = type(stage.limits)(memory_mib=2048, disk_mib=2)
    fill = "os.mkdir('notes'); Path('notes/a').write_bytes(b'x' * 4 * 2**20); import time"
    proposal, _ = stage.edit(f"{GOOD}; {fill}; time.sleep(60)")
    assert "ended: disk (wrote more than 2 MiB)" in proposal.evidence


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("sys.exit('no such model')", "exit code 1: no such model"),
        ("said.clear()", "did not say how the session ended"),
        ("said.update(end='splendid')", "did not say how the session ended"),
        ("print('{', file=sys.stderr); os._exit(0)", "did not say how the session ended: {"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("said.update(end='error', detail='401 wrong key', turns=0)", "401 wrong key"),
    ],
)
def test_a_model_that_cannot_be_reached_ends_the_run_and_not_its_generations(
    stage: Stage, act: str, message: str
) -> None:
    stage.door.answers = [0, 0]
    with pytest.raises(MetaBackendError, match=f"twice in a row: .*{message}") as error:
        stage.edit(act)
    assert not isinstance(error.value, BadProposal)
    assert f"python -m sia resume={stage.run}" in str(error.value)
    # It was asked the same again: the agent was never told of a fault of its own.
    folder = stage.run / "gen-001/cand-0"
    assert (folder / "prompt.md").read_bytes() == (folder / "prompt-2.md").read_bytes()


def test_an_error_before_the_first_answer_is_no_try_of_the_agents(stage: Stage) -> None:
    act = (
        "n = os.path.isdir('notes') and len(os.listdir('notes'))\n"
        "os.makedirs('notes', exist_ok=True); Path(f'notes/{n}').touch()\n"
        f"if not n: said.update(end='error', turns=0)\nelse: {BROKEN}"
    )
    stage.door.answers = [0, 1, 1]
    proposal, _ = stage.edit(act, GOOD)
    assert [scope for _, scope in stage.door.leases] == [
        "g001-c0/meta", "g001-c0/meta-2", "g001-c0/meta-3",
    ]  # fmt: skip
    assert "the second session ended: done" in proposal.evidence


def test_an_error_after_some_turns_is_told_and_counted(stage: Stage) -> None:
    with pytest.raises(BadProposal, match=r"ended: error \(overloaded\) after 7 turns"):
        stage.edit("said.update(end='error', detail='overloaded', turns=7)")


def test_an_agent_that_kills_its_own_driver_is_told_and_counted(stage: Stage) -> None:
    with pytest.raises(BadProposal, match=r"the second session ended: error .killed by SIGKILL"):
        stage.edit("os.kill(os.getpid(), 9)")


def test_a_refused_call_ends_the_step(stage: Stage) -> None:
    stage.door.refused = "budget.usd=1 is used up"
    with pytest.raises(BudgetExceeded, match=r"budget\.usd=1"):
        stage.edit(GOOD)
    assert (stage.run / "gen-001/cand-0/session/usage.json").is_file()


def test_cancel_kills_what_runs_and_what_is_to_come(confined: Stage) -> None:
    confined.scored()
    confined.plays("Path('harness/on').touch(); import time; time.sleep(60)")
    backend = confined.backend()
    request = confined.request(1, confined.history[-1].candidate)
    timer = threading.Timer(1.5, backend.cancel)
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        backend.propose(request)
    timer.join()
    assert time.monotonic() - began < 20
    assert not confined.sandbox.alive()
    with pytest.raises(KeyboardInterrupt):
        backend.propose(confined.request(1, confined.history[-1].candidate))


INTERRUPTED = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hostile.stage import SANDBOXES
from rehearsal.stage import Stage
signal.signal(signal.SIGINT, signal.default_int_handler)
stage = Stage(root=Path(sys.argv[2]), sandbox=SANDBOXES[sys.argv[3]](), session_s=60)
act = "import subprocess, time; subprocess.Popen(['sleep', '61.5']); print('at work', flush=True)"
stage.edit(act + "; Path('notes').mkdir(); time.sleep(61.5)")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["bwrap", "process"])
def test_an_end_of_the_run_is_the_end_of_its_session(
    kind: str, number: signal.Signals, tmp_path: Path
) -> None:
    if REASONS[kind]:
        pytest.skip(REASONS[kind])
    root = tmp_path / "stage"
    folder = str(Path(__file__).parent)
    run = subprocess.Popen([sys.executable, "-c", INTERRUPTED, folder, str(root), kind])
    work = root / "run/gen-001/cand-0/session/work"
    until = time.monotonic() + 30
    while not (work / "notes").exists() and time.monotonic() < until:
        time.sleep(0.05)
    working = {pid: command for pid in os.listdir("/proc") if (command := at_work(pid, root))}
    assert len(working) >= 2
    if (kind, number) == ("process", signal.SIGKILL):  # it cannot reach what the driver started
        for pid in [pid for pid, command in working.items() if "sleep" in command]:
            os.kill(int(pid), signal.SIGKILL)
    run.send_signal(number)
    assert run.wait(30) != 0
    until = time.monotonic() + 10
    while (left := [c for pid, c in working.items() if command_of(pid) == c]) and (
        time.monotonic() < until
    ):
        time.sleep(0.05)
    assert left == []


def at_work(pid: str, root: Path) -> str:
    """The command of a process that works in the session below `root`; empty for any other."""
    try:
        here = os.path.samefile(f"/proc/{pid}/cwd", root / "run/gen-001/cand-0/session/work")
    except OSError:
        return ""
    return command_of(pid) if here else ""


def command_of(pid: str) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return Path("/proc", pid, "cmdline").read_bytes().decode()
    except OSError:
        return ""


def test_a_session_leaves_its_logs_and_no_workspace(confined: Stage) -> None:
    confined.edit(f"{GOOD}; {STATES}; print('thinking', file=sys.stderr)")
    folder = confined.run / "gen-001/cand-0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "harness", "prompt.md", "session", "workspace",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "session").iterdir()) == [
        "stderr.log", "stdout.log", "usage.json",
    ]  # fmt: skip
    assert "thinking" in (folder / "session/stderr.log").read_text()


def test_sessions_leave_no_descriptor_open(stage: Stage) -> None:
    stage.edit(GOOD)
    before = len(os.listdir("/proc/self/fd"))
    stage.edit(GOOD)
    with pytest.raises(BadProposal):
        stage.edit("os.symlink('/', 'harness/root')")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_harness_with_links_is_not_shown_in_part(stage: Stage) -> None:
    (stage.task_folder / "harness/more").symlink_to("/etc")
    with pytest.raises(MetaBackendError, match=r"more is a symbolic link.*regular files"):
        stage.first(GOOD)


def test_two_runs_in_different_folders_are_told_the_same(stage: Stage, tmp_path: Path) -> None:
    see = (
        "Path('proposal.json').write_text(json.dumps({'hypothesis': ''.join(sorted("
        "f'{p} {p.stat().st_mtime} ' for p in Path('.').rglob('*') if p.name != 'data'))}))"
    )
    proposals = []
    for where in (stage, Stage(root=tmp_path / "elsewhere-and-longer", sandbox=Process())):
        reason = f"exit code 1: {where.run}/gen-000/x.py"
        where.scored(outcome=Outcome.CRASHED, score=None, reason=reason)
        (where.run / "gen-000/cand-0/stderr.log").write_text(f'File "{where.run}/x.py"\n')
        proposal, _ = where.edit(f"{see}; {GOOD}")
        folder = where.run / "gen-001/cand-0"
        texts = [path.read_bytes() for path in sorted(folder.glob("workspace/**/*.*"))]
        proposals.append((proposal, (folder / "prompt.md").read_bytes(), texts))
        assert str(where.root) not in str(proposals[-1])
    assert proposals[0] == proposals[1]


def test_a_decision_is_taken_as_it_was_made(confined: Stage) -> None:
    parent = confined.scored()
    act = (
        "Path('decision.json').write_text(json.dumps({'lever': 'harness', 'hypothesis': 'Sort.',"
        " 'evidence': Path('harness/target_agent.py').read_text(),"
        " 'expected_effect': str(job['max_turns'])}))"
    )
    confined.plays(decision=[act])
    decision = confined.backend().decide(confined.question(0, parent))
    assert (decision.lever, decision.hypothesis) == (Lever.HARNESS, "Sort.")
    assert decision.evidence == REFERENCE.strip()
    assert decision.expected_effect == "8"  # where there is little to choose, it is kept short
    assert confined.door.leases == [(Role.FEEDBACK, "g000/decision")]
    assert (confined.run / "gen-000/decision/prompt.md").is_file()


MENU = {
    "levers": (Lever.HARNESS, Lever.WEIGHTS, Lever.STOP),
    "recipes": (Choice(name="grpo", needs="rewards", when="rollouts are cheap"),),
    "updates": (Update(candidate="g001-c0", recipe="grpo", problem="the disk is full"),),
    "references": True,
}
TRAINS = (
    "Path('decision.json').write_text(json.dumps({'lever': 'weights', 'recipe': 'grpo',"
    " 'hypothesis': 'It cannot count.', 'settings': {'steps': 20}}))"
)


def test_an_agent_may_train_the_policy_and_is_told_how(stage: Stage) -> None:
    parent = stage.scored()
    stage.plays(decision=[TRAINS])
    decision = stage.backend().decide(stage.question(1, parent, **MENU))
    assert (decision.lever, decision.recipe) == (Lever.WEIGHTS, "grpo")
    assert decision.settings == {"steps": 20}
    prompt = (stage.run / "gen-001/decision/prompt.md").read_text()
    assert "`grpo` (needs rewards): rollouts are cheap" in prompt
    assert "Training items come\n  with their answers" in prompt
    assert "Made in g001-c0: `grpo` failed: the disk is full" in prompt


def test_a_recipe_that_is_not_on_the_menu_is_no_decision(stage: Stage) -> None:
    parent = stage.scored()
    stage.plays(decision=[TRAINS.replace("grpo", "magic")])
    decision = stage.backend().decide(stage.question(1, parent, **MENU))
    assert decision.lever is Lever.HARNESS
    assert "has the recipe 'magic', not one of ['grpo']" in decision.hypothesis


def test_an_agent_may_stop_the_run(stage: Stage) -> None:
    parent = stage.scored()
    stage.plays(decision=[STOPS])
    assert stage.backend().decide(stage.question(0, parent)).lever is Lever.STOP


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (NOTHING, "there is no decision.json"),
        ("Path('decision.json').write_text('stop')", "decision.json is not what was asked for"),
        (STOPS.replace("'stop'", "'weights'"), "has the lever 'weights', not one of"),
        (STOPS.replace("Enough.", " "), "states no hypothesis"),
        ("Path('decision.json').write_bytes(b'x' * 70000)", "more than 64 KiB"),
        ("os.mkdir('decision.json')", "there is no decision.json"),
    ],
)
def test_an_unusable_decision_is_sent_back_once_and_then_the_harness_goes_on_and_says_so(
    stage: Stage, act: str, message: str
) -> None:
    parent = stage.scored()
    stage.plays(decision=[act])
    decision = stage.backend().decide(stage.question(0, parent))
    assert decision.lever is Lever.HARNESS
    assert message in decision.hypothesis
    assert decision.hypothesis.startswith("(the agent gave no usable decision")
    assert decision.evidence == "the second session ended: done after 1 turns"
    assert [scope for _, scope in stage.door.leases] == ["g000/decision", "g000/decision-2"]
    stage.plays(
        decision=[act, f"os.path.isdir('decision.json') and os.rmdir('decision.json'); {STOPS}"]
    )
    assert stage.backend().decide(stage.question(0, parent)).lever is Lever.STOP


def test_a_decision_that_was_interrupted_starts_afresh(stage: Stage) -> None:
    parent = stage.scored()
    left = stage.question(0, parent).folder / "workspace"
    left.mkdir(parents=True)
    (left / "decision.json").write_text('{"lever": "stop", "hypothesis": "Old."}')
    stage.plays(decision=[NOTHING])
    assert stage.backend().decide(stage.question(0, parent)).lever is Lever.HARNESS


def test_an_unreachable_model_ends_a_decision_too(stage: Stage) -> None:
    parent = stage.scored()
    stage.plays(decision=["said.update(end='error', detail='503', turns=0)"])
    stage.door.answers = [0, 0]
    with pytest.raises(MetaBackendError, match="twice in a row: 503"):
        stage.backend().decide(stage.question(0, parent))


def test_what_feedback_selects_lies_in_the_workspace(stage: Stage) -> None:
    parent = stage.scored(
        metrics={"top5": 0.9}, traces=1, failures=(Failure(item="7", answer="a|b", score=0.0),)
    )
    folder = stage.run / "gen-000/cand-0/agent_execution"
    folder.mkdir()
    for item in ("7", "8"):
        (folder / f"execution_q{item}.json").write_text(json.dumps([{"content": item}]))
    stage.plays(
        f"{GOOD}; Path('proposal.json').write_text(json.dumps({{'hypothesis':"
        " str(sorted(str(p) for p in Path('feedback').rglob('*.*'))),"
        " 'evidence': Path('feedback/failures.md').read_text()}))"
    )
    proposal = stage.backend().propose(stage.request(1, parent))
    assert proposal.hypothesis == str(
        ["feedback/failures.md", "feedback/scores.json",
         "feedback/trajectories/execution_q7.json"]
    )  # fmt: skip
    assert "| 7 | a\\|b | 0 |" in proposal.evidence
