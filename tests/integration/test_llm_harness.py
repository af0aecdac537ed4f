"""Language-model harnesses in real sandboxes, against an endpoint that follows a script.

Mostly without the gateway, which would hide the endpoint's faults from them.
"""

import contextlib
import csv
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile.stage import SANDBOXES, why_not

from sia.errors import BudgetExceeded
from sia.gateway import Budget, Gateway, ModelGateway, Provider, Role, Route, scripted
from sia.records import Attempt, Outcome
from sia.sandbox import Endpoint, Environments, Limits
from sia.target import HarnessRunner
from sia.tasks import load_task

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "src" / "sia" / "tasks" / "llm_harness"
REASONS = {kind: why_not(kind) for kind in ("bwrap", "process")}
LABELS = ["盗窃", "[贩卖、运输]毒品", "放火", "受贿"]
ACTS = ["深夜入室窃取财物", "在车站交付海洛因", "用打火机点燃仓库", "收受他人所送现金"]
LAWBENCH = [
    {"when": {"last": f"{act}[^\n]*$"}, "say": f"事实清楚。\n**答案：** {label}罪。"}
    for act, label in zip(ACTS, ("盗窃", "【贩卖、运输】毒品", "放 火", "受贿"), strict=True)
]


@dataclass
class OneEndpoint:
    """A gateway whose every lease leads to the same endpoint."""

    endpoint: Endpoint
    refused: str = ""

    @contextlib.contextmanager
    def lease(
        self, role: Role, scope: str, *, policy: Path | None = None
    ) -> Iterator["OneEndpoint"]:
        assert role is Role.TARGET
        yield self


class Try:
    """One harness on one data set, in one sandbox."""

    def __init__(self, kind: str, root: Path) -> None:
        self.sandbox = SANDBOXES[kind]()
        self.root = root
        self.seen: list[scripted.Seen] = []

    def run(
        self,
        task: str,
        harness: Path,
        data: Path,
        rules: Sequence[dict[str, Any]],
        *,
        dies_after: int = 0,
        budget: Budget | None = None,
        top: dict[str, object] | None = None,
        **settings: object,
    ) -> Attempt:
        copy = self.root / "harness"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(harness, copy, ignore=shutil.ignore_patterns("__pycache__"))
        config = yaml.safe_load((copy / "harness.yaml").read_text())
        config |= top or {}
        config["model"] |= {"concurrency": 3, "retries": 1} | settings
        (copy / "harness.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
        socket = self.root / "gateway.sock"
        socket.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(scripted.serving(rules, uds=socket))
            self.seen = server.seen
            port = int(server.url.rsplit(":", 1)[1])
            endpoint = Endpoint(socket=socket, port=port, key="k", model="scripted-1")
            gateway: Gateway = OneEndpoint(endpoint)
            if budget is not None:
                provider = Provider(name="scripted", base_url=f"{server.url}/v1")
                gateway = stack.enter_context(
                    ModelGateway(
                        store=self.root / "gateway.sqlite",
                        routes={Role.TARGET: Route(provider=provider, model="scripted-1")},
                        budget=budget,
                    )
                )
            runner = HarnessRunner(
                sandbox=self.sandbox,
                environments=Environments(self.root / "environments"),
                task=load_task(ROOT / "tasks" / task),
                limits=Limits(memory_mib=4096),
                data=data,
                gateway=gateway,
            )
            if dies_after:
                stack.callback(threading.Thread.join, self._end(stack.pop_all(), dies_after))
            return runner.run("c", harness=copy, out=self.root / "out", deadline_s=60)

    def _end(self, server: contextlib.ExitStack, calls: int) -> threading.Thread:
        def watch() -> None:
            until = time.monotonic() + 50
            while len(self.seen) < calls and time.monotonic() < until:
                time.sleep(0.005)
            server.close()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    @property
    def answers(self) -> dict[str, str]:
        path = self.root / "out" / "submission" / "submission.csv"
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        return {row[0]: row[1] for row in rows[1:]}

    @property
    def stderr(self) -> str:
        return (self.root / "out" / "stderr.log").read_text()

    def trajectory(self, item: str) -> list[dict[str, str]]:
        path = self.root / "out" / "agent_execution" / f"execution_q{item}.json"
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=["bwrap", "process"])
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Try:
    if REASONS[request.param]:
        pytest.skip(REASONS[request.param])
    return Try(request.param, tmp_path)


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def case(k: int, rng: random.Random) -> str:
    act = ACTS[k % 4]
    return f"第{k}案，{rng.randint(2008, 2017)}年被告人张{k % 3}在某市{act}，后被抓获。"


