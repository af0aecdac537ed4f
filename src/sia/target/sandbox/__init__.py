"""Sandboxes: commands that confine a target. `sia.target.sandbox.auto.auto` picks one."""

from sia.target.sandbox.bwrap import Bwrap
from sia.target.sandbox.docker import Docker
from sia.target.sandbox.process import Process

__all__ = ["Bwrap", "Docker", "Process"]
