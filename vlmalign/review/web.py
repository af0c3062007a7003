"""What every request and every answer of the application obeys: headers, origin, CSRF tokens, sizes of bodies.

Pages hold no script or style of their own and load from this server alone (Content-Security-Policy), are kept by no cache,
and may be framed by nobody. A request that writes carries a token that follows from the session's cookie, which no other
site can read; its Origin, where the browser gives one, must be this server.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmalign.review.refusal import Refused

COOKIE = "reader"
MAX_BODY = 256 * 1024  #: bytes
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with "no-referrer" browsers give "null" as the Origin of a form
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "x-robots-tag": "noindex, nofollow",
    "cache-control": "no-store",
}


class Headers:
    """Adds HEADERS to every answer, those of errors too."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def csrf_token(session: str) -> str:
    """The token that requests of a session carry; it tells nothing about the cookie that it follows from."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


def check_origin(request: Request) -> None:
    """Raises Refused for a request that another site's page sends."""
    origin = request.headers.get("origin")
    elsewhere = origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
    if elsewhere or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused("This request comes from another site and is refused.", 403)


def check_csrf(request: Request, session: str, given: str) -> None:
    """Raises Refused for a request without the session's token."""
    check_origin(request)
    if not hmac.compare_digest(given.encode(), csrf_token(session).encode()):
        raise Refused("This page is out of date. Load it again.", 403)


async def body(request: Request) -> bytes:
    """The body of a request. Raises Refused for one that is longer than any page sends."""
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > MAX_BODY:
            raise Refused("The request is too long.", 413)
    return found


async def form_fields(request: Request) -> dict[str, str]:
    """The fields of an HTML form."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise Refused("The request is not one that this page sends.", 415)
    return dict(parse_qsl((await body(request)).decode("utf-8", errors="replace"), max_num_fields=20))


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object of a request."""
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise Refused("The request is not one that this page sends.", 415)
    sent = await body(request)
    try:
        found = json.loads(sent)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused("The request is not one that this page sends.", 400)
    return found
