"""The verifier of `trimul` against submissions that cheat: refused, or nothing is gained.

Real processes in a real sandbox, on tiny cases. Bounds on speed are wide: what a trick could gain
is a factor of many, what noise does to such short calls is not.
"""

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from sia.sandbox import Bwrap, Sandbox
from sia.sandbox.auto import auto
from sia.tasks import load_task
from sia.tasks.data import task_module

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[train]'")

TASK = load_task(Path(__file__).resolve().parents[2] / "tasks" / "trimul")
CASES = [
    {"batch": 1, "n": 24, "dim": 128, "mask": "random", "values": "normal"},
    {"batch": 2, "n": 32, "dim": 128, "mask": "none", "values": "cauchy"},
]
REFERENCE = (TASK.root / "reference.py").read_text(encoding="utf-8")
HONEST = f"{REFERENCE}\ncustom_kernel = reference\n"
NO_GAIN = 1.6
# Reaches into the program that calls it.
INSIDE = """
import __main__, os, threading, time
server = lambda: __import__("gc") and next(
    o for o in __import__("gc").get_objects() if type(o).__name__ == "Server")
"""

REFUSED = {
    "returns the first answer for ever": """
first = []
def custom_kernel(data):
    first.append(reference(data)) if not first else None
    return first[0]
""",
    "remembers answers by shape and address": """
seen = {}
def custom_kernel(data):
    key = (data[0].shape, data[0].data_ptr())
    if key not in seen:
        seen[key] = reference(data)
    return seen[key]
""",
    "keeps packed weights of the last call": """
kept = {}
def custom_kernel(data):
    x, mask, weights, config = data
    kept.setdefault(x.shape, {name: value.clone() for name, value in weights.items()})
    return reference((x, mask, kept[x.shape], config))
""",
    "leaves the work to a thread and returns at once": """
import threading
def custom_kernel(data):
    out = torch.zeros_like(data[0])
    copies = tuple(part.clone() if hasattr(part, "clone") else part for part in data)
    threading.Thread(target=lambda: out.copy_(reference(copies))).start()
    return out
""",
    "says done first and fills the shared output later": INSIDE
    + """
def custom_kernel(data):
    held = server()._out
    __main__.Server._copy_out = lambda self, result: None
    def work():
        time.sleep(0.02)
        held.copy_(reference(data))
    threading.Thread(target=work).start()
    return held
""",
    "writes nothing at all": INSIDE
    + """
__main__.Server._copy_out = lambda self, result: None
def custom_kernel(data):
    return data[0]
""",
    "answers the next questions in advance": INSIDE
    + """
import json
def custom_kernel(data):
    fd = json.loads(open(os.path.dirname(__main__.__file__) + "/job.json").read())["fd"]
    for _ in range(4):
        os.write(fd, b'{"done": 1, "ok": true}')
    return reference(data)
""",
    "is right only in most places": """
def custom_kernel(data):
    out = reference(data)
    out[-1, -1, -1, -1] += 1
    return out
""",
    "gives numbers that are none": """
def custom_kernel(data):
    return reference(data) * float("nan")
""",
    "gives another shape": """
def custom_kernel(data):
    return reference(data)[:, :, :, :1]
""",
    "gives nothing": """
def custom_kernel(data):
    return None
""",
    "ends its process": """
import os
def custom_kernel(data):
    os._exit(0)
""",
    "hangs": """
def custom_kernel(data):
    while True:
        pass
""",
    "answers what is no JSON": INSIDE
    + """
import json
def custom_kernel(data):
    fd = json.loads(open(os.path.dirname(__main__.__file__) + "/job.json").read())["fd"]
    os.write(fd, b"\\xff" * 100)
    return reference(data)
""",
}
FRUITLESS = {
    "stops every clock and every comparison": """
import time
time.perf_counter = time.monotonic = time.time = time.process_time = lambda: 0.0
torch.allclose = torch.equal = lambda *a, **k: True
def custom_kernel(data):
    return reference(data)
""",
    "burns the processor while the reference runs": """
import os
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        while True:
            pass
def custom_kernel(data):
    return reference(data)
""",
    "has a thread that never rests": """
import threading
def spin():
    while True:
        sum(range(1000))
threading.Thread(target=spin, daemon=True).start()
def custom_kernel(data):
    return reference(data)
""",
    "takes more threads": """
torch.set_num_threads(2)
def custom_kernel(data):
    return reference(data)
""",
    "lets a child do the work": """
import os
def custom_kernel(data):
    out = torch.empty_like(data[0]).share_memory_()
    if (child := os.fork()) == 0:
        out.copy_(reference(data))
        os._exit(0)
    os.waitpid(child, 0)
    return out
""",
    "lets an orphan do the work": """
import os, time
def custom_kernel(data):
    out = torch.empty_like(data[0]).share_memory_()
    done = torch.zeros(1).share_memory_()
    if (child := os.fork()) == 0:
        if os.fork() == 0:
            out.copy_(reference(data))
            done[0] = 1
            os._exit(0)
        os._exit(0)
    os.waitpid(child, 0)
    while not done[0]:
        time.sleep(0.0005)
    time.sleep(0.002)
    return out
""",
    "sleeps while it is loaded": """
import time
time.sleep(2)
def custom_kernel(data):
    return reference(data)
""",
    "spoils its inputs": """
def custom_kernel(data):
    out = reference(data)
    for part in (data[0], data[1], *data[2].values()):
        part.zero_()
    return out
""",
}