def item(k: int) -> dict[str, str]:
    """What only requests about item k fulfil."""
    return {"last": f"第{k}案[^\n]*$"}


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Forty train cases and twelve items of lawbench, four labels in turn."""
    folder, rng = tmp_path / "public", random.Random(0)
    train = [[f"t{k}", case(k, rng), LABELS[k % 4]] for k in range(40)]
    write(folder / "train.csv", ["id", "text", "label"], train)
    write(folder / "items.csv", ["id", "text"], [[f"i{k}", case(k, rng)] for k in range(12)])
    (folder / "labels.json").write_text(json.dumps(LABELS, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture
def lawbench(trial: Try, cases: Path) -> Callable[..., Attempt]:
    folder = ROOT / "tasks" / "lawbench" / "harness_llm"
    return lambda rules, **more: trial.run("lawbench", folder, cases, rules, **more)


def test_every_item_is_asked_once_and_answered_with_a_label(
    trial: Try, lawbench: Callable[..., Attempt]
) -> None:
    attempt = lawbench(LAWBENCH)
    assert (attempt.outcome, attempt.reason) == (Outcome.OK, "")
    assert trial.answers == {f"i{k}": LABELS[k % 4] for k in range(12)}
    assert len(trial.seen) == attempt.trajectories == 12
    roles = [message["role"] for message in trial.trajectory("i1")]
    assert roles == ["system", "user", "assistant", "tool"]
    assert trial.trajectory("i1")[2]["content"] == "事实清楚。\n**答案：** 【贩卖、运输】毒品罪。"
    assert trial.trajectory("i1")[3]["content"] == "extracted answer: [贩卖、运输]毒品"
    assert "12 items: 12 answered, 0 abstained, 0 failed" in trial.stderr
    first = (trial.root / "out" / "submission" / "submission.csv").read_bytes()
    lawbench(LAWBENCH)
    assert (trial.root / "out" / "submission" / "submission.csv").read_bytes() == first


UNCLEAR = [
    "可能是盗窃，也可能是放火。",
    "Answer: 盗窃、放火",
    "Answer: 无法判断",
    "Answer: 盗窃\n再想一想。\nAnswer: 诈骗",
    "盗窃",
    "",
]


def test_an_unclear_reply_is_an_abstention_and_never_a_guess(
    trial: Try, lawbench: Callable[..., Attempt]
) -> None:
    unclear = [{"when": item(k), "say": reply} for k, reply in enumerate(UNCLEAR)]
    assert lawbench([*unclear, *LAWBENCH]).outcome is Outcome.OK
    assert list(trial.answers.values()) == [""] * 6 + [LABELS[k % 4] for k in range(6, 12)]
    assert trial.trajectory("i0")[3]["content"] == "extracted answer: none (abstained)"
    assert "6 answered, 6 abstained, 0 failed" in trial.stderr


def test_failed_calls_are_counted_and_the_rest_is_handed_in(
    trial: Try, lawbench: Callable[..., Attempt]
) -> None:
    faults = ["truncated", "invalid_json", "empty_choices", "huge", "status", "surrogate"]
    failing = [{"when": item(k), "fault": fault} for k, fault in enumerate(faults)]
    assert lawbench([*failing, *LAWBENCH]).outcome is Outcome.OK
    assert list(trial.answers.values()) == [""] * 6 + [LABELS[k % 4] for k in range(6, 12)]
    # Half a character is a readable reply, if one without an answer.
    assert "6 answered, 1 abstained, 5 failed" in trial.stderr
    assert "(no reply: " in trial.trajectory("i2")[2]["content"]


def test_an_endpoint_that_dies_halfway_leaves_what_it_has_answered(
    trial: Try, lawbench: Callable[..., Attempt]
) -> None:
    slow = [{**rule, "wait_s": 0.4} for rule in LAWBENCH]
    attempt = lawbench(slow, dies_after=5, retries=0)
    assert attempt.outcome is Outcome.OK
    answered = [item for item, answer in trial.answers.items() if answer]
    assert 4 <= len(answered) < 12
    assert all(trial.answers[item] == LABELS[int(item[1:]) % 4] for item in answered)
    assert f"{len(answered)} answered, 0 abstained, {12 - len(answered)} failed" in trial.stderr
    assert "connection lost" in trial.stderr


def test_a_refused_budget_ends_the_attempt(trial: Try, lawbench: Callable[..., Attempt]) -> None:
    rule = {"when": item(3), "fault": "status", "status": 402}
    attempt = lawbench([rule, *LAWBENCH])
    assert (attempt.outcome, attempt.exit_code) == (Outcome.CRASHED, 1)
    assert attempt.reason == "exit code 1: the script answers with 402"
    assert len(trial.seen) < 12


def test_a_budget_that_is_used_up_ends_the_step(
    trial: Try, lawbench: Callable[..., Attempt]
) -> None:
    assert lawbench(LAWBENCH, budget=Budget()).outcome is Outcome.OK
    assert trial.answers == {f"i{k}": LABELS[k % 4] for k in range(12)}
    (trial.root / "gateway.sqlite").unlink()  # it would answer from what it has recorded
    with pytest.raises(BudgetExceeded, match=r"budget\.requests=5 is used up"):
        lawbench(LAWBENCH, budget=Budget(requests=5))
    assert len(trial.seen) == 5
    assert "budget.requests=5 is used up" in trial.stderr


def test_an_endpoint_that_answers_nothing_is_a_crash_with_its_reason(
    trial: Try, lawbench: Callable[..., Attempt]
) -> None:
    attempt = lawbench([{"fault": "status", "status": 401}])
    assert attempt.outcome is Outcome.CRASHED
    assert attempt.reason.startswith("exit code 1: no call was answered: 12 x HTTP 401")


def test_the_template_answers_a_task_of_labels(trial: Try, tmp_path: Path) -> None:
    data = tmp_path / "public"
    write(data / "train.csv", ["id", "text", "label"], [["a", "first", "yes"], ["b", "2nd", "no"]])
    write(data / "items.csv", ["id", "text"], [["x", "third"], ["y", "fourth"]])
    (data / "task.md").write_text("Is it so? Answer yes or no.")
    rules = [
        {"when": {"text": "Is it so.*Answer: yes.*third$"}, "say": "It is.\nAnswer: Yes."},
        {"say": "It may be yes."},
    ]
    assert trial.run("toy", TEMPLATE, data, rules).outcome is Outcome.OK
    assert trial.answers == {"x": "yes", "y": ""}


@pytest.fixture
def gpqa(trial: Try, tmp_path: Path) -> Callable[..., Attempt]:
    """Six questions whose right option is called so, under the letter of the item's name."""
    data, columns = tmp_path / "public", ["id", "domain", "subdomain", "question", *"ABCD"]
    rows = [
        [f"{letter}{k}", "Physics", "Optics", f"Is it so, {k}?",
         *("the right one" if name == letter else f"wrong {name}" for name in "ABCD")]
        for k, letter in enumerate("ABCDAB")
    ]  # fmt: skip
    write(data / "items.csv", columns, rows)
    write(data / "train.csv", [*columns, "label"], [["t", "Physics", "Optics", "Q", *"wxyz", "C"]])
    folder = ROOT / "tasks" / "gpqa" / "harness_llm"
    return lambda rules, **more: trial.run("gpqa", folder, data, rules, **more)


