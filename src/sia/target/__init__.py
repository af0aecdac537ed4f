"""The target: how a candidate is run."""

from sia.target.protocol import Target
from sia.target.runner import HarnessRunner

__all__ = ["HarnessRunner", "Target"]
