"""Every option of every group composes, validates and builds."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sia import advice, build, help
from sia.config import SCHEMAS
from sia.errors import ConfigError, SiaError

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = (
    "task", "meta", "provider", "target", "weights", "search", "feedback", "sandbox", "tracking",
    "experiment", "debug", "sweep",
)  # fmt: skip
# What an option cannot do without, and where it cannot be built on every machine.
NEEDS = {
    "meta=replay": ["meta.run=RECORDED"],
    "experiment=meta_comparison": ["meta.run=RECORDED"],
    "target=hf": ["target.model=x"],
    "target=llm": ["target.model=x", "provider=ollama"],
    "target=smollm2": ["task=gpqa"],
    "task=folder": ["task.dir=tasks/toy"],
    "task=harbor": ["task.dir=RECORDED/harbor", "task.cache=RECORDED/cache"],
    "task=external": ["task.dir=RECORDED/upstream", "task.cache=RECORDED/cache"],
}
MACHINE = {"sandbox=docker", "sandbox=bwrap"}


def options() -> Iterator[str]:
    for group in GROUPS:
        for file in sorted((CONF / group).glob("*.yaml")):
            yield f"{group}={file.stem}"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A folder with a recorded run, and with tasks in the upstream form and in Harbor's."""
    (tmp_path / "journal.jsonl").write_text("")
    for name in (
        "data/public/task.md", "data/public/evaluate.py", "data/private/truth.csv",
        "reference/reference_target_agent.py",
    ):  # fmt: skip
        (tmp_path / "upstream" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "upstream" / name).write_text("")
    for name in ("task.toml", "instruction.md", "tests/test.sh"):
        (tmp_path / "harbor" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "harbor" / name).write_text("")
    return tmp_path


@pytest.mark.parametrize("option", list(options()))
def test_every_option_composes_validates_and_builds(
    option: str, composed: Callable, recorded: Path
) -> None:
    needs = [text.replace("RECORDED", str(recorded)) for text in NEEDS.get(option, [])]
    cfg = composed([option, *needs])
    assert not OmegaConf.missing_keys(cfg)
    try:
        checked = build.check(cfg)
    except SiaError:
        assert option in MACHINE
        return
    assert checked.task.name == cfg.task.name
    assert build.limits(cfg, checked.task).generations >= 1


@pytest.mark.parametrize("option", list(options()))
def test_every_option_says_in_a_comment_what_it_is(option: str) -> None:
    group, name = option.split("=")
    text = (CONF / group / f"{name}.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert comments[-1] if comments else False, f"conf/{group}/{name}.yaml opens without a comment"
    assert f"{name:22} {comments[-1].lstrip('# ')}" in help.text() or "@package" in comments[0]
    assert len(text.splitlines()) <= 40


def test_the_defaults_are_what_the_readme_says(composed: Callable) -> None:
    cfg = composed([])
    assert cfg.task.name == "lawbench"
    assert cfg.meta._target_ == "sia.meta.optuna.OptunaBackend"
    assert cfg.target.harness == "reference"
    assert cfg.weights.name == "none"
    assert (cfg.search._target_, cfg.search.candidates) == ("sia.search.KeepBest", 1)
    assert cfg.sandbox._target_ == "sia.sandbox.auto.auto"


def test_every_group_is_documented_in_the_help() -> None:
    primary = yaml.safe_load((CONF / "config.yaml").read_text())
    groups = {g for entry in primary["defaults"] if isinstance(entry, dict) for g in entry}
    assert set(GROUPS) <= groups
    for group in GROUPS:
        assert f"\n  {group}\n" in help.text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["task=lawbnech"], "Did you mean 'lawbench'? Options: "),
        (["generatons=3"], "There is no key 'generatons'. Did you mean 'generations'?"),
        (["search.candidate=3"], "Did you mean 'search.candidates'?"),
        (["candidates=3"], "Did you mean 'search.candidates'?"),
        (["weights=auto", "weights.recipes.sft.lr=1"], "To add it: '+weights.recipes.sft.lr=1'"),
        (["task=folder", "task.dir=x", "sead=3"], "There is no key 'sead'. Did you mean 'seed'?"),
        (["sandbox.limits.memory_mb=3"], "Did you mean 'sandbox.limits.memory_mib'?"),
        (["tsk=toy"], "There is no key 'tsk'. Did you mean 'task'?"),
        (["debug=fst"], "Did you mean 'fast'?"),
        (["seed=abc"], "seed=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (["foo"], "'foo' is not key=value"),
        (["--cfg", "job", "generatons=3"], "There is no key 'generatons'."),
        (["-m", "task=toy,lawbnech"], "task='lawbnech' is not an option of task."),
    ],
)
def test_a_typo_names_the_nearest_right_one(argv: list[str], message: str) -> None:
    assert message in advice.explain(argv, HydraException("?"))


def test_all_faults_of_a_command_line_are_named_together() -> None:
    found = advice.explain(["meta=optna", "generatons=2", "seed=x"], HydraException("?"))
    assert len(found.splitlines()) == 3


