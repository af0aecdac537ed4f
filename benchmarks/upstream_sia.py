"""Orchestration overhead of the published package `sia-agent` 0.6.0, per generation.

    python benchmarks/upstream_sia.py --venv /tmp/upstream-venv --generations 2 10

The package's module is called `sia`, like ours, so it lives in a virtual environment of its own
(made on the first call) and is started as a separate process. Nothing of it is imported,
changed or copied here. What a measured run is:

- Command: `python -I -m sia run --no-web`, harness focus, no sandbox, `pydantic-ai` as the agent.
- Endpoint: a scripted chat-completions server on loopback, in this process, that answers at once.
  Each agent call is two requests: one answered with file writes, one with a closing text.
- Task: one sum. Target and evaluator are real processes that write a small file or two and exit.
- Environment: REUSED. The package builds a fresh one per run, with ten packages and what they
  need. A stand-in `uv`, first on the PATH of that process only, links a bare prebuilt environment
  instead and turns every install into a no-op. So the time to build one is NOT in the numbers.
- Summaries: from generation 2 on the package asks its agent for a summary. It leaves out the
  configured provider there, so with a custom endpoint the call fails and is skipped, with a
  warning. With `--summaries on` (the default) the model id is one that also resolves without the
  provider, and the call succeeds; with `--summaries off` it fails, as it does for a custom one.
- Install: the package without its declared dependencies, plus `pydantic-ai-slim[openai]`. The path
  measured imports nothing else (no pandas, scikit-learn or web server), so start-up is a floor.

`per_generation_ms` is the slope (T(Gmax) - T(Gmin)) / (Gmax - Gmin), which cancels whatever a run
does once. `start_ms` is the rest, T(Gmin) - Gmin * slope: interpreter, imports (the agent library
loads at the first call), task and profile loading, the linked environment, final statistics.
`per_generation_cpu_ms` is the same slope of processor time, the steadier of the two where other
work shares the machine. All are medians over repeats. The endpoint's own time is a column: part of
the wall time, not of the processor time.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGE = "sia-agent"
VERSION = "0.6.0"
AGENT_SDK = "pydantic-ai-slim"
AGENT_SDK_VERSION = "2.62.0"

INSTALL_DEADLINE_S = 900.0
START_DEADLINE_S = 60.0
GENERATION_DEADLINE_S = 15.0

KEY_VARIABLE = "UPSTREAM_BENCHMARK_KEY"
# "openai-chat:..." resolves without the provider too, from OPENAI_BASE_URL; a bare id does not.
MODEL_WITH_SUMMARIES = "openai-chat:scripted"
MODEL_WITHOUT_SUMMARIES = "scripted"

TARGET_AGENT = '''\
"""Revision {revision}: adds the two numbers of the question."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--dataset_dir", type=Path, required=True)
parser.add_argument("--working_dir", type=Path, required=True)
args = parser.parse_args()

