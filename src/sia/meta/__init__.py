"""Meta backends: what writes the target and decides how it changes."""

from sia.meta.protocol import MetaBackend, Request

__all__ = ["MetaBackend", "Request"]
