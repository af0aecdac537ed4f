"""What every request has to pass, and the headers that every answer gets."""

import hmac
import secrets
import time
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "sia_token"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    # Scripts and styles are files of ours; nothing a page holds is run, and nothing is fetched
    # from elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """Wraps an application. Refuses foreign names, missing tokens, and all but reading."""

    def __init__(self, app: ASGIApp, *, names: Collection[str], token: str | None) -> None:
        """Takes what is allowed.

        Args:
            app: What answers.
            names: Host names and addresses by which the server may be called: a page elsewhere
                could make its own name point here and read the answers.
            token: Asked for once, then kept in a cookie; None: none is needed.
        """
        self._app = app
        self._names = frozenset(name.lower() for name in names)
        self._token = token
        self._open = 0
        self._last = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last answer ended; 0 while one is under way, as for an open page."""
        return 0.0 if self._open else time.monotonic() - self._last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        self._open += 1
        try:
            refused = self._refused(scope)
            await (refused or self._app)(scope, receive, _with_headers(send))
        finally:
            self._open -= 1
            self._last = time.monotonic()

    def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        name = host_name(headers.get("host", ""))
        if name not in self._names:
            return PlainTextResponse(
                "This server does not answer to that name. Start it with: "
                "python -m sia.web --name NAME\n",
                status_code=421,
            )
        if scope["method"] != "GET":
            return PlainTextResponse("Only reading.\n", 405, {"Allow": "GET"})
        if self._token is None or self._is_token(_cookie(headers)):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = query.pop("token", [""])[0]
        if not self._is_token(given):
            return PlainTextResponse(
                "A token is needed: open the address that python -m sia.web has printed.\n", 401
            )
        # The token leaves the address, so that it is in no history and no picture of a screen.
        # The path begins with one slash: two would name another server.
        place = "/" + scope["path"].lstrip("/\\")
        rest = urlencode(query, doseq=True)
        response = RedirectResponse(f"{place}?{rest}" if rest else place, status_code=303)
        response.set_cookie(COOKIE, given, httponly=True, samesite="strict")
        return response

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())


def host_name(host: str) -> str:
    """The name in a `Host` header, without its port and in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def new_token() -> str:
    """One that nobody guesses."""
    return secrets.token_urlsafe(32)


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return sending
