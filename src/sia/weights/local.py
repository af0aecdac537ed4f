"""The run's side of a local policy: starts `python -m sia.weights serve`, and ends it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from sia.errors import ProviderError
from sia.provenance import tree_sha256
from sia.weights.gguf_adapter import CONFIG_FILE
from sia.weights.models import locate

STARTS = 4  # the first one, and after a crash
STOP_S = 5.0
HEALTH_S = 5.0
POLL_S = 0.05
# The server needs no key: nothing else of the environment goes there.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
KEPT_PREFIXES = ("LC_", "XDG_", "HF_HOME", "HF_HUB_", "CUDA_", "NVIDIA_", "LD_LIBRARY_", "PYTHON")


class LocalModel:
    """A policy on this machine, served while the block runs; its process dies with this one.

    A server that crashes is started again on the same socket, a few times; a caller that tries
    again does not notice.
    """

    def __init__(
        self,
        *,
        model: str,
        log: Path,
        adapter: Path | None = None,
        slots: int = 1,
        threads: int | None = None,
        context: int = 8192,
        start_s: float = 120.0,
    ) -> None:
        """Starts nothing yet.

        Args:
            model: See `sia.weights.models`.
            log: Gets what the server prints.
            adapter: Folder of a PEFT adapter.
            slots: See `sia.weights.serve`.
            threads: See `sia.weights.serve`.
            context: See `sia.weights.serve`.
            start_s: Deadline of the start, loading included.

        Raises:
            ProviderError: The adapter is none.
        """
        if adapter is not None and not (adapter / CONFIG_FILE).is_file():
            raise ProviderError(f"{adapter} is no adapter folder: it has no {CONFIG_FILE}.")
        self.model = model
        self._adapter, self._log, self._start_s = adapter, log, start_s
        self._options = [f"--slots={slots}", f"--context={context}"]
        if threads is not None:
            self._options.append(f"--threads={threads}")
        # Nobody but the owner may enter: a target would otherwise have a way round the gateway.
        self._folder = Path(tempfile.gettempdir()) / f"sia-{secrets.token_hex(6)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()

    def check(self) -> None:
        """Whether the model is on this machine and can be served.

        Raises:
            ProviderError: The model or an extra is missing; with the command for it.
        """
        locate(self.model)

    @property
    def id(self) -> str:
        """The exact id: answers of the same model with another adapter are another model's."""
        if self._adapter is None:
            return self.model
        return f"{self.model}+{tree_sha256(self._adapter)[:12]}"

    @property
    def url(self) -> str:
        """Where the OpenAI formats are, for `Provider.base_url`."""
        return f"unix://{self._folder / 'policy.sock'}"

    def __enter__(self) -> Self:
        self._folder.mkdir(mode=0o700)
        try:
            self._process = self._start()
            self._wait(self._process)
        except BaseException:
            self.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="sia-local-model", daemon=True)
        self._keeper.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the server's process."""
        assert self._process is not None
        return self._process.pid

    def healthy(self) -> bool:
        """Whether the server answers, and has loaded its model."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(HEALTH_S)
            try:
                connection.connect(self.url.removeprefix("unix://"))
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                return connection.recv(64).split(b" ")[1:2] == [b"200"]
            except OSError:
                return False

    def close(self) -> None:
        """Ends the server; returns within seconds, and may be called again."""
        self._closing.set()
        if self._process is not None:
            _end(self._process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "sia.weights", "serve", "--until-eof", "--model", self.model,
            "--uds", str(self._folder / "policy.sock"), *self._options,
        ]  # fmt: skip
        if self._adapter is not None:
            command += ["--adapter", str(self._adapter)]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT or name.startswith(KEPT_PREFIXES)
        }
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # ends when this process does, however it does
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
                start_new_session=True,
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the server answers.

        Raises:
            ProviderError: It has ended, or the deadline is over.
        """
        until = time.monotonic() + self._start_s
        while process.poll() is None:
            if self.healthy():
                return
            if time.monotonic() > until:
                raise ProviderError(
                    f"The server of the model {self.model!r} did not answer within "
                    f"{self._start_s:g} s. What it printed: {self._log}. Give it longer: "
                    "target.provider.serve.start_s=..."
                )
            time.sleep(POLL_S)
        raise ProviderError(
            f"The server of the model {self.model!r} ended with exit code {process.returncode}: "
            f"{self._last_line()}"
        )

    def _last_line(self) -> str:
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("sia: ") if lines else f"it printed nothing ({self._log})"

    def _keep(self) -> None:
        """Starts the server again when it has crashed."""
        for _ in range(1, STARTS):
            assert self._process is not None
            self._process.wait()
            if self._closing.is_set():
                return
            _end(self._process)  # closes its standard input
            with self._log.open("a", encoding="utf-8") as log:
                log.write(f"sia: the server ended with {self._process.returncode}; once more\n")
            (self._folder / "policy.sock").unlink(missing_ok=True)
            process = self._start()
            self._process = process
            if self._closing.is_set():  # closed in between: nobody else ends the new one
                _end(process)
                return


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server by the end of its input, or by force."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
