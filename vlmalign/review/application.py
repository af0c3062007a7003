"""The web application: what a reader's browser can ask for, and what it is answered.

No answer holds the name of an arm, a case or a file: a page is asked for as "mine", a film by its number on that page.
What is answered follows from the study's seed and contents and from the reader's own entries.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vlmalign.review import access, adjudication, films, pages, votes, web
from vlmalign.review.access import Person, Token, new_token
from vlmalign.review.database import Database
from vlmalign.review.freezing import check_current
from vlmalign.review.material import Study
from vlmalign.review.refusal import Refused

log = logging.getLogger("vlmalign.review")

LOCAL = ("127.0.0.1", "localhost")
Handler = Callable[[Request], Awaitable[Response]]


class Application:
    """The handlers, with what they share."""

    def __init__(self, study: Study, database: Database, *, secure: bool, token: Token):
        self.study, self.database, self.secure, self.token = study, database, secure, token

    async def home(self, request: Request) -> Response:
        person, _ = await self._who(request)
        return _to("enter" if person is None else "case")

    async def enter(self, request: Request) -> Response:
        """The page a personal link opens. The link's token stands behind `#`, which browsers do not send."""
        return self._page("enter.html", simulated=self.study.protocol.simulated)

    async def entered(self, request: Request) -> Response:
        web.check_origin(request)
        given = (await web.form_fields(request)).get("token", "").strip()
        try:
            made = await run_in_threadpool(access.enter, self.database, given, token=self.token)
        except Refused:
            log.warning("a link was refused")
            raise
        answer = _to("case")
        seconds = int(access.SESSION_DAYS * access.DAY)
        answer.set_cookie(web.COOKIE, made, seconds, httponly=True, samesite="lax", secure=self.secure)
        return answer

    async def begin(self, request: Request) -> Response:
        person, session = await self._known(request)
        web.check_csrf(request, session, (await web.form_fields(request)).get("csrf", ""))
        await run_in_threadpool(access.begin, self.database, person.name)
        return _to("case")

    async def leave(self, request: Request) -> Response:
        _, session = await self._known(request)
        web.check_csrf(request, session, (await web.form_fields(request)).get("csrf", ""))
        await run_in_threadpool(access.leave, self.database, session)
        answer = _to("enter")
        answer.delete_cookie(web.COOKIE, httponly=True, samesite="lax", secure=self.secure)
        return answer

    async def case(self, request: Request) -> Response:
        """The page that is the person's turn: instructions, a case, or the end."""
        person, session = await self._who(request)
        if person is None:
            return _to("enter")
        shared = {"csrf": web.csrf_token(session), "person": person}
        if not person.begun:
            return self._page(
                "start.html", **shared, pages=await run_in_threadpool(votes.count, self.database, person.name)
            )
        context = await run_in_threadpool(self._turn, person)
        return self._page("done.html" if context is None else "case.html", **shared, **(context or {}))

    def _turn(self, person: Person) -> dict[str, Any] | None:
        with self.database.reading() as connection:
            check_current(connection, self.study)
        if person.role == "adjudicator":
            adjudication.hand_over(self.database, self.study, person.name)
        page = votes.current(self.database, person.name)
        if page is None:
            return None
        given = adjudication.opinions(self.database, page.place) if page.place.purpose == "adjudication" else []
        return pages.case_context(self.study, page, given)

    async def film(self, request: Request) -> Response:
        """A film of the page that is the person's turn, by its number."""
        person, _ = await self._known(request)

        def found() -> bytes:
            with self.database.reading() as connection:
                check_current(connection, self.study)
            page = votes.current(self.database, person.name)
            number = request.path_params["number"]
            shown = [] if page is None else self.study.material.case(page.place.case).films
            if page is None or page.place.position != request.path_params["position"] or not 1 <= number <= len(shown):
                raise Refused("This film is not on the page that is your turn.", 404)
            return films.png(shown[number - 1], self.study.protocol.folder)

        return Response(await run_in_threadpool(found), media_type="image/png")

    async def save(self, request: Request) -> Response:
        return await self._change(request, votes.save)

    async def undo(self, request: Request) -> Response:
        return await self._change(request, votes.undo)

    async def close(self, request: Request) -> Response:
        return await self._change(request, votes.close)

    async def _change(
        self, request: Request, act: Callable[[Database, Study, str, votes.Change], votes.Saved]
    ) -> Response:
        person, session = await self._known(request)
        web.check_csrf(request, session, request.headers.get("x-csrf-token", ""))
        change = _change(await web.json_object(request))
        # The transaction is on disk when this returns: only then is the vote acknowledged.
        saved = await run_in_threadpool(act, self.database, self.study, person.name, change)
        return JSONResponse({"revision": saved.revision, "entry": saved.entry, "can_undo": saved.can_undo})

    async def static(self, request: Request) -> Response:
        content, kind = pages.static(request.path_params["name"])
        return Response(content, media_type=kind)

    async def no_icon(self, request: Request) -> Response:
        """Browsers ask for one whatever the page says."""
        del request
        return Response(status_code=204)

    async def refused(self, request: Request, error: Exception) -> Response:
        """A refusal in the form in which it was asked: JSON for a script, a page for a person."""
        if isinstance(error, Refused):
            sentence, status = str(error), error.status
        elif isinstance(error, HTTPException):
            sentence, status = "There is no such page here.", error.status_code
        else:
            log.error("a request failed", exc_info=error)
            sentence, status = "Something went wrong on the server. Tell the study's coordinator.", 500
        if request.headers.get("content-type", "").startswith("application/json"):
            return JSONResponse({"sentence": sentence}, status)
        return self._page("refused.html", status=status, sentence=sentence)

    async def _who(self, request: Request) -> tuple[Person | None, str]:
        session = request.cookies.get(web.COOKIE, "")
        person = await run_in_threadpool(access.session, self.database, session) if session else None
        return person, session

    async def _known(self, request: Request) -> tuple[Person, str]:
        person, session = await self._who(request)
        if person is None:
            raise Refused("You are not signed in. Open your personal link again, or ask for a new one.", 401)
        return person, session

    def _page(self, template: str, *, status: int = 200, **context: Any) -> Response:
        text = pages.render(template, self.study.protocol, **context)
        return HTMLResponse(text.encode("utf-8", errors="replace"), status)


