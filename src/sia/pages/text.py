"""Text that a model wrote, made harmless to look at."""

import re

from markupsafe import Markup

# Sequences that colour a terminal, move its cursor, set its title or paste into it.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # OSC, …
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What makes a reader see other text than a program reads.
_HIDDEN = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    r"""Text without terminal sequences and control characters; hidden characters become visible.

    Ends of lines become `\n`; tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _CONTROLS.sub("", text)
    return _HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def notes(text: str) -> Markup:
    """Markdown without anything that leads elsewhere: no links, no pictures, no HTML of its own."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "reference", "html_inline", "html_block"])
    tokens = parser.parse(clean(text))
    for token in tokens:
        if token.tag in ("h1", "h2", "h3", "h4"):  # they come below the headings of the page
            token.tag = f"h{int(token.tag[1]) + 2}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))  # escapes all text
