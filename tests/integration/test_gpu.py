"""Updates on a GPU, against the same updates on the CPU. Skipped where there is none."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "lightning", "peft", "transformers"):
    pytest.importorskip(package, reason="the extra `train` is not installed")

import torch  # noqa: E402

from sia.weights.causal_lm import CausalLM  # noqa: E402
from sia.weights.recipes import RECIPES  # noqa: E402
from sia.weights.tiny import make_base  # noqa: E402
from sia.weights.update import Record, parse_job, update  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")

TRAIN = """
import os, pathlib, signal
HERE = pathlib.Path(__file__)
asked = 0

def items(public):
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    return [
        {"id": f"{a}-{b}", "prompt": f"{a} or {b}?", "reference": str(max(a, b))} for a, b in pairs
    ]

def reward(item, answer):
    global asked
    asked += 1
    mark = HERE.with_name("kills")
    if mark.exists() and asked > int(mark.read_text()):
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(answer == item["reference"]) + sum(c.isdigit() for c in answer) / 8
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture
def job(base: Path, tmp_path: Path) -> Any:
    """A job, `out` naming its adapter; `policy` changes that."""
    (tmp_path / "train.py").write_text(TRAIN)

    def make(out: str, device: str = "cuda", **changes: Any) -> dict[str, Any]:
        policy = {"kind": "causal_lm", "base": str(base), "max_answer_tokens": 6}
        groups = {} if changes["recipe"]["name"] == "sft" else {"items": 4, "group": 4}
        return {
            "task": str(tmp_path / "train.py"), "public": str(tmp_path), "seed": 3,
            "device": device, "out": str(tmp_path / out),
            "policy": policy | changes.get("policy", {}),
            "recipe": {"rank": 4, "warmup": 0, "lr": 3e-3, **groups, **changes["recipe"]},
            "limits": {"probe_items": 8, "checkpoint_steps": 1},
        }  # fmt: skip

    return make


def run(data: dict[str, Any]) -> Record:
    return update(parse_job(data))


def test_steps_on_a_gpu_are_those_on_the_cpu(job: Any) -> None:
    """Supervised, so that nothing is drawn on a device: the same in float32, nearly in bfloat16."""
    recipe, whole = {"name": "sft", "steps": 5, "batch": 30}, {"precision": "float32"}
    cpu = run(job("cpu", "cpu", recipe=recipe, policy=whole))
    gpu = run(job("gpu", recipe=recipe, policy=whole))
    half = run(job("half", recipe=recipe))
    assert gpu.base_sha256 == half.base_sha256 == cpu.base_sha256
    for ours, theirs, rounded in zip(gpu.curve, cpu.curve, half.curve, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient"] == pytest.approx(theirs["gradient"], rel=1e-3)
        assert rounded["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    assert (gpu.report.device, cpu.report.device) == ("cuda", "cpu")
    assert 0 < gpu.report.peak_memory_mib < 1024


@pytest.mark.parametrize("name", RECIPES)
def test_an_adapter_that_a_gpu_made_answers_on_the_cpu(
    job: Any, base: Path, tmp_path: Path, name: str
) -> None:
    report = run(job("child", recipe={"name": name, "steps": 4})).report
    assert report.steps == 4
    assert report.reward_after is not None
    policy = CausalLM(base=str(base), max_answer_tokens=6)
    policy.load_adapter(tmp_path / "child")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in policy.parameters())
    assert len(policy.sample(["1 or 2?"], group=2, temperature=1.0, seed=0).answers) == 2


def test_an_update_on_a_gpu_teaches(job: Any) -> None:
    recipe = {"name": "sft", "steps": 150, "batch": 30, "lr": 1e-2}
    report = run(job("child", recipe=recipe)).report
    assert report.reward_before is not None
    assert report.reward_after is not None
    assert report.reward_after > report.reward_before + 0.4


def test_an_update_that_was_killed_goes_on_on_the_gpu(job: Any, tmp_path: Path) -> None:
    data = job("child", recipe={"name": "grpo", "steps": 8}, policy={"precision": "float32"})
    (tmp_path / "job.json").write_text(json.dumps(data))
    (tmp_path / "kills").write_text(str(8 + 4 * 16 + 5))  # in the fifth round
    command = [sys.executable, "-m", "sia.weights", str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = [path.name for path in (tmp_path / ".child.update").glob("*.ckpt")]
    assert kept == ["step=4.ckpt"]
    resumed = run(data)
    unbroken = run({**data, "out": str(tmp_path / "unbroken")})
    assert len(resumed.curve) == 8
    for ours, theirs in zip(resumed.curve, unbroken.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_recorded_passes_give_what_new_ones_give(base: Path) -> None:
    """Also when answers leave the batch, prompts are padded, and a group is one answer."""
    policy = CausalLM(base=str(base), max_answer_tokens=200, device="cuda", precision="float32")
    for group in (1, 60):
        asked = {"group": group, "temperature": 1.0, "seed": 2}
        recorded = policy.sample(["1 or 2?", "who"], **asked)
        capture, policy.capture = policy.capture, None
        anew = policy.sample(["1 or 2?", "who"], **asked)
        policy.capture = capture
        assert recorded.answers == anew.answers
        assert torch.allclose(recorded.logprobs_BT, anew.logprobs_BT, atol=1e-4)
