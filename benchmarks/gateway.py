"""What the gateway adds to a model call, beside a direct call in the same run.

An endpoint that answers at once, the gateway, the sandbox's forwarder and the client are processes
of their own. Calls take turns: one direct, one over the gateway's loopback port, one over its Unix
socket through the forwarder, as from inside a sandbox. Mode `record`, every exchange is committed.
Times are of noisy machines: compare within one table.

    python benchmarks/gateway.py
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx2

from sia.gateway import ModelGateway, Price, Provider, Role, Route
from sia.gateway.store import read_spend
from sia.sandbox import forward

MODEL = "scripted-1"
ANSWER = "The defendant is charged with theft, because he took what was not his. " * 4
PROMPT = "Which of these charges fits the facts of the case? " * 40  # about 2 kB
STREAMS = 200
WARM_UP = 50
T = TypeVar("T")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1_000)
    parser.add_argument("--serve", nargs=2, metavar=("URL", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], Path(args.serve[1]))
        return
    with (
        tempfile.TemporaryDirectory(prefix="sia-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        script = Path(folder) / "script.yaml"
        script.write_text(json.dumps([{"say": ANSWER}]))
        url = stack.enter_context(
            started([sys.executable, "-m", "sia.gateway.scripted", str(script), "--port", "0"])
        ).split()[-1]
        store = Path(folder) / "gateway.sqlite"
        line = stack.enter_context(started([sys.executable, __file__, "--serve", url, str(store)]))
        endpoint = json.loads(line)
        port = free_port()
        waiting = "print('ready'); import time; time.sleep(1e6)"
        inside = [forward.__file__, str(port), endpoint["socket"], sys.executable, "-uc", waiting]
        stack.enter_context(started([sys.executable, *inside]))
        ways = {
            "direct": url,
            "gateway, loopback": f"http://127.0.0.1:{endpoint['port']}",
            "gateway, socket and forwarder": f"http://127.0.0.1:{port}",
        }
        table(ways, endpoint["key"], args.calls)
        crowd(ways, endpoint["key"])
        spent = read_spend(store)[Role.TARGET]
        expected = 2 * (2 * (args.calls + WARM_UP) + STREAMS)
        assert (spent.calls, spent.failed) == (expected, 0), spent


def table(ways: dict[str, str], key: str, calls: int) -> None:
    """Calls one after the other."""
    print("| call | streamed | median ms | p90 ms | added at the median | added at p90 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for stream in (False, True):
        with contextlib.ExitStack() as stack:
            clients = {
                way: stack.enter_context(client(httpx2.Client, url, key))
                for way, url in ways.items()
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(-WARM_UP, calls):
                for way, one in clients.items():
                    begun = time.perf_counter()
                    answer = one.post("/v1/chat/completions", json=request(number, way, stream))
                    took = time.perf_counter() - begun
                    assert answer.status_code == 200, answer.text
                    if number >= 0:
                        times[way].append(1e3 * took)
        base = times["direct"]
        for way, took in times.items():
            cells = [
                f"{measure(took):.2f}" for measure in (statistics.median, p90)
            ] + ["" if took is base else f"{measure(took) - measure(base):.2f}"
                 for measure in (statistics.median, p90)]  # fmt: skip
            print(f"| {way} | {'yes' if stream else 'no'} | {' | '.join(cells)} |")


def crowd(ways: dict[str, str], key: str) -> None:
    """Many streams at once."""
    print(f"\n| {STREAMS} streams at once | errors | seconds |\n| --- | --- | --- |")

    async def one(way: str, asker: httpx2.AsyncClient, number: int) -> bool:
        body = request(-number - 1_000, way, stream=True)
        answer = await asker.post("/v1/chat/completions", json=body)
        return answer.status_code == 200 and answer.content.endswith(b"data: [DONE]\n\n")

    async def all_of_them(way: str) -> list[bool]:
        async with client(httpx2.AsyncClient, ways[way], key) as asker:
            return await asyncio.gather(*(one(way, asker, number) for number in range(STREAMS)))

    for way in ways:
        begun = time.perf_counter()
        good = asyncio.run(all_of_them(way))
        print(f"| {way} | {good.count(False)} | {time.perf_counter() - begun:.2f} |")


def request(number: int, way: str, stream: bool) -> dict[str, object]:
    """A chat completion that is like no other."""
    text = f"{way} {number}: {PROMPT}"
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": stream}


def client(kind: Callable[..., T], url: str, key: str) -> T:
    """A client with as many connections as it needs."""
    return kind(
        base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60,
        limits=httpx2.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS),
    )  # fmt: skip


def serve(url: str, store: Path) -> None:
    """The gateway, as a run has it, until its input ends."""
    prices = {MODEL: Price(input=1, output=2)}
    provider = Provider(name="scripted", base_url=f"{url}/v1", prices=prices)
    route = Route(provider=provider, model=MODEL)
    with (
        ModelGateway(store=store, routes={Role.TARGET: route}, concurrency=STREAMS) as gateway,
        gateway.lease(Role.TARGET, "g000-c0/target") as lease,
    ):
        one = lease.endpoint
        print(json.dumps({"socket": str(one.socket), "port": one.port, "key": one.key}), flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[str]:
    """A process, and the first line that it printed."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.stdin.close()
            os.killpg(process.pid, signal.SIGTERM)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def p90(values: list[float]) -> float:
    """The 90th percentile."""
    return statistics.quantiles(values, n=10)[-1]


if __name__ == "__main__":
    main()
