"""An endpoint that follows a script and speaks the vendors' real wire formats.

For tests, demonstrations and measurements: `provider=scripted` is used like any other provider.
"""

from sia.gateway.scripted.rules import Rule, read_rules
from sia.gateway.scripted.server import Scripted, Seen, serving

__all__ = ["Rule", "Scripted", "Seen", "read_rules", "serving"]
