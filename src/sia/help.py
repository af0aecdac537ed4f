"""`python -m sia --help`: groups, options and examples, read from `conf/` without Hydra."""

from collections.abc import Iterator
from importlib import resources

import yaml

EXAMPLES = """\
Examples:
  python -m sia                                      LawBench, embedded: no key, no GPU
  python -m sia debug=fast                           the whole loop in seconds
  python -m sia -m sweep=seeds search=keep_best,chain   a grid: six runs

Before a run that costs money:
  python -m sia.doctor meta=claude                   keys, endpoints, sandbox, data: all there?
  python -m sia meta=claude --dry-run                the plan, and what it may cost

After a run:
  python -m sia.exam runs/...                        open the sealed test, once
  python -m sia.runs list                            what there is; resume and compare, too
  python -m sia.tracking ui                          compare runs in the MLflow UI
  python -m sia resume=runs/...                      go on after Ctrl-C or a crash
"""


def text() -> str:
    """The whole help page."""
    groups = "\n".join(_groups())
    return (
        "SIA improves an agent on a benchmark task, generation after generation.\n\n"
        "Usage: python -m sia [group=option ...] [key=value ...]\n"
        "       python -m sia --cfg job    print the configuration and stop\n"
        "       python -m sia -cd my_conf  add a folder with options of your own\n"
        "       python -m sia --hydra-help what Hydra itself offers\n\n"
        f"{EXAMPLES}\nGroups and their options (* default):\n{groups}\n"
    )


def _groups() -> Iterator[str]:
    root = resources.files("sia.conf")
    primary = yaml.safe_load((root / "config.yaml").read_text("utf-8"))
    defaults = {
        group: option
        for entry in primary["defaults"]
        if isinstance(entry, dict)
        for group, option in entry.items()
        if not group.startswith("override")
    }
    for group in defaults:
        folder = root / group
        yield f"\n  {group}"
        for option in sorted(folder.iterdir(), key=lambda file: file.name):
            if option.name.endswith(".yaml"):
                name = option.name.removesuffix(".yaml")
                mark = "*" if defaults[group] == name else " "
                yield f"   {mark}{name:22} {_summary(option.read_text('utf-8'))}"


def _summary(text: str) -> str:
    """The last line of the comment that opens the file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return lines[-1] if lines else ""
