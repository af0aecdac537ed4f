"""The target: how a candidate is run, and what confines it."""

from sia.target.environments import Environments
from sia.target.protocol import Limits, Sandbox, Target
from sia.target.runner import HarnessRunner

__all__ = ["Environments", "HarnessRunner", "Limits", "Sandbox", "Target"]
