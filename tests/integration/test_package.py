"""What is installed: the wheel is complete, and starting is cheap."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("hydra", "omegaconf", "mlflow", "optuna", "numpy", "sklearn", "torch", "dvc", "pandas")


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(done.stdout.split()) & set(HEAVY)


def test_importing_sia_loads_nothing_heavy() -> None:
    assert loaded_by("import sia") == set()


def test_help_does_not_even_load_hydra() -> None:
    assert loaded_by("from sia import cli; sys.argv[1:] = ['--help']; cli.main()") == set()


def test_a_run_never_loads_mlflow_and_loads_optuna_only_when_it_proposes() -> None:
    assert loaded_by("import sia.session, sia.tracking, sia.meta.optuna") == {
        "hydra",
        "omegaconf",
        "numpy",
    }


def test_the_wheel_holds_every_package_and_every_option(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", str(tmp_path), str(ROOT),
        ],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    code = {
        f"sia/{p.relative_to(ROOT / 'src' / 'sia')}" for p in (ROOT / "src" / "sia").rglob("*.py")
    }
    options = {f"sia/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")}
    template = {f"sia/tasks/llm_harness/{name}.yaml" for name in ("harness", "space")}
    pages = ROOT / "src" / "sia" / "pages"
    shown = {
        path.relative_to(ROOT / "src").as_posix()
        for folder in ("assets", "templates")
        for path in (pages / folder).rglob("*")
        if path.is_file()
    }
    assert (code | options | template | shown | {"sia/py.typed"}) - held == set()

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r});"
         "import sia; assert sia.__file__.startswith(sys.path[0]), sia.__file__;"
         "from sia.cli import main; sys.argv[1:] = ['--cfg', 'job', 'debug=fast']; main()"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "name: toy" in done.stdout
