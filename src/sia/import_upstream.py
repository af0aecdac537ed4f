"""`python -m sia.import_upstream FILE... --out my_conf`: profiles of `sia-agent` become options.

Reads provider, meta-profile and target-profile JSON. The options are used as
`python -m sia -cd my_conf meta=<id> target=<id>`. Either everything is written, or nothing.
"""

import argparse
import difflib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from sia.errors import ConfigError, SiaError
from sia.tasks.task import ENTRY_POINT

REQUIREMENTS = "requirements.txt"
UPSTREAM_ENTRY_POINT = "reference_target_agent.py"
# What a file of each kind holds, and whether it must.
FIELDS: dict[str, dict[str, bool]] = {
    "provider": {
        "provider_id": True, "name": True, "client_kind": True, "api_key_env": True,
        "base_url": False, "litellm_prefix": False,
    },
    "meta": {
        "profile_id": True, "name": True, "agent_impl": True, "model": True, "provider_id": True,
        "model_canonical_name": False,
    },
    "target": {
        "profile_id": True, "name": True, "model": True, "provider_id": True,
        "agent_reference": False,
    },
}  # fmt: skip
_ID = {"provider": "provider_id", "meta": "profile_id", "target": "profile_id"}
# agent_impl -> our option, and the format that it asks its model in.
AGENTS = {
    "claude": ("claude", "messages"),
    "openhands": ("openhands", "chat"),
    "pydantic-ai": ("pydantic_ai", "chat"),
}
CLIENT_KINDS = ("anthropic", "openai", "google")
ANTHROPIC = "https://api.anthropic.com"
OPENAI = "https://api.openai.com/v1"
GEMINI = "https://generativelanguage.googleapis.com/v1beta/openai"
OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
NOT_OPTIONS = ("null", "true", "false", "inf", "nan")  # words of Hydra's grammar
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".git", ".venv", "venv")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One JSON file; `kind` is the group that it becomes an option of."""

    path: Path
    kind: str
    data: dict[str, Any]

    @property
    def id(self) -> str:
        """What the file calls itself."""
        return str(self.data[_ID[self.kind]])


@dataclass(frozen=True, kw_only=True)
class Harness:
    """A folder to be made: `entry` becomes its entry point, `folder` comes along if given."""

    name: str
    entry: Path
    folder: Path | None


@dataclass(kw_only=True)
class Plan:
    """What will be written, and what is to be said about it.

    Attributes:
        options: (group, name) -> the file's content.
        notes: Lines for the user, of what is not as they may expect.
    """

    options: dict[tuple[str, str], str] = field(default_factory=dict)
    harnesses: list[Harness] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.import_upstream", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a JSON file")
    parser.add_argument("--out", required=True, type=Path, help="the folder that -cd will name")
    parser.add_argument("--force", action="store_true", help="overwrite options that exist")
    args = parser.parse_args(argv)
    try:
        for line in convert(args.files, args.out, force=args.force):
            print(line)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def convert(files: Sequence[Path], out: Path, *, force: bool = False) -> list[str]:
    """Writes the options of `files` into `out`; gives what was done, for the user.

    Raises:
        ConfigError: All faults of all files in one message. Nothing has been written.
    """
    faults: list[str] = []
    sources = _read_all(files, faults)
    # A profile whose provider's file has faults has none for that.
    broken = {path.stem for path in files} - {source.path.stem for source in sources}
    plan = _plan(sources, out, broken, faults)
    if not force:
        faults += [
            f"{path} exists already. Choose another folder, or overwrite it: --force"
            for path in _destinations(plan, out)
            if path.exists()
        ]
    if faults:
        raise ConfigError("Nothing was imported:\n" + "\n".join(f"  {fault}" for fault in faults))
    _write(plan, out)
    return [*_report(plan, out)]


def _read_all(files: Sequence[Path], faults: list[str]) -> list[Source]:
    """The files, and the provider files that profiles name by path."""
    sources: list[Source] = []
    pending = list(dict.fromkeys(files))
    seen = {path.resolve() for path in pending}
    while pending:
        source = _read(pending.pop(0), faults)
        if source is None:
            continue
        sources.append(source)
        if source.kind != "provider" and _is_path(named := source.data["provider_id"]):
            path = Path(named).expanduser()
            if path.resolve() not in seen:
                seen.add(path.resolve())
                pending.append(path)
    by_id: dict[tuple[str, str], Source] = {}
    for source in sources:
        other = by_id.setdefault((source.kind, source.id), source)
        if other is not source:
            faults.append(f"{source.path}: {source.id!r} is also the id of {other.path}.")
    return list(by_id.values())


def _read(path: Path, faults: list[str]) -> Source | None:
    """One file, or None and its faults."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except IsADirectoryError:
        faults.append(f"{path} is a folder. Name its files: {path}/*.json")
        return None
    except OSError as error:
        faults.append(f"{path} cannot be read: {error.strerror}.")
        return None
    except ValueError as error:
        faults.append(f"{path} is not JSON: {error}.")
        return None
    if not isinstance(data, dict) or not data.keys() & {"provider_id", "profile_id"}:
        faults.append(f"{path} is neither a provider nor a profile: it has no provider_id.")
        return None
    kind = "provider" if "profile_id" not in data and "agent_impl" not in data else "target"
    if kind == "target" and "agent_impl" in data:
        kind = "meta"
    found = [*_faults(data, kind)]
    faults += [f"{path}: {fault}" for fault in found]
    return None if found else Source(path=path, kind=kind, data=data)


