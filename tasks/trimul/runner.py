"""Runs inside the sandbox: loads submission.py and calls it when it is told to.

`job.json` beside it: {"fd": socket, "interpret": bool, "device": "cpu" or "cuda"}. One message is
one packet of JSON, with a descriptor where memory is shared. Nothing that is sent from here is
believed; the other side measures.

    case   + memory for the output     -> ok      shapes of what follows; maps the memory
    go     + memory with new inputs    -> done    on the CPU: nobody knew them before this message
    load   + memory with inputs        -> ok      on a GPU: copies them to the card
    run    with a seed                 -> done    on a GPU: scales the inputs by the seed, calls
    digest with a seed                 -> digest  on a GPU: weighted sum of the whole output
    fetch                              -> ok      on a GPU: copies the output to the shared memory
    build                              -> built   compiles the Triton kernels that are declared
"""

import importlib
import json
import math
import mmap
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAX_MESSAGE = 2**16
MAX_ERROR = 400  # characters
TARGETS = (80, 90)  # A100, H100


def main() -> None:
    """Serves until the other side closes the socket."""
    job = json.loads((HERE / "job.json").read_text(encoding="utf-8"))
    # Threads that wait must not spin: on a busy machine that costs more than the work itself. Read
    # once, when PyTorch loads its OpenMP runtime.
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", OMP_DYNAMIC="FALSE")
    if job["interpret"]:
        os.environ["TRITON_INTERPRET"] = "1"
    peer = socket.socket(fileno=job["fd"])
    try:
        server = Server(job["device"], interpret=job["interpret"])
        answer: dict[str, Any] = {"ready": True, **server.facts()}
    except BaseException:
        answer = _error()
    while True:
        peer.send(json.dumps(answer).encode())
        message, fds, _, _ = socket.recv_fds(peer, MAX_MESSAGE, 1)
        if not message:
            return
        try:
            answer = server.answer(json.loads(message), fds[0] if fds else -1)
        except BaseException:
            answer = _error()


class Server:
    """The submission with the memory of the present case."""

    def __init__(self, device: str, *, interpret: bool) -> None:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self._torch, self._device = torch, torch.device(device)
        self._inputs = importlib.import_module("inputs")
        if interpret:
            _refuse_bf16_dot()
        self._submission = importlib.import_module("submission")
        if not callable(getattr(self._submission, "custom_kernel", None)):
            raise TypeError("submission.py defines no function custom_kernel(data)")
        self._case: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        """What the other side wants to know of a submission that could be loaded."""
        card = self._torch.cuda.get_device_name() if self._device.type == "cuda" else ""
        return {"triton": bool(getattr(self._submission, "TRITON", False)), "card": card}

    def answer(self, message: dict[str, Any], fd: int) -> dict[str, Any]:
        """Does what a message asks for."""
        op = message["op"]
        if op == "case":
            self._case = message["case"]
            shape = self._inputs.shapes(self._case)["x"]
            self._out = self._tensor(_map(fd, 4 * math.prod(shape)), shape)
            self._result = self._out
            return {"ok": True}
        if op == "go":
            block = _map(fd, self._inputs.n_bytes(self._case))
            self._copy_out(self._kernel(message)(self._data(self._tensors(block))))
            return {"done": message["number"]}
        if op == "load":
            block = _map(fd, self._inputs.n_bytes(self._case))
            tensors = self._tensors(block)
            self._base = {name: tensor.to(self._device) for name, tensor in tensors.items()}
            self._synchronise()
            return {"ok": True}
        if op == "run":
            data = self._data(self._fresh(message["seed"]))
            self._result = self._kernel(message)(data)
            self._synchronise()
            return {"done": message["number"]}
        if op == "digest":
            return {"digest": self._digest(message["seed"])}
        if op == "fetch":
            self._copy_out(self._result)
            return {"ok": True}
        if op == "build":
            return {"built": _build(self._submission)}
        raise ValueError(f"unknown message {op!r}")

    def _kernel(self, message: dict[str, Any]) -> Any:
        return getattr(self._submission, message["kernel"])

    def _tensors(self, block: Any) -> dict[str, Any]:
        views = self._inputs.views(self._case, block)
        return {name: self._torch.from_numpy(array) for name, array in views.items()}

    def _data(self, tensors: dict[str, Any]) -> tuple[Any, ...]:
        weights = {name: value for name, value in tensors.items() if name not in ("x", "mask")}
        config = {"dim": self._case["dim"], "hidden_dim": self._inputs.HIDDEN}
        return tensors["x"], tensors["mask"], weights, config

    def _copy_out(self, result: Any) -> None:
        if result.shape != self._out.shape:
            raise ValueError(f"the shape is {tuple(result.shape)}, not {tuple(self._out.shape)}")
        self._out.copy_(result)

    def _fresh(self, seed: int) -> dict[str, Any]:
        """The loaded inputs with channels and weights scaled by factors that nobody knew before."""
        random = self._torch.Generator(self._device).manual_seed(seed)
        found = dict(self._base)
        for name, tensor in self._base.items():
            if name != "mask":
                size = (tensor.shape[-1],)
                factor = self._torch.rand(size, generator=random, device=self._device)
                found[name] = tensor * (factor + 0.5)
        return found

    def _digest(self, seed: int) -> float:
        """Sum over the whole output, each axis weighted by numbers that were unknown until now."""
        weights = self._inputs.digest_weights(self._result.shape, seed)
        rows, columns, channels = (self._torch.from_numpy(axis) for axis in weights)
        by_pair = self._result @ channels.to(self._device)
        by_row = (by_pair.double() @ columns.double().to(self._device)).flatten()
        return float(by_row @ rows.double().flatten().to(self._device))

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def _tensor(self, block: Any, shape: tuple[int, ...]) -> Any:
        return self._torch.frombuffer(block, dtype=self._torch.float32).reshape(shape)


def _refuse_bf16_dot() -> None:
    """Makes Triton's interpreter say what it does wrong silently: it keeps bf16 as integers."""
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def checked(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if "bf16" in (str(a.dtype.scalar), str(b.dtype.scalar)):
            raise TypeError("tl.dot of bf16 is wrong in the interpreter: use fp16 or fp32 there")
        return dot(self, a, b, *args)

    InterpreterBuilder.create_dot = checked


def _build(submission: Any) -> dict[str, int]:
    """How many of the declared kernels compile for each target, and their largest shared memory.

    `submission.triton_builds()` lists (kernel, signature, constexprs, options) of the kernels.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    builds = submission.triton_builds()
    found = {"kernels": len(builds), "shared_bytes": 0}
    for arch in TARGETS:
        found[f"sm_{arch}"] = 0
        for kernel, signature, constants, options in builds:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            target = GPUTarget("cuda", arch, 32)
            compiled = triton.compile(source, target=target, options=options)
            found[f"sm_{arch}"] += 1
            found["shared_bytes"] = max(found["shared_bytes"], compiled.metadata.shared)
    return found


def _map(fd: int, size: int) -> mmap.mmap:
    """Shared memory with all its pages present; the mapping outlives the descriptor."""
    try:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


def _error() -> dict[str, str]:
    kind, error, trace = sys.exc_info()
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return {"error": f"{kind.__name__}: {error}"[:MAX_ERROR]} if kind else {"error": ""}
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if not frame.filename.endswith("runner.py")]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    name = kind.__name__ if kind else "Error"
    return {"error": f"{name}: {error}"[:MAX_ERROR] + place}


if __name__ == "__main__":
    main()
