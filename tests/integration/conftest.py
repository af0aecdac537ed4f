import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, to be copied: making one takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    command = [sys.executable, "-m", "sia.tracking", "init", "--uri", f"sqlite:///{path}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return path