def _faults(data: dict[str, Any], kind: str) -> Iterable[str]:
    """What is wrong with the content of one file."""
    known = FIELDS[kind]
    for key in sorted(data.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        yield f"unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    for key, required in known.items():
        value = data.get(key)
        if value is None:
            if required:
                yield f"{key} is missing."
        elif key == "agent_reference":
            yield from _reference_faults(value)
        elif key == "api_key_env" and not (isinstance(value, str) and VARIABLE.fullmatch(value)):
            # Not shown: a value that is no name may be a key.
            yield "api_key_env must be the name of an environment variable, not a key."
        elif not isinstance(value, str) or not value.strip() or not value.isprintable():
            yield f"{key} must be a text of one line, not {value!r}."
        elif "${" in value:
            yield f"{key}={value!r}: write the value itself instead of ${{...}}."
        elif key == "client_kind" and value not in CLIENT_KINDS:
            yield f"client_kind={value!r} is none of {', '.join(CLIENT_KINDS)}."
        elif key == "agent_impl" and value not in AGENTS:
            yield f"agent_impl={value!r} is none of {', '.join(AGENTS)}."
        elif key == "base_url" and urlsplit(value).scheme not in ("http", "https"):
            yield f"base_url={value!r} is not an http or https address."
        elif key == _ID[kind] and not _is_option(value):
            yield (
                f"{key}={value!r} cannot name an option: letters, digits, '.', '_' and '-', "
                "beginning with a letter."
            )


def _reference_faults(reference: Any) -> Iterable[str]:
    if reference == "default":
        return
    if not isinstance(reference, dict) or not isinstance(reference.get("source"), str):
        yield (
            f'agent_reference={reference!r} must be "default" or '
            '{"source": file or folder, "entrypoint": file}.'
        )
        return
    for key in sorted(reference.keys() - {"source", "entrypoint"}):
        yield f"unknown key {key!r} in agent_reference."
    if not isinstance(reference.get("entrypoint", ""), str):
        yield f"agent_reference.entrypoint must be a text, not {reference['entrypoint']!r}."


def _plan(sources: Sequence[Source], out: Path, broken: set[str], faults: list[str]) -> Plan:
    """What the sources become.

    Args:
        sources: All files without faults.
        out: Where options that were imported before lie.
        broken: Stems of the files with faults.
        faults: Is added to.
    """
    plan = Plan()
    bundled = {group: _bundled(group) for group in FIELDS}
    providers: dict[str, tuple[str, dict[str, Any]]] = {}  # how it may be named -> option, content
    for name, content in bundled["provider"].items():
        if content.get("formats"):
            providers[name] = (name, content)
    for file in sorted((out / "provider").glob("*.yaml")):
        try:
            providers[file.stem] = (file.stem, _content(file.read_text("utf-8")))
        except yaml.YAMLError as error:
            faults.append(f"{file} is not YAML: {error}.")
    for source in (source for source in sources if source.kind == "provider"):
        content = _provider(source, plan)
        ours = bundled["provider"].get(source.id)
        if ours is not None and _same_service(ours, content):
            plan.notes.append(
                f"{source.path}: the bundled provider={source.id} is the same service, and has "
                "prices; it is used instead."
            )
            name, content = source.id, ours
        else:
            name = _name(source, bundled, plan)
            plan.options["provider", name] = _yaml(source, content)
        for known_as in (source.path.stem, source.id, str(source.path.resolve())):
            providers[known_as] = (name, content)
    for source in (source for source in sources if source.kind != "provider"):
        name = _name(source, bundled, plan)
        harness = _harness(source, name, faults) if source.kind == "target" else None
        named = source.data["provider_id"]
        key = str(Path(named).expanduser().resolve()) if _is_path(named) else named
        if key not in providers:
            # A file that a path leads to has its own faults, unless it is something else.
            if named not in broken and (
                not _is_path(named) or any(str(one.path.resolve()) == key for one in sources)
            ):
                faults.append(
                    f"{source.path}: provider_id={named!r} is no provider: neither among the files "
                    f"nor an option ({', '.join(_options(providers))}). Give its file as well."
                )
            continue
        provider, content = providers[key]
        model = _model(source, content, plan)
        if source.kind == "meta":
            agent, spoken = AGENTS[source.data["agent_impl"]]
            if spoken not in content.get("formats", []):
                faults.append(
                    f"{source.path}: agent_impl={source.data['agent_impl']!r} asks in the format "
                    f"{spoken!r}, which provider {named!r} is not known to speak."
                )
            if agent == "openhands":
                plan.notes.append(
                    f"meta={name} needs an interpreter of its own: scripts/openhands, then "
                    "meta.python=.venv-openhands/bin/python"
                )
            plan.options["meta", name] = _yaml(
                source, {"model": model}, f"/schema/meta/{agent}@_here_",
                {"override /provider@_global_.provider": provider},
            )  # fmt: skip
        else:
            place = "reference"
            if harness is not None:
                plan.harnesses.append(harness)
                place = str((out / "harness" / name).resolve())
            plan.options["target", name] = _yaml(
                source, {"harness": place, "model": model}, {"/provider@provider": provider}
            )
    return plan


def _options(providers: dict[str, tuple[str, dict[str, Any]]]) -> list[str]:
    return sorted({name for name, _ in providers.values()}) or ["there is none"]


def _provider(source: Source, plan: Plan) -> dict[str, Any]:
    """The content of a provider option."""
    url = (source.data.get("base_url") or "").rstrip("/")
    kind = source.data["client_kind"]
    content: dict[str, Any] = {"name": source.id}
    if kind == "anthropic":
        url = url.removesuffix("/v1") or ANTHROPIC
        # Only the vendor itself is known to speak the OpenAI format as well.
        if url == ANTHROPIC:
            content["base_url"] = f"{ANTHROPIC}/v1"
        content["anthropic_url"] = url
        content["formats"] = ["messages", "chat"] if url == ANTHROPIC else ["messages"]
    else:
        if kind == "google" and url:
            plan.notes.append(
                f"{source.path}: base_url is taken for an address of the OpenAI format; "
                f"Gemini's is {GEMINI}"
            )
        content["base_url"] = url or (GEMINI if kind == "google" else OPENAI)
        content["formats"] = ["chat", "embeddings"]
        if content["base_url"] == OPENAI:
            content["formats"].append("responses")
    content["api_key_env"] = source.data["api_key_env"]
    return content


def _model(source: Source, provider: dict[str, Any], plan: Plan) -> str:
    """The model's id as the provider's own address knows it."""
    model = str(source.data["model"])
    if "googleapis.com" in (provider.get("base_url") or ""):
        model = model.removeprefix("gemini/")
    moves = not re.search(r"\d", model) or model.endswith("latest")
    if moves and model not in provider.get("models", {}):
        plan.notes.append(
            f"{source.path}: model={model!r} moves over time: pin an exact id where results count."
        )
    if source.data.get("model_canonical_name"):
        plan.notes.append(
            f"{source.path}: model_canonical_name is left out; prices come from the provider."
        )
    return model


def _harness(source: Source, name: str, faults: list[str]) -> Harness | None:
    """The harness that `agent_reference` names; None for the task's own."""
    reference: Any = source.data.get("agent_reference") or "default"
    if reference == "default":
        return None
    place = source.path.parent / Path(reference["source"]).expanduser()
    if place.is_file():
        if "entrypoint" in reference:
            faults.append(f"{source.path}: agent_reference has an entrypoint, but {place} is one.")
        return Harness(name=name, entry=place, folder=None)
    entry = place / reference.get("entrypoint", UPSTREAM_ENTRY_POINT)
    if not place.is_dir():
        faults.append(f"{source.path}: agent_reference.source {str(place)!r} does not exist.")
    elif not entry.is_file() or entry.parent != place:
        faults.append(
            f"{source.path}: agent_reference needs a file {entry.name!r} directly in {place}. "
            'Name it: "entrypoint"'
        )
    elif entry.name != ENTRY_POINT and (place / ENTRY_POINT).exists():
        faults.append(
            f"{source.path}: {place} has a {ENTRY_POINT} besides its entrypoint {entry.name!r}, "
            "which is to get this name. Rename one."
        )
    return Harness(name=name, entry=entry, folder=place)


def _name(source: Source, bundled: dict[str, dict[str, Any]], plan: Plan) -> str:
    """The name of the option: the id, unless a bundled option, which would win, has it."""
    name = source.id
    if name in bundled[source.kind]:
        name = f"{name}-imported"
        plan.notes.append(
            f"{source.path}: {source.kind}={source.id} is a bundled option, which comes first; "
            f"this one is called {name}."
        )
    elif name != source.path.stem:
        plan.notes.append(f"{source.path}: called {name}, its id, not {source.path.stem}.")
    return name


def _bundled(group: str) -> dict[str, dict[str, Any]]:
    """The options of `conf/` in a group, with their content."""
    return {
        file.name.removesuffix(".yaml"): _content(file.read_text("utf-8"))
        for file in (resources.files("sia.conf") / group).iterdir()
        if file.name.endswith(".yaml")
    }


def _content(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    return content if isinstance(content, dict) else {}


def _same_service(ours: dict[str, Any], imported: dict[str, Any]) -> bool:
    """Whether two providers are one address with one key."""

    def service(content: dict[str, Any]) -> tuple[str, ...]:
        url = content.get("anthropic_url") or content.get("base_url") or ""
        return url.rstrip("/"), content.get("api_key_env") or ""

    return service(ours) == service(imported)


def _is_path(provider: str) -> bool:
    return "/" in provider or provider.endswith(".json")


def _is_option(name: str) -> bool:
    return OPTION.fullmatch(name) is not None and name.lower() not in NOT_OPTIONS


def _yaml(source: Source, content: dict[str, Any], *defaults: str | dict[str, str]) -> str:
    """The text of an option: what it is, its defaults, its values."""
    whole = {**({"defaults": [*defaults, "_self_"]} if defaults else {}), **content}
    return f"# {source.data['name']}\n{yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)}"


def _destinations(plan: Plan, out: Path) -> list[Path]:
    files = [out / group / f"{name}.yaml" for group, name in plan.options]
    return [*files, *(out / "harness" / harness.name for harness in plan.harnesses)]


def _write(plan: Plan, out: Path) -> None:
    """Makes everything in a folder beside its place, then moves it there.

    Raises:
        ConfigError: Something cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".import-", dir=out) as name:
            stage = Path(name)
            for (group, option), text in plan.options.items():
                (stage / group).mkdir(exist_ok=True)
                (stage / group / f"{option}.yaml").write_text(text, encoding="utf-8")
            for harness in plan.harnesses:
                _copy(harness, stage / "harness" / harness.name)
            for destination in _destinations(plan, out):
                destination.parent.mkdir(exist_ok=True)
                if destination.is_dir():
                    shutil.rmtree(destination)
                os.replace(stage / destination.relative_to(out), destination)
    except (OSError, shutil.Error) as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error


def _copy(harness: Harness, to: Path) -> None:
    """Copies a harness and gives its entry point the name that the contract asks for."""
    if harness.folder is None:
        to.mkdir(parents=True)
        if (requirements := harness.entry.parent / REQUIREMENTS).is_file():
            shutil.copyfile(requirements, to / REQUIREMENTS)
        shutil.copyfile(harness.entry, to / ENTRY_POINT)
        return
    shutil.copytree(harness.folder, to, symlinks=True, ignore=LEFT_OUT)
    if harness.entry.name == ENTRY_POINT:
        return
    entry = to / harness.entry.name
    shutil.copyfile(entry, to / ENTRY_POINT)
    importing = re.compile(rf"^\s*(from|import)\s+{re.escape(entry.stem)}\b", re.MULTILINE)
    others = (path for path in to.rglob("*.py") if path.name not in (entry.name, ENTRY_POINT))
    if not any(importing.search(path.read_text("utf-8", "replace")) for path in others):
        entry.unlink()


def _report(plan: Plan, out: Path) -> Iterable[str]:
    """What was written, what to know of it, and the command that uses it."""
    yield from (f"wrote {path}" for path in _destinations(plan, out))
    yield from (f"note: {note}" for note in plan.notes)
    chosen: dict[str, str] = {}
    for group, name in plan.options:
        chosen.setdefault(group, name)
    if len(chosen) > 1:
        chosen.pop("provider", None)  # a profile brings its own
    if chosen:
        words = " ".join(f"{group}={chosen[group]}" for group in sorted(chosen))
        yield f"use: python -m sia -cd {out} {words}"
    else:
        yield "nothing to write"


if __name__ == "__main__":
    sys.exit(main())