@pytest.fixture(scope="module")
def verifier() -> ModuleType:
    return task_module(TASK, "verify")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    found = auto()
    found.check()
    return found


@pytest.fixture
def arena(verifier: ModuleType, sandbox: Sandbox) -> Any:
    return verifier.arena.Arena(
        guests=verifier.guests, inputs=verifier.inputs, sandbox=sandbox,
        rng=np.random.default_rng(3), first_call_s=20.0,
    )  # fmt: skip


def submit(folder: Path, text: str) -> Path:
    path = folder / "submission.py"
    path.write_text(text, encoding="utf-8")
    return path


def fought(verifier: ModuleType, arena: Any, path: Path, rounds: int = 4) -> dict[str, Any]:
    timed, facts = arena.time_on_cpu(path, CASES, rounds=rounds, budget_s=60)
    found: dict[str, Any] = verifier.result(timed, [], facts, ([], ""))
    return found


@pytest.mark.parametrize("trick", REFUSED)
def test_a_submission_that_cheats_scores_nothing(
    verifier: ModuleType, arena: Any, tmp_path: Path, trick: str
) -> None:
    if trick == "hangs":
        arena = arena.__class__(
            guests=verifier.guests, inputs=verifier.inputs, sandbox=auto(),
            rng=np.random.default_rng(3), first_call_s=3.0,
        )  # fmt: skip
    found = fought(verifier, arena, submit(tmp_path, HONEST + REFUSED[trick]), rounds=2)
    assert found["score"] == 0
    assert found["breakdown"]["wrong"]


@pytest.mark.parametrize("trick", FRUITLESS)
def test_a_trick_gains_nothing(
    verifier: ModuleType, arena: Any, sandbox: Sandbox, tmp_path: Path, trick: str
) -> None:
    if trick.startswith("burns") and not isinstance(sandbox, Bwrap):
        pytest.skip("processes that leave their group are found in a namespace only: needs bwrap")
    found = fought(verifier, arena, submit(tmp_path, HONEST + FRUITLESS[trick]))
    assert found["breakdown"]["wrong"] == {}
    assert 0 < found["score"] < NO_GAIN