def test_options_of_a_users_own_folder_count(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("# My task\nname: mine\ndir: somewhere\n")
    found = advice.explain(["-cd", str(tmp_path), "task=mien"], HydraException("?"))
    assert "Did you mean 'mine'?" in found


def test_values_out_of_range_are_reported_together(composed: Callable) -> None:
    cfg = composed(["generations=0", "workers=0", "budget.wall_s=-1"])
    with pytest.raises(ConfigError) as error:
        build.check(cfg)
    assert str(error.value).count("\n") == 2


@pytest.mark.parametrize(
    ("search", "generations"),
    [("chain", 25), ("keep_best", 25), ("best_of_n", 7), ("archive", 13), ("puct", 13)],
)
def test_the_searches_are_compared_at_the_same_number_of_evaluations(
    search: str, generations: int, composed: Callable
) -> None:
    cfg = composed(["experiment=search_ablation", f"search={search}"])
    assert cfg.generations == generations
    assert 1 + (cfg.generations - 1) * cfg.search.get("candidates", 1) == 25


@pytest.mark.parametrize("option", ["folder", "external", "harbor"])
def test_a_task_that_is_a_folder_asks_for_it(option: str, composed: Callable) -> None:
    cfg = composed([f"task={option}"])
    with pytest.raises(OmegaConfBaseException) as error:  # as Hydra, for the run directory
        str(cfg.task.name)
    found = advice.explain([f"task={option}"], error.value)
    assert found == "task.dir has no value. Give it one: task.dir=..."


def test_a_target_outside_sia_is_not_built_unless_trusted(composed: Callable) -> None:
    cfg = composed(["meta._target_=os.system"])
    with pytest.raises(ConfigError, match=r"trusted_packages=\[os\]"):
        build.check(cfg)


@pytest.mark.parametrize("given", ["llmm", "agents", "agents/notes.txt", "agents/absent.py"])
def test_what_is_no_harness_is_named_with_those_that_exist(
    composed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    cfg = composed(["task=lawbench", f"target.harness={given}"])
    with pytest.raises(ConfigError, match=r"harness of task 'lawbench' \(reference, llm\)"):
        build.check(cfg)


def test_settings_of_a_target_are_those_of_its_first_harness(composed: Callable) -> None:
    given = "+target.settings={ask: direct, model: {concurrency: 3, extra: {top_k: 1}}}"
    cfg = composed(["task=gpqa", "target=llm", "target.model=x", "provider=ollama", given])
    checked = build.check(cfg)
    before = (checked.task.harnesses["llm"] / "harness.yaml").read_text()
    after = (checked.first_harness / "harness.yaml").read_text()
    assert before != after
    settings = yaml.safe_load(after)
    assert settings["ask"] == "direct"
    assert settings["model"].pop("concurrency") == 3
    assert settings["model"].pop("extra") == {"top_k": 1}
    known = yaml.safe_load(before)
    assert settings["model"].items() < known["model"].items()
    assert "# one call a question" in before.lower()
    assert "# one call a question" in after.lower()  # comments stay


@pytest.mark.parametrize("name", ["asks", "model.concurrent", "ask.mode"])
def test_a_setting_that_the_harness_does_not_have_is_named(composed: Callable, name: str) -> None:
    given = f"+target.settings.{name}=1"
    cfg = composed(["task=gpqa", "target=llm", "target.model=x", "provider=ollama", given])
    with pytest.raises(ConfigError, match=rf"(?s){name!r}.*'~target\.settings\.{name}'"):
        build.check(cfg)


@pytest.mark.parametrize("given", ["agents", "agents/other.py"])
def test_a_harness_may_be_a_folder_or_a_file_seen_from_here(
    composed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "agents").mkdir()
    for name in ("target_agent.py", "other.py"):
        (tmp_path / "agents" / name).write_text("pass\n")
    monkeypatch.chdir(tmp_path)
    checked = build.check(composed(["task=toy", f"target.harness={given}"]))
    assert checked.first_harness == tmp_path / given


@pytest.mark.parametrize(
    "schema",
    [schema for options in SCHEMAS.values() for schema in options.values()],
    ids=lambda schema: schema.__name__,
)
def test_a_default_is_the_same_in_the_schema_and_in_the_part(schema: type) -> None:
    """A part can be built by hand as well; it must then be the part that the CLI builds."""
    made = schema()
    module, _, name = made._target_.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    for field in dataclasses.fields(schema):
        default = getattr(parameters.get(field.name), "default", inspect.Parameter.empty)
        value = getattr(made, field.name)
        if default is not inspect.Parameter.empty and value != MISSING:
            assert value == default, f"{schema.__name__}.{field.name}"


@pytest.mark.parametrize("agent", ["claude", "openhands", "pydantic_ai"])
def test_an_agent_comes_with_a_provider_that_knows_the_price_of_its_model(
    agent: str, composed: Callable
) -> None:
    """Without one, budget.usd=... could not be kept."""
    cfg = composed([f"meta={agent}"])
    route = build._route(cfg.provider, cfg.meta.model)
    assert route.provider.price(route.provider.resolve(route.model)) is not None
    assert composed([f"meta={agent}", "provider=scripted"]).provider.name == "scripted"
