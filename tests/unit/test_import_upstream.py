"""Upstream's provider and profile files become options that Hydra composes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from sia import build
from sia.config import register
from sia.errors import ConfigError
from sia.import_upstream import convert, main

OPENAI_KIND = {
    "provider_id": "acme",
    "name": "Acme Models",
    "client_kind": "openai",
    "base_url": "https://models.acme.example/v1/",
    "api_key_env": "ACME_KEY",
    "litellm_prefix": "openai",
}
ANTHROPIC_KIND = {
    "provider_id": "vendor",
    "name": "The vendor",
    "client_kind": "anthropic",
    "base_url": None,
    "api_key_env": "VENDOR_KEY",
}
GOOGLE_KIND = {
    "provider_id": "g",
    "name": "G",
    "client_kind": "google",
    "api_key_env": "G_KEY",
}
META = {
    "profile_id": "writer",
    "name": "A writer",
    "agent_impl": "openhands",
    "model": "acme/large-2",
    "provider_id": "acme",
}
TARGET = {
    "profile_id": "answerer",
    "name": "An answerer",
    "model": "acme/small-2",
    "provider_id": "acme",
    "agent_reference": "default",
}
AGENT = "print('an agent')\n"


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., Path]:
    """Writes one JSON file; its stem is the id unless `stem` says otherwise."""

    def write(content: dict[str, Any], *, stem: str = "", **changes: Any) -> Path:
        data = {**content, **changes}
        data = {key: value for key, value in data.items() if value is not ...}
        name = stem or data.get("profile_id") or data["provider_id"]
        folder = tmp_path / "upstream"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(data))
        return path

    return write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "my_conf"


def composed(out: Path, *overrides: str) -> DictConfig:
    """What `python -m sia -cd OUT ...` composes."""
    register()
    with initialize_config_module("sia.conf", version_base="1.3"):
        search = f"hydra.searchpath=[file://{out.resolve()}]"
        return compose("config", overrides=[search, *overrides])


def option(out: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((out / f"{name}.yaml").read_text())


def test_profiles_compose_into_a_run_with_their_providers(given, out: Path) -> None:
    files = [given(OPENAI_KIND), given(ANTHROPIC_KIND)]
    files += [given(META, agent_impl="claude", provider_id="vendor", model="m-20260101")]
    files += [given(TARGET)]
    said = convert(files, out)
    cfg = composed(out, "meta=writer", "target=answerer")
    assert cfg.meta._target_ == "sia.meta.agents.Claude"
    assert cfg.meta.model == "m-20260101"
    assert cfg.provider.name == "vendor"
    assert cfg.provider.api_key_env == "VENDOR_KEY"
    assert cfg.target.harness == "reference"
    assert cfg.target.model == "acme/small-2"
    assert cfg.target.provider.name == "acme"
    assert cfg.target.provider.base_url == "https://models.acme.example/v1"
    assert said[-1] == f"use: python -m sia -cd {out} meta=writer target=answerer"
    assert f"wrote {out}/provider/acme.yaml" in said
    assert (out / "meta/writer.yaml").read_text().startswith("# A writer\n")


@pytest.mark.parametrize(
    ("impl", "part"),
    [("openhands", "sia.meta.agents.OpenHands"), ("pydantic-ai", "sia.meta.agents.PydanticAI")],
)
def test_every_kind_of_agent_has_its_option(given, out: Path, impl: str, part: str) -> None:
    convert([given(OPENAI_KIND), given(META, agent_impl=impl)], out)
    assert composed(out, "meta=writer").meta._target_ == part


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            OPENAI_KIND,
            {"base_url": "https://models.acme.example/v1", "formats": ["chat", "embeddings"]},
        ),
        (
            OPENAI_KIND | {"base_url": None},
            {
                "base_url": "https://api.openai.com/v1",
                "formats": ["chat", "embeddings", "responses"],
            },
        ),
        (
            ANTHROPIC_KIND,
            {
                "base_url": "https://api.anthropic.com/v1",
                "anthropic_url": "https://api.anthropic.com",
                "formats": ["messages", "chat"],
            },
        ),
        (
            ANTHROPIC_KIND | {"base_url": "https://proxy.example/anthropic/v1"},
            {"anthropic_url": "https://proxy.example/anthropic", "formats": ["messages"]},
        ),
        (
            GOOGLE_KIND,
            {
                "base_url": "https://generativelanguage.googleapis.com/v1beta/openai",
                "formats": ["chat", "embeddings"],
            },
        ),
    ],
)
def test_a_client_kind_decides_addresses_and_formats(
    given, out: Path, content: dict[str, Any], expected: dict[str, Any]
) -> None:
    convert([given(content)], out)
    found = option(out, f"provider/{content['provider_id']}")
    assert found.pop("name") == content["provider_id"]
    assert found.pop("api_key_env") == content["api_key_env"]
    assert found == expected
    provider = composed(out, f"provider={content['provider_id']}").provider
    assert provider.formats == expected["formats"]


def test_the_routing_prefix_of_gemini_is_no_part_of_the_model(given, out: Path) -> None:
    profile = given(META, provider_id="g", model="gemini/gemini-9-pro")
    convert([given(GOOGLE_KIND), profile], out)
    assert option(out, "meta/writer")["model"] == "gemini-9-pro"


def test_a_provider_may_be_named_by_the_path_of_its_file(
    given, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given(OPENAI_KIND)
    monkeypatch.chdir(tmp_path)
    convert([given(META, provider_id="upstream/acme.json")], out)
    assert composed(out, "meta=writer").provider.name == "acme"


def test_a_provider_that_was_imported_before_is_found(given, out: Path) -> None:
    convert([given(OPENAI_KIND)], out)
    convert([given(META)], out)
    assert composed(out, "meta=writer").provider.name == "acme"


def test_a_file_reference_becomes_a_harness_with_its_requirements(given, out: Path) -> None:
    profile = given(TARGET, agent_reference={"source": "agents/mine.py"})
    agents = profile.parent / "agents"
    agents.mkdir()
    (agents / "mine.py").write_text(AGENT)
    (agents / "other.py").write_text("")
    (agents / "requirements.txt").write_text("numpy==2.1\n")
    convert([given(OPENAI_KIND), profile], out)
    cfg = composed(out, "target=answerer", "task=toy", "sandbox=process")
    harness = Path(cfg.target.harness)
    assert harness.is_absolute()
    assert {path.name: path.read_text() for path in harness.iterdir()} == {
        "target_agent.py": AGENT,
        "requirements.txt": "numpy==2.1\n",
    }
    assert build.check(cfg).first_harness == harness


@pytest.mark.parametrize("importer", ["", "import x\n"])
def test_a_folder_reference_is_copied_and_its_entry_point_renamed(
    given, out: Path, importer: str
) -> None:
    reference = {"source": "agent", "entrypoint": "x.py"}
    profile = given(TARGET, agent_reference=reference)
    folder = profile.parent / "agent"
    (folder / "prompts").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "x.py").write_text(AGENT)
    (folder / "helper.py").write_text(importer)
    (folder / "prompts/one.txt").write_text("one")
    convert([given(OPENAI_KIND), profile], out)
    harness = out / "harness/answerer"
    assert (harness / "target_agent.py").read_text() == AGENT
    assert (harness / "prompts/one.txt").read_text() == "one"
    # A module that others import keeps its own name as well.
    assert (harness / "x.py").exists() == bool(importer)
    assert not (harness / ".git").exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".git",
        "helper.py",
        "prompts",
        "x.py",
    ]


def test_all_faults_of_all_files_come_in_one_message_and_nothing_is_written(
    given, out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    files = [
        given(OPENAI_KIND, api_key_env="sk-123", client_kind="azure"),
        given(OPENAI_KIND, stem="b", provider_id="b", base_url="models.example", name=3),
        given(OPENAI_KIND, stem="no", provider_id="no option"),
        given(META, modeel="x", model=...),
        given(META, stem="m2", profile_id="m2", agent_impl="codex"),
        given(TARGET, agent_reference={"sauce": "x"}),
        given(
            TARGET,
            stem="t2",
            profile_id="t2",
            provider_id="other",
            agent_reference={"source": "nowhere"},
        ),
        given(TARGET, stem="t3", profile_id="null"),
        tmp_path / "broken.json",
        tmp_path / "list.json",
        tmp_path / "missing.json",
        tmp_path,
    ]
    assert main([*map(str, files), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    for fault in (
        "api_key_env must be the name of an environment variable, not a key.",
        "client_kind='azure' is none of anthropic, openai, google.",
        "base_url='models.example' is not an http or https address.",
        "name must be a text of one line, not 3.",
        "provider_id='no option' cannot name an option",
        "unknown key 'modeel'. Did you mean 'model'?",
        "model is missing.",
        "agent_impl='codex' is none of claude, openhands, pydantic-ai.",
        "agent_reference={'sauce': 'x'} must be",
        "provider_id='other' is no provider",
        "nowhere' does not exist.",
        "profile_id='null' cannot name an option",
        "broken.json is not JSON",
        "list.json is neither a provider nor a profile",
        "missing.json cannot be read: No such file or directory.",
        f"{tmp_path} is a folder. Name its files: {tmp_path}/*.json",
    ):
        assert fault in said
    assert "sk-123" not in said
    assert "'acme' is no provider" not in said  # its file is there, and has faults of its own
    assert not out.exists()


@pytest.mark.parametrize(
    ("reference", "files", "fault"),
    [
        ({"source": "nowhere"}, {}, "does not exist"),
        ({"source": "agent"}, {"x.py": ""}, "needs a file 'reference_target_agent.py' directly in"),
        (
            {"source": "agent", "entrypoint": "x.py"},
            {"x.py": "", "target_agent.py": ""},
            "has a target_agent.py besides its entrypoint 'x.py'",
        ),
        ({"source": "agent/x.py", "entrypoint": "x.py"}, {"x.py": ""}, "has an entrypoint"),
        ({"source": "agent", "entrypoint": "../x.py"}, {"y.py": ""}, "needs a file 'x.py'"),
    ],
)
def test_a_reference_that_cannot_become_a_harness_is_a_fault(
    given, out: Path, reference: dict[str, str], files: dict[str, str], fault: str
) -> None:
    profile = given(TARGET, agent_reference=reference)
    (profile.parent / "agent").mkdir()
    for name, text in files.items():
        (profile.parent / "agent" / name).write_text(text)
    with pytest.raises(ConfigError, match=fault.replace("(", r"\(")):
        convert([given(OPENAI_KIND), profile], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("provider", "impl"),
    [
        (OPENAI_KIND, "claude"),
        (ANTHROPIC_KIND | {"base_url": "https://proxy.example"}, "openhands"),
    ],
)
def test_an_agent_whose_provider_does_not_speak_its_format_is_a_fault(
    given, out: Path, provider: dict[str, Any], impl: str
) -> None:
    profile = given(META, provider_id=provider["provider_id"], agent_impl=impl)
    with pytest.raises(ConfigError, match=r"which provider '\w+' is not known to speak"):
        convert([given(provider), profile], out)


def test_two_files_with_one_id_are_a_fault(given, out: Path) -> None:
    with pytest.raises(ConfigError, match=r"'acme' is also the id of .*acme\.json"):
        convert([given(OPENAI_KIND), given(OPENAI_KIND, stem="copy")], out)


def test_nothing_is_overwritten_without_force(given, out: Path) -> None:
    reference = {"source": "mine.py"}
    files = [given(OPENAI_KIND), given(META), given(TARGET, agent_reference=reference)]
    (files[0].parent / "mine.py").write_text(AGENT)
    convert(files, out)
    (out / "harness/answerer/edited.txt").touch()
    with pytest.raises(ConfigError) as refused:
        convert([*files, given(META, stem="new", profile_id="new")], out)
    assert str(refused.value).count("--force") == 4
    assert not (out / "meta/new.yaml").exists()
    convert([given(META, model="acme/large-3"), *files[::2]], out, force=True)
    assert option(out, "meta/writer")["model"] == "acme/large-3"
    assert [path.name for path in (out / "harness/answerer").iterdir()] == ["target_agent.py"]
    assert sorted(path.name for path in out.iterdir()) == ["harness", "meta", "provider", "target"]


def test_an_id_that_a_bundled_option_has_gets_another_name(given, out: Path) -> None:
    said = convert([given(OPENAI_KIND), given(META, profile_id="optuna")], out)
    assert composed(out, "meta=optuna-imported").meta.model == "acme/large-2"
    assert any("is a bundled option, which comes first" in line for line in said)


def test_a_file_whose_name_is_not_its_id_is_used_by_its_id_and_found_by_both(
    given, out: Path
) -> None:
    profile = given(META, stem="writer-meta", provider_id="acme-models")
    said = convert([given(OPENAI_KIND, stem="acme-models"), profile], out)
    assert composed(out, "meta=writer").provider.name == "acme"
    assert f"note: {profile}: called writer, its id, not writer-meta." in said


@pytest.mark.parametrize(
    ("model", "moves"), [("haiku", True), ("acme/large-latest", True), ("acme/large-2", False)]
)
def test_a_model_that_moves_over_time_is_pointed_out(
    given, out: Path, model: str, moves: bool
) -> None:
    said = convert([given(OPENAI_KIND), given(META, model=model)], out)
    assert any("moves over time: pin an exact id" in line for line in said) == moves
    assert option(out, "meta/writer")["model"] == model
