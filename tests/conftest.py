import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from sia.config import register
from sia.tasks import Task, data, load_task

ROOT = Path(__file__).resolve().parents[1]

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true", DVC_NO_ANALYTICS="1", HF_HUB_OFFLINE="1", DO_NOT_TRACK="true"
)


@pytest.fixture
def composed() -> Iterator[Callable[[Sequence[str]], DictConfig]]:
    """Composes the configuration for given overrides."""
    register()
    with initialize_config_module("sia.conf", version_base="1.3"):
        yield lambda overrides: compose("config", overrides=list(overrides))


@pytest.fixture
def toy(tmp_path: Path) -> Task:
    """The bundled toy task in a folder of its own, with its data."""
    root = tmp_path / "tasks" / "toy"
    shutil.copytree(ROOT / "tasks" / "toy", root, ignore=shutil.ignore_patterns("data"))
    task = load_task(root)
    data.split(task, seed=0)
    return task
