"""One question to an endpoint that speaks OpenAI's chat completions: retries, back-off, and which answers end a run.

Only status codes and short codes of an error are ever quoted: the body of an error may repeat what was asked.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

Messages = Sequence[Mapping[str, Any]]

#: statuses after which another try may succeed; 500 and above do as well
_PASSING = {408, 409, 425, 429}
_ADVICE = {
    401: "the key was refused; name the variable that holds it with --key-variable",
    403: "the key may not use this; check its rights and the model's name",
    404: "there is no such model or address; check --endpoint (it mostly ends in /v1) and --model",
}


class EndpointStopped(ValueError):
    """Asking on is useless: the endpoint refuses everything, or is not there."""


class NotAnswered(Exception):
    """This question got no usable reply; says why, in words that quote nothing of it."""


class Reply(NamedTuple):
    """What the model wrote, and what it took."""

    text: str
    finish: str  #: "stop"; "length" for one that was cut off
    tokens_in: int  #: 0 where the endpoint does not say
    tokens_out: int


class Patience(NamedTuple):
    """How long an endpoint is waited for; in seconds."""

    tries: int = 6  #: of one question
    first: float = 1.0  #: the first wait; each next one is twice as long
    most: float = 60.0  #: the longest wait that we choose ourselves
    asked: float = 900.0  #: the longest wait that `Retry-After` may ask for
    timeout: float = 120.0  #: for a whole reply


class Endpoint:
    """Chat completions at `url`; an async context manager. Questions may be asked concurrently, and wait together where
    the endpoint asks one of them to wait.

    Raises ValueError for an address that is no URL, or sends films over a network without TLS (`plain_http` permits it).
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        body: Mapping[str, Any] | None = None,
        patience: Patience = Patience(),
        plain_http: bool = False,
    ):
        self.url, self.host = _address(url, plain_http)
        self.retries = 0  #: requests that were made again
        self._body = {**(body or {}), "model": model}
        self._patience = patience
        self._wait_until = 0.0
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Redirects are not followed: films go to the address that was given, and nowhere else.
        self._client = httpx2.AsyncClient(headers=headers, timeout=patience.timeout, follow_redirects=False)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def ask(self, messages: Messages) -> Reply:
        """The model's reply.

        Raises:
            NotAnswered: when every try failed, or the endpoint refuses this question (400, 413, 422).
            EndpointStopped: when it refuses all (401, 403, 404, a redirect), or asks for a wait that is too long.
        """
        why = ""
        for attempt in range(self._patience.tries):
            if attempt:
                self.retries += 1
            await self._pause()
            wait = min(self._patience.most, self._patience.first * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                async with asyncio.timeout(self._patience.timeout):
                    response = await self._client.post(self.url, json={**self._body, "messages": list(messages)})
            except (TimeoutError, httpx2.TimeoutException):
                why = f"no reply within {self._patience.timeout:g} s"
            except httpx2.HTTPError as error:  # no connection, or one that broke off in the middle of a reply
                why = f"the connection failed ({type(error).__name__})"
            else:
                if response.status_code == 200:
                    try:
                        return _read(response)
                    except ValueError as error:
                        why = str(error)
                else:
                    why = self._refused(response)
                    wait = self._asked_to_wait(response, wait)
            if attempt + 1 < self._patience.tries:
                await asyncio.sleep(wait)
        raise NotAnswered(f"{why}, after {self._patience.tries} tries")

    async def _pause(self) -> None:
        while (rest := self._wait_until - time.monotonic()) > 0:
            await asyncio.sleep(rest)

    def _refused(self, response: httpx2.Response) -> str:
        """Why another try may succeed; raises where none will."""
        status, said = response.status_code, f"status {response.status_code}{_code(response)}"
        if status in _ADVICE:
            raise EndpointStopped(f"{self.host}: {said}: {_ADVICE[status]}")
        if status < 400:
            raise EndpointStopped(
                f"{self.host}: {said}, expected 200; redirects are not followed: give the address itself"
            )
        if status < 500 and status not in _PASSING:
            raise NotAnswered(f"the endpoint refused the request: {said}")
        return said

    def _asked_to_wait(self, response: httpx2.Response, wait: float) -> float:
        asked = _seconds(response.headers.get("Retry-After"))
        if asked is None:
            return wait
        if asked > self._patience.asked:
            raise EndpointStopped(
                f"{self.host}: status {response.status_code}, to be asked again in {asked:.0f} s; start again then"
            )
        self._wait_until = max(self._wait_until, time.monotonic() + asked)
        return asked


def _address(url: str, plain_http: bool) -> tuple[str, str]:
    """The address of chat completions, and the host."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--endpoint: expected an address such as https://HOST/v1, found {url!r}")
    local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
    if parts.scheme == "http" and not local and not plain_http:
        raise ValueError(
            f"--endpoint: http would send films to {parts.hostname} for all on the way to read; give its https address, or "
            "--plain-http for a network of your own"
        )
    path = parts.path.rstrip("/")
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return parts._replace(path=path, fragment="").geturl(), parts.hostname


def _read(response: httpx2.Response) -> Reply:
    """Raises ValueError, quoting nothing, for a body that is no chat completion."""
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content")
        usage = body.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError("the reply is no chat completion") from None
    if text is not None and not isinstance(text, str):
        raise ValueError("the reply is no chat completion: its content is not text")
    counts = [count if isinstance(count, int) and count > 0 else 0 for count in counts]
    return Reply((text or "").strip(), str(choice.get("finish_reason") or ""), *counts)


def _code(response: httpx2.Response) -> str:
    """The short code of an error, such as `content_filter`; never its message."""
    try:
        error = response.json()["error"]
        code = error.get("code") or error.get("type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({code})" if isinstance(code, str) and re.fullmatch(r"[a-z_]{1,40}", code) else ""


def _seconds(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or a date (RFC 9110, 10.2.3); None for anything else.

    >>> _seconds("2"), _seconds("soon"), _seconds(None)
    (2.0, None, None)
    """
    if header is None:
        return None
    if re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", header.strip()):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def read_body(text: str | None) -> dict[str, Any]:
    """Further fields of each request, written as a JSON object.

    >>> read_body('{"temperature": 0.7}'), read_body(None)
    ({'temperature': 0.7}, {})
    """
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict) or {"messages", "model", "stream", "n"} & set(found):
        raise ValueError(
            '--body: expected a JSON object such as {"temperature": 0.7, "max_tokens": 2048}, without messages, model, '
            "stream and n"
        )
    return found
