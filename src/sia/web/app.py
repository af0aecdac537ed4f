"""The pages of the server: every address, and which template shows what."""

import asyncio
import hashlib
import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

import sia.pages
from sia.errors import SiaError
from sia.pages import CandidateFolder, Chosen, NotThere, RunReader, Runs, drawings
from sia.pages.candidate import LOG_PIECE, PAGE, tables
from sia.pages.links import ServerLinks
from sia.pages.render import environment
from sia.pages.run import RUNNING

RUNS_ON_A_PAGE = 100
MAX_COMPARED = 12
POLL_S = 0.4  # how often a running run is looked at
PING_S = 15.0  # a connection that says nothing for long is closed by what lies between
VIEWS = (
    "overview", "diff", "harness", "prompt", "trajectories", "calls", "logs", "update",
)  # fmt: skip
ASSETS = Path(sia.pages.__file__).with_name("assets")


def make_app(runs: Runs) -> FastAPI:
    """The application over a folder of runs."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/assets", StaticFiles(directory=ASSETS))
    links = ServerLinks()
    templates = environment(links)
    for name in templates.list_templates():
        templates.get_template(name)  # compiled now, so that nobody waits for it
    reading = threading.Lock()  # the read model is not for several threads at once

    def page(name: str, status: int = 200, /, **known: Any) -> HTMLResponse:
        return HTMLResponse(templates.get_template(name).render(known), status_code=status)

    def problem(status: int, title: str, message: str) -> HTMLResponse:
        return page("error.html", status, title=title, message=message)

    @app.exception_handler(NotThere)
    def not_there(request: Request, error: NotThere) -> Response:
        return problem(
            404, "Not there", f"There is nothing of that name here: {str(error) or 'no name given'}"
        )

    @app.exception_handler(HTTPException)
    def not_found(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, "Not there", "There is no page of that name.")

    @app.exception_handler(RequestValidationError)
    def not_valid(request: Request, error: RequestValidationError) -> Response:
        return problem(400, "Not an address of this server", str(error.errors()[0]["msg"]))

    @app.exception_handler(SiaError)
    def not_readable(request: Request, error: SiaError) -> Response:
        return problem(500, "Cannot be read", str(error))

    @app.get("/")
    def list_of_runs(
        task: str = "",
        status: str = "",
        meta: str = "",
        arm: str = "",
        text: Annotated[str, Query(max_length=200)] = "",
        order: str = "newest",
        run: Annotated[list[str], Query()] = [],  # noqa: B006  # read only
        page_number: Annotated[int, Query(alias="page", ge=1)] = 1,
    ) -> Response:
        chosen = Chosen(task=task, status=status, meta=meta, arm=arm, text=text, order=order)
        with reading:
            found = runs.lines(chosen)
            everything = runs.known()
        pages = max(1, math.ceil(len(found) / RUNS_ON_A_PAGE))
        number = min(page_number, pages)
        begin = RUNS_ON_A_PAGE * (number - 1)
        query = {name: value for name, value in asdict(chosen).items() if value}
        return page(
            "runs.html",
            chosen=chosen,
            ticked=run,
            choices={
                name: sorted({getattr(line, name) for line in everything} - {""})
                for name in ("task", "status", "meta", "arm")
            },
            lines=found[begin : begin + RUNS_ON_A_PAGE],
            found=len(found),
            total=len(everything),
            page=number,
            pages=pages,
            query=query,
            here=links.runs(page=str(number), **query),
            folder=str(runs.folder.root),
        )

    @app.get("/run/{key:path}")
    def one_run(key: str) -> Response:
        with reading:
            reader = runs.open(key)
            seen = _digest(reader)
            shown = reader.page()
        return page(
            "run.html",
            page=shown,
            events=f"/events/{quote(shown.key)}?seen={seen}",
            scores=drawings.scores(shown, links),
            seconds=drawings.seconds(shown),
            cost=drawings.cost(shown),
        )

    @app.get("/events/{key:path}")
    async def events(key: str, seen: str = "") -> Response:
        def look() -> tuple[str, bool]:
            with reading:
                reader = runs.open(key)
                return _digest(reader), reader.page().status == RUNNING

        await run_in_threadpool(look)  # a wrong name is an error, not a stream
        return StreamingResponse(_events(look, seen), media_type="text/event-stream")

    @app.get("/candidate/{candidate}/{key:path}")
    def one_candidate(
        candidate: str,
        key: str,
        view: str = "overview",
        name: str = "",
        file: str = "",
        text: Annotated[str, Query(max_length=200)] = "",
        which: str = "",
        scope: str = "",
        call: Annotated[int, Query(ge=0, le=10**9)] = 0,
        page_number: Annotated[int, Query(alias="page", ge=1, le=10**6)] = 1,
        start: Annotated[int | None, Query(ge=0, le=2**60)] = None,
    ) -> Response:
        if view not in VIEWS:
            raise NotThere(view)
        with reading:
            reader = runs.open(key)
            run = reader.page()
            folder = CandidateFolder(reader, candidate)
            known = _VIEWS[view](
                folder,
                reader,
                {
                    "name": name,
                    "file": file,
                    "text": text,
                    "which": which,
                    "scope": scope,
                    "call": call,
                    "number": page_number,
                    "start": start,
                },
            )
            ids = list(run.candidates)
        place = ids.index(candidate)
        one = folder.view
        return page(
            "candidate.html",
            page=run,
            one=one,
            parent=run.candidates.get(one.candidate.parent or ""),
            before=ids[place - 1] if place else "",
            after=ids[place + 1] if place + 1 < len(ids) else "",
            views=VIEWS,
            view=view,
            here=links.candidate(run.key, one.id),
            **known,
        )

    @app.get("/compare")
    def comparison(run: Annotated[list[str], Query(max_length=MAX_COMPARED)] = []) -> Response:  # noqa: B006  # read only
        from sia.pages.compare import compare  # loads numpy

        with reading:
            found = compare([runs.open(key) for key in dict.fromkeys(run)])
        return page("compare.html", runs=found, drawn=drawings.comparison(found))

    return app


def _overview(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    evaluation = reader.evaluation(folder.view.id)
    generation = folder.view.candidate.generation
    decisions = {one.index: one.decision for one in reader.page().generations}
    return {
        "notes": folder.notes(),
        "usage": folder.usage(),
        "evaluation": evaluation,
        "tables": tables(evaluation.breakdown) if evaluation else [],
        "decision": decisions.get(generation),
    }


def _diff(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    return {"files": folder.diff()}


def _harness(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    files = folder.harness_files()
    if not files:
        return {"files": files}
    entry = "target_agent.py"
    file = asked["file"] or (entry if entry in files else files[0])
    return {"files": files, "file": file, "piece": folder.harness_file(file)}


def _prompt(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    return {"prompts": folder.prompts()}


def _trajectories(
    folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]
) -> dict[str, Any]:
    known = {name: asked[name] for name in ("name", "text", "which", "number")}
    known["query"] = {name: asked[name] for name in ("text", "which")}
    if asked["name"]:
        return {**known, "talk": folder.trajectory(asked["name"])}
    found = folder.trajectories(text=asked["text"], which=asked["which"], page=asked["number"])
    pages = max(1, math.ceil(found.found / PAGE))
    scopes = {} if found.total else folder.scopes()
    return {**known, "talk": None, "found": found, "pages": pages, "scopes": scopes}


def _calls(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    scopes = folder.scopes()
    known: dict[str, Any] = {"scopes": scopes, "text": "", "talk": None, "number": asked["number"]}
    if not scopes:
        return known
    scope = asked["scope"] or next(reversed(scopes))
    if scope not in scopes:
        raise NotThere(scope)
    known |= {"scope": scope, "call": asked["call"], "query": {"scope": scope}}
    # A session is one conversation: its last call holds all of it. A target asks many questions.
    if asked["call"] or not scope.endswith("/target"):
        return {**known, "talk": folder.call(scope, asked["call"])}
    return {
        **known,
        "exchanges": folder.calls(scope, page=asked["number"]),
        "first": PAGE * (asked["number"] - 1),
        "pages": max(1, math.ceil(scopes[scope] / PAGE)),
    }


def _logs(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    logs = folder.logs()
    if not logs:
        return {"logs": logs}
    log = asked["name"] or next((name for name, size in logs.items() if size), next(iter(logs)))
    piece = folder.log(log, start=asked["start"])
    return {"logs": logs, "log": log, "piece": piece, "earlier": max(0, piece.start - LOG_PIECE)}


def _update(folder: CandidateFolder, reader: RunReader, asked: dict[str, Any]) -> dict[str, Any]:
    return {"curves": [(curve.name, drawings.curves(curve)) for curve in folder.curves()]}


_VIEWS: dict[str, Callable[[CandidateFolder, RunReader, dict[str, Any]], dict[str, Any]]] = {
    "overview": _overview,
    "diff": _diff,
    "harness": _harness,
    "prompt": _prompt,
    "trajectories": _trajectories,
    "calls": _calls,
    "logs": _logs,
    "update": _update,
}


async def _events(look: Callable[[], tuple[str, bool]], seen: str) -> AsyncIterator[str]:
    """Says `changed` whenever the run has, and `ended` when nobody works on it any more.

    A reader who comes back after a break is told at once if something was missed.
    """
    quiet_s = 0.0
    while True:
        now, running = await run_in_threadpool(look)
        if now != seen:
            seen, quiet_s = now, 0.0
            yield f"event: changed\ndata: {now}\n\n"
        if not running:
            yield "event: ended\ndata: \n\n"
            return
        if quiet_s >= PING_S:
            quiet_s = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(POLL_S)
        quiet_s += POLL_S


def _digest(reader: RunReader) -> str:
    return hashlib.sha256(repr(reader.version()).encode()).hexdigest()[:16]
