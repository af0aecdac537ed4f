"""Meta backends: what writes the target and decides how it changes."""

from sia.meta.protocol import MetaBackend, Question, Request

__all__ = ["MetaBackend", "Question", "Request"]
