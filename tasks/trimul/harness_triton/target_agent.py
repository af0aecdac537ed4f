"""Entry of the harness: writes kernel.py, with the settings of harness.yaml, as submission.py.

Then calls it once on an example, so that a mistake is found here and not by the verifier.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PLACE = "SETTINGS: dict[str, Any] = {}\n"


def main() -> None:
    """Read the two folders of the contract, write the submission and a short record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    settings = yaml.safe_load((HERE / "harness.yaml").read_text(encoding="utf-8"))
    path = args.working_dir / "submission.py"
    path.write_text(rendered(settings), encoding="utf-8")
    worst = tried(path, args.dataset_dir)
    record = [{"role": "tool", "content": f"largest error on an example: {worst:.4g}"}]
    text = json.dumps(record, indent=1)
    (args.working_dir / "agent_execution.json").write_text(text, encoding="utf-8")


def rendered(settings: dict[str, Any]) -> str:
    """The text of submission.py."""
    text = (HERE / "kernel.py").read_text(encoding="utf-8")
    if text.count(PLACE) != 1:
        raise ValueError(f"kernel.py must hold this line once: {PLACE.strip()}")
    return text.replace(PLACE, PLACE.replace("{}", repr(settings)))


def tried(path: Path, dataset: Path) -> float:
    """The largest error of a submission on a small public example."""
    import numpy as np
    import torch

    inputs, reference = load(dataset / "inputs.py"), load(dataset / "reference.py")
    cases = json.loads((dataset / "cases.json").read_text(encoding="utf-8"))
    case = min(cases["cpu"], key=lambda case: case["n"])
    arrays = inputs.views(case, bytearray(inputs.n_bytes(case)))
    inputs.fill(case, arrays, np.random.default_rng(0))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x, mask = tensors.pop("x"), tensors.pop("mask")
    data = (x, mask, tensors, {"dim": case["dim"], "hidden_dim": inputs.HIDDEN})
    found, expected = load(path).custom_kernel(data), reference.reference(data)
    return float((found - expected).abs().max())


def load(path: Path) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
