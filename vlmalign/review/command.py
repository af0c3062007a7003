"""`vlmalign review`: plan a reader study, check and serve it, invite its readers, export and analyse what they said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmalign.review.database import Database
    from vlmalign.review.material import Study

PORT = 8321


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    entries = parser.add_subparsers(title="what to do", dest="action", metavar="ACTION", required=True)

    def entry(name: str, words: str, act: Callable[[argparse.Namespace], None], study: bool = True):
        made = entries.add_parser(name, help=words, description=words, allow_abbrev=False)
        made.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if study:
            made.add_argument("study", metavar="STUDY.yaml", type=Path, help="the protocol")
        made.set_defaults(act=act)
        return made

    entry("check", "read the protocol and all it names; say what readers will see; write nothing", _check)
    made = entry("serve", "the web application for readers", _serve)
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    made.add_argument("--port", type=int, default=PORT, help=f"port to listen on ({PORT})")
    made.add_argument("--url", metavar="URL", help="address by which readers reach it, as the TLS proxy has it")
    made.add_argument("--plain-http", action="store_true", help="listen beyond this machine without TLS all the same")
    made = entry("invite", "personal links: each opens the study on one device, once", _invite)
    made.add_argument("people", metavar="NAME", nargs="*", help="readers or adjudicators (all who have no session yet)")
    made.add_argument(
        "--url", metavar="URL", default=f"http://127.0.0.1:{PORT}", help="address by which readers reach it"
    )
    entry("status", "how far everyone is; counts for a flow chart; the audit log checked", _status)
    made = entry("amend", "record a change of the protocol after the first vote, with its reason", _amend)
    made.add_argument("--reason", required=True, help="why, as a methods section would say it")
    made = entry("withdraw", "end a person's part in the study", _withdraw)
    made.add_argument("person", metavar="NAME")
    made.add_argument("--reason", required=True, help="why")
    made.add_argument(
        "--votes", choices=("keep", "leave-out"), required=True, help="whether exports still hold the votes"
    )
    made = entry("export", "votes, ratings, guesses, audit log and data dictionary as CSV and JSON", _export)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new, or empty")
    made = entry("analyse", "preferences, ratings and agreement with their intervals, as a page and as JSON", _analyse)
    made.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for analysis.html and analysis.json"
    )
    made.add_argument(
        "--scores", type=Path, metavar="FILE", help="results.json of the run, for accuracy against preference"
    )
    made.add_argument("--score", metavar="NAME", help="which score of it (accuracy where there is one, else the first)")
    made.add_argument("--draws", type=int, default=2000, help="resamplings of an interval (2000)")
    made = entry("plan", "cases and readers that a stated effect needs, by simulation", _plan, study=False)
    _plan_arguments(made)


def run(chosen: argparse.Namespace) -> None:
    """Do what was asked; ValueError for any mistake in it."""
    chosen.act(chosen)


def _study(chosen: argparse.Namespace) -> Study:
    from vlmalign.review.reading import load_study

    return load_study(chosen.study)


def _open(study: Study, *, create: bool = True) -> Database:
    from vlmalign.review.database import open_database

    return open_database(study.protocol.folder, create=create)


def _check(chosen: argparse.Namespace) -> None:
    from vlmalign.review.films import unreadable
    from vlmalign.review.flow import described

    study = _study(chosen)
    print("\n".join(described(study)), flush=True)
    if wrong := unreadable(study.material):
        raise ValueError(f"{len(wrong)} films cannot be shown:\n  " + "\n  ".join(wrong))


def _serve(chosen: argparse.Namespace) -> None:
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise ValueError('the web application needs starlette and uvicorn: pip install "vlmalign[review]"') from None
    from urllib.parse import urlsplit

    from vlmalign.review.application import LOCAL, create_app
    from vlmalign.review.freezing import register

    url = urlsplit(chosen.url) if chosen.url else None
    if url is not None and (url.scheme not in ("http", "https") or not url.hostname):
        raise ValueError(
            f"--url must be the address that readers open, such as https://study.example.org, found {chosen.url!r}"
        )
    if chosen.host not in LOCAL and not chosen.plain_http:
        raise ValueError(
            f"--host {chosen.host} would send records over the network without encryption; listen on 127.0.0.1 behind a proxy "
            "with TLS and give its address by --url, or add --plain-http if the network itself is safe"
        )
    study = _study(chosen)
    database = _open(study)
    try:
        register(database, study)
        hosts = [*LOCAL, chosen.host, *([url.hostname] if url and url.hostname else [])]
        app = create_app(study, database, hosts=hosts, secure=url is not None and url.scheme == "https")
        print(
            f"serving {study.protocol.title!r} on http://{chosen.host}:{chosen.port} (Ctrl-C ends it)", file=sys.stderr
        )
        uvicorn.run(app, host=chosen.host, port=chosen.port, access_log=False, server_header=False, log_level="warning")
    finally:
        database.close()


def _invite(chosen: argparse.Namespace) -> None:
    from vlmalign.review import access
    from vlmalign.review.freezing import register

    study = _study(chosen)
    database = _open(study)
    try:
        register(database, study)
        for name in chosen.people or access.without_session(database):
            print(f"{name}\t{chosen.url.rstrip('/')}/enter#{access.invite(database, name)}")
    finally:
        database.close()


def _status(chosen: argparse.Namespace) -> None:
    from vlmalign.review.flow import progress

    study = _study(chosen)
    database = _open(study, create=False)
    try:
        print("\n".join(progress(database, study)))
    finally:
        database.close()


def _amend(chosen: argparse.Namespace) -> None:
    from vlmalign.review.freezing import amend

    study = _study(chosen)
    database = _open(study, create=False)
    try:
        version, changes = amend(database, study, chosen.reason)
    finally:
        database.close()
    print(
        f"version {version.version} of the protocol, {version.hash}; changed: {', '.join(changes)}; start the server again"
    )


def _withdraw(chosen: argparse.Namespace) -> None:
    from vlmalign.review.access import withdraw

    database = _open(_study(chosen), create=False)
    try:
        withdraw(database, chosen.person, chosen.reason, keep_votes=chosen.votes == "keep")
    finally:
        database.close()
    print(f"{chosen.person} is withdrawn")


def _export(chosen: argparse.Namespace) -> None:
    from vlmalign.review.export import export

    study = _study(chosen)
    database = _open(study, create=False)
    try:
        written = export(database, study, chosen.out)
    finally:
        database.close()
    print("\n".join(str(path) for path in written))


def _analyse(chosen: argparse.Namespace) -> None:
    try:
        import krippendorff
        import statsmodels
    except ModuleNotFoundError:
        raise ValueError('the analysis needs statsmodels and krippendorff: pip install "vlmalign[review]"') from None
    del krippendorff, statsmodels
    from vlmalign.review.analysis.page import write_analysis
    from vlmalign.review.analysis.results import analyse

    if chosen.score and not chosen.scores:
        raise ValueError("--score names a score of the file that --scores gives; add --scores FILE")
    study = _study(chosen)
    database = _open(study, create=False)
    try:
        found = analyse(database, study, scores=chosen.scores, score=chosen.score, draws=chosen.draws)
    finally:
        database.close()
    print("\n".join(str(path) for path in write_analysis(found, study.protocol, chosen.out)))


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share", type=float, default=0.6, help="share of wins that one arm should have, ties as halves (0.6)"
    )
    parser.add_argument(
        "--agreement", type=float, default=0.3, help="Krippendorff's alpha of two readers' preferences (0.3)"
    )
    parser.add_argument("--ties", type=float, default=0.1, help="share of votes without a preference (0.1)")
    parser.add_argument(
        "--reader-spread",
        type=float,
        default=0.05,
        help="share of the latent variance that lies between readers (0.05)",
    )
    parser.add_argument(
        "--readers", type=int, nargs="+", default=[5, 10, 15], help="numbers of readers to try (5 10 15)"
    )
    parser.add_argument(
        "--cases", type=int, nargs="+", default=[20, 40, 80, 160], help="numbers of cases to try (20 40 80 160)"
    )
    parser.add_argument("--readers-per-case", type=int, help="readers who see each case (all)")
    parser.add_argument("--power", type=float, default=0.8, help="power that is wanted (0.8)")
    parser.add_argument("--draws", type=int, default=1000, help="simulated studies of each size (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also plan.json and the curve, plan.svg")


def _plan(chosen: argparse.Namespace) -> None:
    from vlmalign.review.plan import Assumed, planned, table, write_plan

    assumed = Assumed(chosen.share, chosen.agreement, chosen.ties, chosen.reader_spread)
    found = planned(
        assumed,
        chosen.readers,
        chosen.cases,
        per_case=chosen.readers_per_case,
        draws=chosen.draws,
        seed=chosen.seed,
    )
    print(table(assumed, found, chosen.power))
    if chosen.out is not None:
        print("\n".join(str(path) for path in write_plan(chosen.out, assumed, found, chosen.power)))
