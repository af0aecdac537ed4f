"""SIA: self-improving agents that a paper can stand on."""

__version__ = "0.1.0"
