"""Who may ask the admin server: no web page of another origin, and with a token only who presents it.

A browser lets any page send requests to the loopback address.  It does not let the page read an answer of
another origin, as none of ours allows it, unless the page's own name has been pointed at this address
meanwhile (DNS rebinding): then the request still bears that name as its Host.  So a Host must be an IP
address, localhost, or a name from the configuration.  Requests that a browser says come from elsewhere
(Origin, Sec-Fetch-Site) are refused as well, and the answers tell it to show nothing of ours inside another
page.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from config.schema import Admin

OPEN = frozenset({"/healthz", "/readyz"})
"""For probes, which may come with any Host and have no token."""

UNSECRET = frozenset({"/"})
"""The page itself holds no data, and asks for the token."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guard(options: Admin) -> Middleware:
    """Return what looks at each request before it is answered."""
    names = {"localhost", options.host.lower(), *(name.strip().lower() for name in options.names.split(","))}
    token = options.token.get_secret_value() if options.token else None

    @web.middleware
    async def looked_at(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN:
            if not _is_ours(request.headers.get("Host", ""), names):
                text = "this host name is not one of the admin server's: add it to admin.names\n"
                return web.Response(status=421, text=text, headers=HEADERS)
            if _comes_from_elsewhere(request):
                text = "pages of other origins may not use this\n"
                return web.Response(status=403, text=text, headers=HEADERS)
            if token is not None and request.path not in UNSECRET and not _presents(request, token):
                headers = {**HEADERS, "WWW-Authenticate": "Bearer"}
                return web.Response(status=401, text="admin.token is wanted\n", headers=headers)
        response = await handler(request)
        response.headers.update(HEADERS)
        return response

    return looked_at


def _is_ours(host: str, names: set[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in names - {""}:
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _comes_from_elsewhere(request: web.Request) -> bool:
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("Host", "").lower():
        return True
    return request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not (
        request.path == "/" and request.headers.get("Sec-Fetch-Mode") == "navigate"  # a link to the page
    )


def _presents(request: web.Request, token: str) -> bool:
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
