"""Data and artifacts in an S3-compatible store: DVC and MLflow against a real server."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("boto3")
pytest.importorskip("moto")

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of an empty store on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/moto-api/", timeout=5):
                break
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield address
        server.terminate()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store with three empty buckets, and the keys to it in the environment."""
    urllib.request.urlopen(
        urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=10
    ).close()
    for name, value in {**KEYS, "MLFLOW_S3_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    for bucket in ("sia-public", "sia-private", "sia-mlflow"):
        _client(endpoint, f"c.create_bucket(Bucket={bucket!r})")
    return endpoint


def _client(endpoint: str, code: str) -> str:
    """One call of boto3, in a process of its own: its clients leave sockets for the collector."""
    program = f"import boto3; c = boto3.client('s3', endpoint_url={endpoint!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def keys(endpoint: str, bucket: str) -> list[str]:
    code = f"print(*[o['Key'] for o in c.list_objects_v2(Bucket={bucket!r}).get('Contents', [])])"
    return _client(endpoint, code).split()


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=180,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_private_data_keep_to_their_own_store(store: str, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    run(repo, "dvc", "init", "--no-scm", "--quiet")
    for name in ("public", "private"):
        run(repo, "dvc", "remote", "add", name, f"s3://sia-{name}/data")
        run(repo, "dvc", "remote", "modify", name, "endpointurl", store)
    run(repo, "dvc", "remote", "default", "public")
    (repo / "dvc.yaml").write_text(
        "stages:\n"
        "  split:\n"
        "    cmd: echo items > public && echo labels > private\n"
        "    outs: [public, {private: {remote: private}}]\n"
    )
    run(repo, "dvc", "repro", "--quiet")
    run(repo, "dvc", "push", "--quiet")
    assert [len(keys(store, f"sia-{name}")) for name in ("public", "private")] == [1, 1]
    hashes = {name: keys(store, f"sia-{name}")[0] for name in ("public", "private")}
    assert hashes["public"] != hashes["private"]

    node = tmp_path / "node"  # a machine that may read the public store alone
    node.mkdir()
    for name in ("dvc.yaml", "dvc.lock"):
        (node / name).write_bytes((repo / name).read_bytes())
    (node / ".dvc").mkdir()
    (node / ".dvc" / "config").write_bytes((repo / ".dvc" / "config").read_bytes())
    run(node, "dvc", "config", "core.no_scm", "true")
    run(node, "dvc", "pull", "--quiet", "public")
    assert (node / "public").read_text() == "items\n"
    assert not (node / "private").exists()


def test_artifacts_of_a_run_go_to_the_store(store: str, tmp_path: Path) -> None:
    place = ["--uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts", "s3://sia-mlflow/artifacts"]
    run(
        tmp_path, "sia", "task=toy", "meta=scripted", "generations=1", "tracking=none",
        "sandbox=process", "hydra.run.dir=run",
    )  # fmt: skip
    run(tmp_path, "sia.tracking", "sync", "run", *place)
    stored = keys(store, "sia-mlflow")
    assert all(key.startswith("artifacts/sia-toy/") for key in stored)
    names = {key.rpartition("/")[2] for key in stored}
    assert {"config.yaml", "evaluation.json"} <= names
    assert not (tmp_path / "mlartifacts" / "sia-toy").exists()