question = json.loads((args.dataset_dir / "question.json").read_text())
answer = question["a"] + question["b"]
log = [{{"role": "user", "content": "add"}}, {{"role": "assistant", "content": str(answer)}}]
(args.working_dir / "agent_execution.json").write_text(json.dumps(log))
(args.working_dir / "submission.json").write_text(json.dumps({{"answer": answer}}))
'''

EVALUATOR = '''\
"""Writes results.json with accuracy 1.0 for the right sum and 0.0 otherwise."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--gen-dir", type=Path, required=True)
gen_dir = parser.parse_args().gen_dir

truth = json.loads((Path(__file__).parents[1] / "private" / "answer.json").read_text())
submission = json.loads((gen_dir / "submission.json").read_text())
accuracy = float(submission["answer"] == truth["answer"])
(gen_dir / "results.json").write_text(json.dumps({"accuracy": accuracy}))
'''

STAND_IN_UV = """\
#!/bin/sh
case "$1" in
venv) exec ln -s {environment} "$2" ;;
pip) exit 0 ;;
*) echo "stand-in uv: unexpected arguments: $*" >&2; exit 2 ;;
esac
"""

PROBE = """\
import importlib.metadata, json, platform, sys
versions = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
print(json.dumps(versions))
"""


class UpstreamError(RuntimeError):
    """The package could not be installed, or a run of it did not do what it should."""


@dataclass(frozen=True)
class UpstreamRun:
    """One run of the package, from process start to exit.

    Attributes:
        generations: The `--max_gen` of the run.
        repeat: Which repeat it belongs to, from 0.
        wall_ms: Process start to exit.
        cpu_ms: User and system time of the process and its children.
        first_prompt_ms: Process start to the first prompt on disk, from file times.
        generation_ms: Between the ends of successive evaluations, from file times; one fewer than
            `generations`. The first has no summary call in it.
        agent_calls: Agent calls that reached the endpoint, by kind.
        endpoint_ms: Time the scripted endpoint spent answering, all requests together.
    """

    generations: int
    repeat: int
    wall_ms: float
    cpu_ms: float
    first_prompt_ms: float
    generation_ms: tuple[float, ...]
    agent_calls: dict[str, int]
    endpoint_ms: float


@dataclass(frozen=True)
class UpstreamTiming:
    """What `measure` found; the module docstring says what the numbers include.

    Attributes:
        package: Name on the package index.
        version: Release measured.
        python: Version of the interpreter in its environment.
        agent_sdk: Agent library and release that made the calls.
        summaries: Whether the package's summary calls succeed.
        runs: In the order they ran; the warm-up run is not among them.
        per_generation_ms: Median over repeats of the slope of `wall_ms`.
        per_generation_cpu_ms: Median over repeats of the slope of `cpu_ms`.
        start_ms: Median over repeats of the rest of `wall_ms`.
    """

    package: str
    version: str
    python: str
    agent_sdk: str
    summaries: bool
    runs: tuple[UpstreamRun, ...]
    per_generation_ms: float
    per_generation_cpu_ms: float
    start_ms: float


class ScriptedEndpoint(ThreadingHTTPServer):
    """A chat-completions server that scripts the package's meta, feedback and summary calls.

    A conversation that ends in a tool result gets a closing text. Any other is a new agent call;
    the file names its prompt asks for say which kind, and the answer writes those files.
    """

    daemon_threads = True

    def __init__(self) -> None:
        """Listen on a free loopback port; `serving` starts and stops the answers."""
        super().__init__(("127.0.0.1", 0), _EndpointHandler)
        self.lock = threading.Lock()
        self.agent_calls: Counter[str] = Counter()
        self.busy_ns = 0
        self.faults: list[str] = []

    @property
    def base_url(self) -> str:
        """Address for an OpenAI-kind client."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reset(self) -> None:
        """Forget the counts of the run before."""
        with self.lock:
            self.agent_calls.clear()
            self.busy_ns = 0
            self.faults.clear()

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The completion for one request."""
        messages = request["messages"]
        if messages[-1]["role"] == "tool":
            return _completion(request["model"], {"role": "assistant", "content": "Done."}, "stop")
        prompt = json.dumps(messages)
        if "summary.txt" in prompt:
            kind = "summary"
        elif "improvement.md" in prompt:
            kind = "feedback"
        else:
            kind = "meta"
        with self.lock:
            self.agent_calls[kind] += 1
            revision = self.agent_calls["meta"] + self.agent_calls["feedback"]
        target = TARGET_AGENT.format(revision=revision)
        files = {
            "meta": {"target_agent.py": target},
            "feedback": {"improvement.md": "- Count the revision.\n", "target_agent.py": target},
            "summary": {"summary.txt": "The revision number went up by one.\n"},
        }[kind]
        calls = [
            {
                "id": f"call_{kind}_{revision}_{index}",
                "type": "function",
                "function": {
                    "name": "write_file",
                    "arguments": json.dumps({"path": path, "content": content}),
                },
            }
            for index, (path, content) in enumerate(files.items())
        ]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        return _completion(request["model"], message, "tool_calls")

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer on a thread while the block runs, then close the port."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _EndpointHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Buffered, and flushed once per reply: head and body in two segments would wait for a delayed
    # acknowledgement, 40 ms that are nobody's overhead.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: ScriptedEndpoint

    def do_POST(self) -> None:
        """Answer a chat completion; anything else is a fault of the run."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        started_ns = time.perf_counter_ns()
        status = 200
        try:
            if self.path != "/v1/chat/completions":
                raise ValueError(f"unexpected path {self.path!r}")
            reply = self.server.reply(json.loads(body))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            status, reply = 400, {"error": {"message": str(error)}}
            with self.server.lock:
                self.server.faults.append(f"{type(error).__name__}: {error}")
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        with self.server.lock:
            self.server.busy_ns += time.perf_counter_ns() - started_ns

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line per request would be the loudest thing in the table."""


def _completion(model: str, message: dict[str, Any], finish_reason: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def _call(
    command: Sequence[str | Path],
    *,
    log: Path,
    deadline_s: float,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> int:
    """Exit status of a command in its own process group, its output in `log`.

    Waits without polling (a wait with a timeout would round the time up by as much as 50 ms);
    a timer kills the group at the deadline.

    Raises:
        UpstreamError: It was still running after `deadline_s`.
    """
    late = threading.Event()

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        late.set()
        kill()

    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timer = threading.Timer(deadline_s, expire)
        timer.daemon = True
        timer.start()
        try:
            status = process.wait()
        except BaseException:
            kill()
            process.wait()
            raise
        finally:
            timer.cancel()
    if late.is_set():
        raise UpstreamError(
            f"{_shown(command)} was still running after {deadline_s:.0f} s and was killed. "
            f"Its last lines:\n{_tail(log)}"
        )
    return status


def _shown(command: Sequence[str | Path]) -> str:
    return shlex.join(str(part) for part in command)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _checked(command: Sequence[str | Path], *, log: Path, deadline_s: float) -> None:
    status = _call(command, log=log, deadline_s=deadline_s)
    if status != 0:
        raise UpstreamError(f"{_shown(command)} exited with {status}:\n{_tail(log)}")


def _installed(venv: Path, scratch: Path) -> dict[str, str | None]:
    """Versions in an environment, by name; `python` is among them."""
    log = scratch / "probe.log"
    # Isolated, so that a `sia` beside the working directory or on PYTHONPATH is not what it finds.
    python = venv / "bin" / "python"
    probe: list[str | Path] = [python, "-I", "-c", PROBE, PACKAGE, AGENT_SDK]
    _checked(probe, log=log, deadline_s=START_DEADLINE_S)
    found: dict[str, str | None] = json.loads(log.read_text(encoding="utf-8"))
    return found


def prepare(venv: Path) -> dict[str, str | None]:
    """Versions in the package's environment, which is created where it is missing.

    The first call installs from the package index, 120 MB on disk; later ones only look.

    Raises:
        UpstreamError: The install failed, or `venv` exists and holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="upstream-install-") as folder:
        scratch = Path(folder)
        if not venv.exists():
            try:
                log = scratch / "install.log"
                _checked([sys.executable, "-m", "venv", venv], log=log, deadline_s=120.0)
                for requirement in (
                    ["--no-deps", f"{PACKAGE}=={VERSION}"],
                    [f"{AGENT_SDK}[openai]=={AGENT_SDK_VERSION}"],
                ):
                    install: list[str | Path] = [venv / "bin" / "python", "-m", "pip", "install"]
                    install += ["--quiet", *requirement]
                    _checked(install, log=log, deadline_s=INSTALL_DEADLINE_S)
            except BaseException:
                shutil.rmtree(venv, ignore_errors=True)
                raise
        if not (venv / "bin" / "python").exists():
            raise UpstreamError(
                f"--venv {str(venv)!r} exists and is not a virtual environment. "
                "Name a folder that does not exist yet; it is created."
            )
        versions = _installed(venv, scratch)
    if versions[PACKAGE] != VERSION or versions[AGENT_SDK] is None:
        raise UpstreamError(
            f"--venv {str(venv)!r} holds {PACKAGE} {versions[PACKAGE]!r} and "
            f"{AGENT_SDK} {versions[AGENT_SDK]!r}, not {PACKAGE} {VERSION!r} with {AGENT_SDK}. "
            f"If it is safe to lose: rm -r {shlex.quote(str(venv))}"
        )
    return versions


