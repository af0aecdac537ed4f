"""The verifier's own process: `python -m sia.verify.worker TASK_DIR`.

Imports the task's `verify.py` once, however heavy, and then forks a child for every request, so
that nothing is carried from one submission to the next and a child that hangs or dies takes nothing
along.
Requests and answers are lines of JSON on stdin and stdout. The end of stdin ends the process.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sia.tasks.task import load_module

Verify = Callable[[Path, Path], dict[str, Any]]


def main() -> None:
    """Serves requests until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # prints of verify.py go nowhere
    verify: Verify = load_module(Path(sys.argv[1]) / "verify.py").verify
    for line in sys.stdin:
        request = json.loads(line)
        answer = _in_child(verify, request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _in_child(verify: Verify, request: dict[str, Any]) -> dict[str, Any]:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(read_fd)
        data = json.dumps(_answer(verify, request)).encode()
        while data:
            data = data[os.write(write_fd, data) :]
        os._exit(0)
    os.close(write_fd)
    data, in_time = _read_all(read_fd, time.monotonic() + request["deadline_s"])
    os.close(read_fd)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not in_time:
        return {"failed": f"the verifier took longer than {request['deadline_s']:g} s"}
    if not data:
        return {"failed": f"the verifier died (wait status {status})"}
    answer: dict[str, Any] = json.loads(data)
    return answer


def _answer(verify: Verify, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": verify(Path(request["submission"]), Path(request["labels"]))}
    except ValueError as error:
        return {"refused": str(error)}
    except BaseException:
        # The child is about to end: whatever it was has to reach the record, not only Exception.
        return {"failed": traceback.format_exc(limit=-3)}


def _read_all(fd: int, deadline: float) -> tuple[bytes, bool]:
    chunks: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return b"".join(chunks), True
        chunks.append(chunk)
    return b"".join(chunks), False


if __name__ == "__main__":
    main()
