"""The prompts: Jinja2 templates beside this file, and what renders them."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]


def render(name: str, **values: Any) -> str:
    """The template `name` (without `.md.j2`) with its values.

    Raises:
        jinja2.UndefinedError: The template needs a value that was not given.
    """
    return _environment().get_template(f"{name}.md.j2").render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown for a model; nothing of it is shown in a browser
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