def test_the_reference_against_itself_is_about_one(
    verifier: ModuleType, arena: Any, tmp_path: Path
) -> None:
    found = fought(verifier, arena, submit(tmp_path, HONEST), rounds=6)
    assert 1 / NO_GAIN < found["score"] < NO_GAIN
    assert found["metrics"]["error_share"] == 0
    assert found["n_items"] == found["n_answered"] == len(CASES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere\n", "ModuleNotFoundError.*nowhere.*submission.py, line 1"),
        ("x = 1\n", "no function custom_kernel"),
        ("raise SystemExit(0)\n", "cannot be loaded: SystemExit"),
        ("import os\nos._exit(3)\n", "cannot be loaded: its process ended"),
    ],
)
def test_a_submission_that_cannot_be_loaded_is_refused_with_the_reason(
    arena: Any, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arena.time_on_cpu(submit(tmp_path, text), CASES, rounds=1, budget_s=60)


def test_a_submission_sees_neither_labels_nor_project_nor_network(
    verifier: ModuleType, arena: Any, sandbox: Sandbox, tmp_path: Path
) -> None:
    if not isinstance(sandbox, Bwrap):
        pytest.skip("only bwrap hides files: apt install bubblewrap")
    secret = tmp_path / "cases.json"
    secret.write_text("{}")
    spy = f"""
import os, socket
assert not os.path.exists({str(secret)!r})
assert not os.path.exists({str(TASK.root / "verify.py")!r})
assert os.listdir("/sia/data") == []
try:
    socket.create_connection(("127.0.0.1", 1), 1)
except ConnectionRefusedError:
    pass
assert len(os.listdir("/sys/class/net")) <= 1 if os.path.isdir("/sys/class/net") else True
"""
    found = fought(verifier, arena, submit(tmp_path, HONEST + spy), rounds=1)
    assert found["breakdown"]["wrong"] == {}


def test_nothing_of_a_guest_is_alive_after_it(
    verifier: ModuleType, sandbox: Sandbox, tmp_path: Path
) -> None:
    text = HONEST + FRUITLESS["burns the processor while the reference runs"]
    guest = verifier.guests.Guest(sandbox=sandbox, submission=submit(tmp_path, text))
    with guest:
        guest.ready()
        members = list(guest._members)
        assert len(members) >= 4
        before = guest.cpu_s()
        time.sleep(0.2)  # frozen: not a moment is used
        assert guest.cpu_s() == before > 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in members)


# --- a GPU's protocol, on the devices that are here

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here"),
    ),
]


def staged(arena: Any, path: Path, device: str) -> Any:
    timed, card = arena.time_on_gpu(path, CASES, rounds=2, device=device)
    assert bool(card) == (device == "cuda")
    return timed


@pytest.mark.parametrize("device", DEVICES)
def test_staged_calls_are_right_and_timed_beside_a_kernel_that_does_nothing(
    arena: Any, tmp_path: Path, device: str
) -> None:
    for timed in staged(arena, submit(tmp_path, HONEST), device):
        assert timed.problem == ""
        assert timed.error < 0.1
        assert len(timed.own_s) == len(timed.eager_s) == len(timed.null_s) == 2
        assert min(timed.own_s) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("trick", "problem"),
    [
        (REFUSED["returns the first answer for ever"], "values are wrong"),
        (
            # The sum over what is there at the answer is not the sum over what is fetched later.
            INSIDE
            + """
def custom_kernel(data):
    out = torch.zeros_like(data[0])
    def work():
        time.sleep(0.5)
        out.copy_(reference(data))
    threading.Thread(target=work).start()
    real = __main__.Server._copy_out
    def copy_out(self, result):
        time.sleep(2)
        real(self, result)
    __main__.Server._copy_out = copy_out
    return out
""",
            "changed after the answer",
        ),
    ],
)
def test_staged_calls_that_cheat_are_refused(
    arena: Any, tmp_path: Path, trick: str, problem: str, device: str
) -> None:
    problems = [timed.problem for timed in staged(arena, submit(tmp_path, HONEST + trick), device)]
    assert any(problem in text for text in problems)


# --- the whole of it


def test_verify_reads_a_plan_and_gives_what_the_contract_asks_for(
    verifier: ModuleType, tmp_path: Path
) -> None:
    plan = {
        "seed": 1, "rounds": 3, "budget_s": 60, "tolerance_share": 1.0, "cases": CASES,
        "triton": [], "gpu": [], "gpu_rounds": 1,
    }  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(plan))
    task_module(TASK, "controls").oracle(tmp_path, tmp_path)
    found = verifier.verify(tmp_path, tmp_path)
    assert found["score"] > 0
    assert 0 < found["metrics"]["error_share"] < 1
    assert found["n_items"] == len(found["items"]) == len(CASES)


# --- harnesses