RIGHT = [{"when": {"last": r"([ABCD])\) the right one"}, "say": "Clearly.\nAnswer: <<1>>"}]


def test_gpqa_is_answered_by_letter_and_unclear_replies_abstain(
    trial: Try, gpqa: Callable[..., Attempt]
) -> None:
    unclear = ["I cannot tell", "Answer: AB", "Answer: none"]
    rules = [{"when": {"last": f"so, {k}"}, "say": say} for k, say in enumerate(unclear)]
    assert gpqa([*rules, *RIGHT], top={"shots": 1}).outcome is Outcome.OK
    assert trial.answers == {"A0": "", "B1": "", "C2": "", "D3": "D", "A4": "A", "B5": "B"}
    assert "6 items: 3 answered, 3 abstained; 0 of 6 calls failed" in trial.stderr
    shown = [message["content"] for message in trial.trajectory("D3")]
    assert shown[2] == "Answer: C"  # the labelled example
    assert shown[-1] == "votes: D; answer: D"


def test_gpqa_votes_see_the_options_in_other_orders(
    trial: Try, gpqa: Callable[..., Attempt]
) -> None:
    # A model that always says A has a vote for each option and a majority for none but the first.
    assert gpqa([{"say": "Answer: A"}], top={"votes": 4}).outcome is Outcome.OK
    assert trial.trajectory("C2")[-1]["content"] == "votes: A D C B; answer: A"
    assert len(trial.seen) == 24
    assert gpqa([{"fault": "status", "when": {"times": 2}}, *RIGHT], top={"votes": 3}, retries=0)
    assert trial.answers == {item: item[0] for item in trial.answers}
    assert "6 answered, 0 abstained; 2 of 18 calls failed" in trial.stderr


def test_gpqa_likelihood_falls_back_on_the_letter_that_is_replied(
    trial: Try, gpqa: Callable[..., Attempt]
) -> None:
    rules = [{"when": RIGHT[0]["when"], "say": "<<1>>"}]
    assert gpqa(rules, top={"ask": "likelihood"}).outcome is Outcome.OK
    assert trial.answers == {item: item[0] for item in trial.answers}
    asked = trial.seen[0].body
    assert (asked["max_tokens"], asked["logprobs"], asked["top_logprobs"]) == (1, True, 20)


def test_a_target_without_a_model_says_so(tmp_path: Path, cases: Path) -> None:
    if REASONS["process"]:
        pytest.skip(REASONS["process"])
    task = load_task(ROOT / "tasks" / "lawbench")
    runner = HarnessRunner(
        sandbox=SANDBOXES["process"](),
        environments=Environments(tmp_path / "environments"),
        task=task,
        limits=Limits(memory_mib=4096),
        data=cases,
    )
    attempt = runner.run("c", harness=task.harnesses["llm"], out=tmp_path / "out", deadline_s=60)
    assert attempt.outcome is Outcome.CRASHED
    assert "no model to ask: OPENAI_BASE_URL and SIA_MODEL not set" in attempt.reason