def create_app(
    study: Study,
    database: Database,
    *,
    hosts: Sequence[str] = LOCAL,
    secure: bool = False,
    token: Token = new_token,
) -> ASGIApp:
    """The ASGI application. `hosts` are the names it answers to; `secure`: it is reached by https, so its cookie is too."""
    own = Application(study, database, secure=secure, token=token)
    routes = [
        Route("/", own.home),
        Route("/enter", own.enter, methods=["GET"]),
        Route("/enter", own.entered, methods=["POST"]),
        Route("/begin", own.begin, methods=["POST"]),
        Route("/leave", own.leave, methods=["POST"]),
        Route("/case", own.case),
        Route("/film/{position:int}/{number:int}", own.film),
        Route("/save", own.save, methods=["POST"]),
        Route("/undo", own.undo, methods=["POST"]),
        Route("/close", own.close, methods=["POST"]),
        Route("/static/{name}", own.static),
        Route("/favicon.ico", own.no_icon),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
    handlers: dict[Any, Any] = {Refused: own.refused, HTTPException: own.refused, Exception: own.refused}
    # Outside of everything, so that no answer goes without the headers, whoever gives it.
    return web.Headers(Starlette(routes=routes, middleware=middleware, exception_handlers=handlers))


def _change(sent: dict[str, Any]) -> votes.Change:
    kinds = {"position": int, "revision": int, "key": str, "active_ms": int}
    if any(type(sent.get(name)) is not kind for name, kind in kinds.items()):
        raise Refused("The request is not one that this page sends.", 400)
    return votes.Change(*(sent[name] for name in kinds), entry=sent.get("entry"))


def _to(path: str) -> RedirectResponse:
    return RedirectResponse(f"/{path}", 303)
