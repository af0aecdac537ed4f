"""A local policy, base and adapter, behind the OpenAI wire format; runs in a process of its own.

GGUF files are served by llama.cpp's own server inside xllamacpp, all else by
`sia.weights.torch_server`. Both answer `/v1/chat/completions`, `/v1/completions`, `/v1/models` and
`/health`, with log-probabilities where a request asks for them.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path

from sia.errors import ProviderError, WeightsError
from sia.weights.models import Located, locate

HTTP_THREADS = 128  # one is held by every connection that a client keeps open
SOCKET_SUFFIX = ".sock"


def serve(
    model: str,
    *,
    adapter: Path | None = None,
    uds: Path | None = None,
    port: int | None = None,
    slots: int = 1,
    threads: int | None = None,
    context: int = 8192,
    until_eof: bool = False,
) -> None:
    """Serves until a signal comes, or until the standard input ends.

    With one slot an answer depends on the request alone: at temperature 0, or with its seed, it is
    the same every time on the same machine. Prompts are not cached for that reason either.

    Args:
        model: See `sia.weights.models`.
        adapter: Folder of a PEFT adapter for it.
        uds: Unix socket to listen on, whose name ends in `.sock`; None: the loopback interface.
        port: On the loopback interface; 0 or None: any that is free.
        slots: Answers that are generated at once (GGUF only). With more than one they are computed
            together, and equal requests may differ in the last digits.
        threads: None: one for each core that this process may use.
        context: Tokens of prompts and answers (GGUF only), shared by the slots.
        until_eof: End with the standard input: whoever holds its other end is gone then.

    Raises:
        ProviderError: The model cannot be served.
        WeightsError: The adapter does not fit.
    """
    if uds is not None and uds.suffix != SOCKET_SUFFIX:
        raise ProviderError(f"--uds {uds}: the name of the socket has to end in {SOCKET_SUFFIX}.")
    located = locate(model)
    # Threads that wait by spinning starve each other as soon as the machine has other work. Read
    # when the libraries are loaded, so nothing of them may be imported before.
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0")
    threads = threads or len(os.sched_getaffinity(0))
    if until_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if located.engine == "transformers":
        from sia.weights.torch_server import serve_torch

        serve_torch(
            located.where, name=model, adapter=adapter, uds=uds, port=port or 0, threads=threads
        )
        return
    _serve_gguf(
        located, model, adapter=adapter, uds=uds, port=port or 0, slots=slots, threads=threads,
        context=context,
    )  # fmt: skip


def _serve_gguf(
    located: Located,
    name: str,
    *,
    adapter: Path | None,
    uds: Path | None,
    port: int,
    slots: int,
    threads: int,
    context: int,
) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = located.where
    params.model_alias = {name}
    params.n_ctx = context
    params.n_parallel = slots
    params.kv_unified = slots > 1
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_threads_http = HTTP_THREADS
    params.hostnames = [str(uds) if uds else "127.0.0.1"]
    params.port = port
    params.ui = False
    params.verbosity = 1  # errors
    with tempfile.TemporaryDirectory(prefix="sia-adapter-") as scratch:
        if adapter is not None:
            from sia.weights.gguf_adapter import convert

            converted = Path(scratch) / "adapter.gguf"
            convert(adapter, Path(located.where), converted)
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(converted), 1.0)]
        try:
            server = xllamacpp.Server(params)
        except RuntimeError as error:
            what = f" with the adapter in {adapter}" if adapter else ""
            raise WeightsError(f"xllamacpp cannot serve {located.where}{what}: {error}") from error
    print(f"listening on {server.listening_address}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pause()


def _end_with_stdin() -> None:
    # Unbuffered: an interpreter that ends while a thread holds the buffer's lock aborts.
    while os.read(0, 4096):
        pass
    os._exit(0)