def _write_bench(bench: Path, venv: Path, *, base_url: str, summaries: bool) -> None:
    """Everything the runs share: stand-in uv, prebuilt environment, task and profiles."""
    target_environment = bench / "target-environment"
    python = venv / "bin" / "python"
    create: list[str | Path] = [python, "-m", "venv", "--without-pip", target_environment]
    _checked(create, log=bench / "environment.log", deadline_s=START_DEADLINE_S)

    profile = {
        "profile_id": "scripted",
        "name": "Scripted",
        "agent_impl": "pydantic-ai",
        "model": MODEL_WITH_SUMMARIES if summaries else MODEL_WITHOUT_SUMMARIES,
        "provider_id": str(bench / "provider.json"),
    }
    provider = {
        "provider_id": "scripted",
        "name": "Scripted endpoint",
        "client_kind": "openai",
        "base_url": base_url,
        "api_key_env": KEY_VARIABLE,
    }
    transcript = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "5"}]
    contents = {
        "bin/uv": STAND_IN_UV.format(environment=shlex.quote(str(target_environment))),
        "profile.json": json.dumps(profile),
        "provider.json": json.dumps(provider),
        "tasks/_shared/sample_agent_execution.json": json.dumps(transcript),
        "tasks/sum/data/public/task.md": "Add the two numbers in question.json.\n",
        "tasks/sum/data/public/question.json": json.dumps({"a": 2, "b": 3}),
        "tasks/sum/data/public/evaluate.py": EVALUATOR,
        "tasks/sum/data/private/answer.json": json.dumps({"answer": 5}),
        "tasks/sum/reference/reference_target_agent.py": TARGET_AGENT.format(revision=0),
        "tasks/sum/reference/SAMPLE_TASK_DESCRIPTIONS.md": "Multiply two numbers.\n",
    }
    for path, content in contents.items():
        file = bench / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    (bench / "bin" / "uv").chmod(0o755)


