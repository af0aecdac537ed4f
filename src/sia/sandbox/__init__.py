"""Sandboxes: commands that confine a program that a model wrote, and what watches over it.

`sia.sandbox.auto.auto` picks the strongest one that works here.
"""

from sia.sandbox.bwrap import Bwrap
from sia.sandbox.docker import Docker
from sia.sandbox.environments import Environments
from sia.sandbox.process import Process
from sia.sandbox.protocol import Endpoint, Job, Limits, Sandbox

__all__ = ["Bwrap", "Docker", "Endpoint", "Environments", "Job", "Limits", "Process", "Sandbox"]
