"""The model endpoint of a run: it holds the keys, counts what is spent, and records every call.

Names are imported when they are used: parts that only know the protocol stay cheap to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sia.gateway.protocol import Gateway, Lease, Role, Spend

if TYPE_CHECKING:
    from sia.gateway.gateway import Budget, ModelGateway, Route
    from sia.gateway.provider import Price, Provider, Usage

__all__ = [
    "Budget",
    "Gateway",
    "Lease",
    "ModelGateway",
    "Price",
    "Provider",
    "Role",
    "Route",
    "Spend",
    "Usage",
]

_MODULES = {
    "gateway": ("Budget", "ModelGateway", "Route"),
    "provider": ("Price", "Provider", "Usage"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"sia.gateway.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