def _run(
    bench: Path,
    venv: Path,
    endpoint: ScriptedEndpoint,
    *,
    generations: int,
    repeat: int,
    run_id: int,
    summaries: bool,
) -> UpstreamRun:
    """One timed run in a fresh working directory.

    Raises:
        UpstreamError: Another exit status than 0, a generation that did not score 1.0, or agent
            calls other than one meta call and one feedback (and summary) call per later one.
    """
    folder = bench / f"cwd-{run_id}"
    folder.mkdir()
    home = bench / "home"
    home.mkdir(exist_ok=True)
    # From nothing, so that no proxy, key, PYTHONPATH or SIA_* setting of ours reaches it.
    environment = {
        "PATH": f"{bench / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HOME": str(home),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        KEY_VARIABLE: "scripted",
        "OPENAI_API_KEY": "scripted",
        "OPENAI_BASE_URL": endpoint.base_url,
    }
    command: list[str | Path] = [venv / "bin" / "python", "-I", "-m", "sia", "run", "--no-web"]
    command += ["--task_dir", bench / "tasks" / "sum"]
    command += ["--max_gen", str(generations), "--run_id", str(run_id)]
    command += ["--meta-agent-profile", bench / "profile.json"]
    command += ["--target-agent-profile", bench / "profile.json"]
    log = bench / f"run-{run_id}.log"

    endpoint.reset()
    cpu_before_s = _children_cpu_s()
    started_at_ns = time.time_ns()  # the clock of the file times
    started_ns = time.perf_counter_ns()
    status = _call(
        command,
        log=log,
        deadline_s=START_DEADLINE_S + GENERATION_DEADLINE_S * generations,
        cwd=folder,
        environment=environment,
    )
    wall_ns = time.perf_counter_ns() - started_ns
    cpu_s = _children_cpu_s() - cpu_before_s

    what = f"{PACKAGE} {VERSION} with --max_gen {generations}"
    if status != 0 or endpoint.faults:
        raise UpstreamError(
            f"{what} exited with {status}; faults at the endpoint: {endpoint.faults!r}. "
            f"Its last lines:\n{_tail(log)}"
        )
    expected = {"meta": 1, "feedback": generations - 1, "summary": (generations - 1) * summaries}
    calls = {kind: endpoint.agent_calls[kind] for kind in expected}
    if calls != expected:
        raise UpstreamError(
            f"{what} made the agent calls {calls!r}, not {expected!r}. "
            f"Its last lines:\n{_tail(log)}"
        )
    run_folder = folder / "runs" / f"run_{run_id}"
    scored_at_ns = []
    for number in range(1, generations + 1):
        generation = run_folder / f"gen_{number}"
        # The package exits 0 even when every target and evaluator failed.
        try:
            accuracy = json.loads((generation / "results.json").read_text())["accuracy"]
        except (OSError, ValueError, KeyError) as error:
            raise UpstreamError(f"{what}: generation {number} has no score: {error!r}") from error
        if accuracy != 1.0:
            raise UpstreamError(f"{what}: generation {number} scored {accuracy!r}, not 1.0")
        scored_at_ns.append((generation / "evaluation.log").stat().st_mtime_ns)
    first_prompt_at_ns = (run_folder / "gen_1" / "meta_agent_prompt.txt").stat().st_mtime_ns
    return UpstreamRun(
        generations=generations,
        repeat=repeat,
        wall_ms=round(wall_ns / 1e6, 1),
        cpu_ms=round(cpu_s * 1e3, 1),
        first_prompt_ms=round((first_prompt_at_ns - started_at_ns) / 1e6, 1),
        generation_ms=tuple(
            round((after - before) / 1e6, 1) for before, after in pairwise(scored_at_ns)
        ),
        agent_calls=calls,
        endpoint_ms=round(endpoint.busy_ns / 1e6, 1),
    )


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(
    venv: Path, generations: tuple[int, int], repeats: int, *, summaries: bool = True
) -> UpstreamTiming:
    """Overhead of the package per generation and per run.

    One warm-up run of the smaller size is thrown away; then each repeat runs both sizes, one after
    the other. Takes about the sum of the wall times; nothing runs in parallel. All files are in a
    temporary folder that is gone afterwards, except `venv`.

    Args:
        venv: Environment of the package; created when missing, never ours.
        generations: The smaller and the larger `--max_gen`, at least 1 and different.
        repeats: Pairs of runs, at least 1.
        summaries: Whether the package's summary calls succeed; see the module docstring.

    Raises:
        UpstreamError: The arguments make no slope, the package cannot be installed, or a run
            did not do what it should.
    """
    smaller, larger = generations
    if not 1 <= smaller < larger:
        raise UpstreamError(
            f"generations={generations!r}: need two numbers, at least 1, the smaller one first"
        )
    if repeats < 1:
        raise UpstreamError(f"repeats={repeats!r}: need at least 1")
    # Not resolved: bin/python must stay the link inside the environment.
    venv = venv.absolute()
    versions = prepare(venv)
    endpoint = ScriptedEndpoint()
    runs: list[UpstreamRun] = []
    with tempfile.TemporaryDirectory(prefix="upstream-sia-") as folder, endpoint.serving():
        bench = Path(folder).resolve()
        _write_bench(bench, venv, base_url=endpoint.base_url, summaries=summaries)
        plan = [(-1, smaller)]
        plan += [(repeat, size) for repeat in range(repeats) for size in (smaller, larger)]
        for run_id, (repeat, size) in enumerate(plan, start=1):
            runs.append(
                _run(
                    bench,
                    venv,
                    endpoint,
                    generations=size,
                    repeat=repeat,
                    run_id=run_id,
                    summaries=summaries,
                )
            )
    del runs[0]  # the warm-up
    slopes_ms = []
    cpu_slopes_ms = []
    starts_ms = []
    for short, long in zip(runs[::2], runs[1::2], strict=True):
        slope_ms = (long.wall_ms - short.wall_ms) / (larger - smaller)
        slopes_ms.append(slope_ms)
        cpu_slopes_ms.append((long.cpu_ms - short.cpu_ms) / (larger - smaller))
        starts_ms.append(short.wall_ms - smaller * slope_ms)
    return UpstreamTiming(
        package=PACKAGE,
        version=VERSION,
        python=str(versions["python"]),
        agent_sdk=f"{AGENT_SDK} {versions[AGENT_SDK]}",
        summaries=summaries,
        runs=tuple(runs),
        per_generation_ms=round(statistics.median(slopes_ms), 1),
        per_generation_cpu_ms=round(statistics.median(cpu_slopes_ms), 1),
        start_ms=round(statistics.median(starts_ms), 1),
    )


