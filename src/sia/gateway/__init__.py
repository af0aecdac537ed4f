"""The model endpoint of a run: it holds the keys, counts what is spent, and records every call.

The server and the HTTP client are imported when a gateway is started.
"""

from sia.gateway.gateway import Budget, ModelGateway, Route
from sia.gateway.protocol import Gateway, Lease, Role, Spend
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