def settings(name: str, **changes: Any) -> dict[str, Any]:
    text = (TASK.root / name / "harness.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    for path, value in changes.items():
        section, key = path.split("__")
        found[section][key] = value
    return found


def rendered(name: str, **changes: Any) -> str:
    text = (TASK.root / name / "kernel.py").read_text(encoding="utf-8")
    place = "SETTINGS: dict[str, Any] = {}\n"
    assert text.count(place) == 1
    return text.replace(place, f"SETTINGS = {settings(name, **changes)!r}\n")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projections__fused": True},
        {"layout__channels_first": True},
        {"layout__channels_first": True, "chunks__rows": 100, "mask__look_first": True},
        {"precision__triangle": "mixed", "precision__sides": "mixed"},
        {"layout__channels_first": True, "precision__sides": "bfloat16", "chunks__rows": 512},
        {"layout__channels_first": True, "precision__triangle": "bfloat16"},
        {"layout__channels_first": True, "precision__out_gate": "bfloat16"},
        {"layout__channels_first": True, "precision__output": "mixed"},
        {"layout__channels_first": True, "norm__folded": True, "chunks__rows": 256},
        {"precision__output": "bfloat16", "precision__out_gate": "mixed"},
    ],
)
def test_every_knob_of_the_harness_leads_to_a_right_kernel(
    verifier: ModuleType, tmp_path: Path, changes: dict[str, Any]
) -> None:
    import torch

    inputs = verifier.inputs
    scope: dict[str, Any] = {}
    exec(compile(HONEST, "reference", "exec"), scope)
    own: dict[str, Any] = {}
    exec(compile(rendered("harness", **changes), "submission", "exec"), own)
    for case in CASES:
        arrays = inputs.views(case, bytearray(inputs.n_bytes(case)))
        inputs.fill(case, arrays, np.random.default_rng(1))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        x, mask = tensors.pop("x"), tensors.pop("mask")
        data = (x, mask, tensors, {"dim": case["dim"], "hidden_dim": 128})
        found, expected = own["custom_kernel"](data).numpy(), scope["reference"](data).numpy()
        # Any single value may miss the tolerance in bfloat16; a wrong formula misses it everywhere.
        within = np.abs(found - expected) <= 0.02 + 0.02 * np.abs(expected)
        assert within.mean() > 0.999


@pytest.mark.parametrize("half", [True, False])
def test_triton_kernels_are_right_in_the_interpreter(
    verifier: ModuleType, arena: Any, tmp_path: Path, half: bool
) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install -e '.[train]'")
    path = submit(tmp_path, rendered("harness_triton", precision__half=half))
    cases = [
        {"batch": 2, "n": 12, "dim": 96, "mask": "random", "values": "cauchy"},
        {"batch": 1, "n": 32, "dim": 128, "mask": "none", "values": "normal"},
    ]
    for timed in arena.check_interpreted(path, cases):
        assert timed.problem == ""
        assert timed.error < (0.3 if half else 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_triton_kernels_are_right_on_all_public_cases_up_to_128(
    arena: Any, tmp_path: Path, number: int
) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install -e '.[train]'")
    task_module(TASK, "prepare").prepare(tmp_path, tmp_path / "u", tmp_path / "v", seed=1)
    case = json.loads((tmp_path / "u" / "cases.json").read_text())["triton"][number]
    path = submit(tmp_path, rendered("harness_triton"))
    assert [timed.problem for timed in arena.check_interpreted(path, [case])] == [""]


def test_triton_kernels_compile_without_a_gpu_and_a_failure_is_told(
    verifier: ModuleType, arena: Any, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install -e '.[train]'")
    path = submit(tmp_path, rendered("harness_triton", blocks__rows=32, blocks__tile=32))
    _, facts = arena.time_on_cpu(path, CASES[:1], rounds=1, budget_s=60)
    assert facts["built"] | {"shared_bytes": 0} == {
        "kernels": 3, "sm_80": 3, "sm_90": 3, "shared_bytes": 0,
    }  # fmt: skip
    broken = f"{HONEST}\nTRITON = True\n"
    _, facts = arena.time_on_cpu(submit(tmp_path, broken), CASES[:1], rounds=1, budget_s=60)
    assert "triton_builds" in facts["build_problem"]


def test_a_product_of_bfloat16_is_refused_by_the_interpreter(arena: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install -e '.[train]'")
    text = """
import triton, triton.language as tl
TRITON = True
@triton.jit
def product(a_ptr, b_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(a_ptr + at)
    tl.store(b_ptr + at, tl.dot(a.to(tl.bfloat16), a.to(tl.bfloat16)))
def custom_kernel(data):
    out = torch.empty_like(data[0])
    product[(1,)](data[0], out)
    return out
"""
    timed = arena.check_interpreted(submit(tmp_path, HONEST + text), CASES[:1])
    assert "bf16 is wrong in the interpreter" in timed[0].problem