def table(timing: UpstreamTiming) -> str:
    """The runs and the two numbers, for a terminal."""
    summaries = "succeed" if timing.summaries else "fail and are skipped"
    lines = [
        f"{timing.package} {timing.version}, Python {timing.python}, {timing.agent_sdk}",
        f"endpoint answers at once, target environment reused, summary calls {summaries}",
        "",
        "generations  repeat  wall_ms  cpu_ms  first_prompt_ms  generation_ms  endpoint_ms",
    ]
    for run in timing.runs:
        # A run of one generation has no interval to show.
        between = statistics.median(run.generation_ms) if run.generation_ms else float("nan")
        lines.append(
            f"{run.generations:>11}  {run.repeat:>6}  {run.wall_ms:>7.0f}  {run.cpu_ms:>6.0f}  "
            f"{run.first_prompt_ms:>15.0f}  {between:>13.0f}  {run.endpoint_ms:>11.1f}"
        )
    lines += [
        "",
        f"per generation: {timing.per_generation_ms:.0f} ms "
        f"({timing.per_generation_cpu_ms:.0f} ms of processor time)",
        f"per run, besides its generations: {timing.start_ms:.0f} ms",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; 2 when it cannot be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--venv", type=Path, required=True, help=f"environment of {PACKAGE}; created when missing"
    )
    parser.add_argument(
        "--generations",
        type=int,
        nargs=2,
        default=[2, 10],
        metavar=("MIN", "MAX"),
        help="the two run lengths whose difference is measured (default: 2 10)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument(
        "--summaries",
        choices=("on", "off"),
        default="on",
        help="whether the summary call of each generation succeeds (default: on)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything measured here")
    options = parser.parse_args(arguments)
    smaller, larger = options.generations
    try:
        timing = measure(
            options.venv,
            (smaller, larger),
            options.repeats,
            summaries=options.summaries == "on",
        )
    except UpstreamError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(timing))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(asdict(timing), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
