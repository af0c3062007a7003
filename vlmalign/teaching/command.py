"""`vlmalign traces`: traces from a teacher at an endpoint or from a model's own answers, and their expert review."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

#: the formats, and the texts that ask for them
INSTRUCTIONS = {
    "narrative": "configs/chexreason/teachers/narrative.txt",
    "reasoning-a": "configs/chexreason/teachers/reasoning_a.txt",
    "free": "configs/chexreason/teachers/free.txt",
}
_LICENCE = (
    "the films and true labels of --set go to {host}; films of MIMIC-CXR and other credentialed data may only go where "
    "their licence and your data use agreement allow it, which rules out most services of third parties"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    entries = parser.add_subparsers(title="what to do", dest="action", metavar="ACTION", required=True)

    def entry(name: str, words: str, act: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = entries.add_parser(name, help=words, description=words, allow_abbrev=False)
        made.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        made.set_defaults(act=act)
        return made

    _ask_arguments(entry("ask", "ask a teacher at an OpenAI-compatible endpoint; started again, it goes on", _ask))

    made = entry("from-answers", "traces from a model's own answers whose labels are the truth", _from_answers)
    made.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")
    for name, words in (
        ("entry", "name in the study's section answers"),
        ("stage", "what answered: a stage, or STAGE@last"),
        ("set_ref", "what was answered: a set, or SET.PART"),
    ):
        made.add_argument(name, metavar=name.upper().removesuffix("_REF"), help=words)
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON Lines of traces to write")
    made.add_argument("--format", choices=INSTRUCTIONS, help="keep only reasoning of this format")

    made = entry("review", "write a random sample as CSV for experts: accept, reject or correct", _review)
    made.add_argument("file", metavar="FILE", type=Path, help="JSON Lines of traces")
    made.add_argument("--out", type=Path, required=True, metavar="CSV", help="table to write; new")
    made.add_argument("--count", type=_count, default=100, metavar="N", help="traces to review (100)")
    made.add_argument("--seed", type=int, default=0, help="of the sample (0)")

    made = entry("import", "apply the experts' reviews to the traces", _import)
    made.add_argument("file", metavar="FILE", type=Path, help="JSON Lines of traces")
    made.add_argument("reviews", metavar="CSV", type=Path, help="the table, filled in")


def _ask_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("study", metavar="STUDY.yaml", type=Path, help="YAML file of a study whose sets have been drawn")
    made.add_argument("--run", metavar="DIR", help="run folder in which they were drawn (the study's)")
    made.add_argument(
        "--set", dest="sets", required=True, nargs="+", metavar="SET", help="sets of films: NAME or NAME.PART"
    )
    made.add_argument("--format", required=True, choices=(*INSTRUCTIONS, "only-label"), help="how traces are written")
    made.add_argument(
        "--endpoint", required=True, metavar="URL", help="address of the service, such as https://HOST/v1"
    )
    made.add_argument("--model", required=True, metavar="NAME", help="the teacher, as the service calls it")
    made.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON Lines of traces; one that is there goes on"
    )
    made.add_argument(
        "--data-may-leave", action="store_true", help="the data's licence allows them to go to the endpoint"
    )
    made.add_argument(
        "--key-variable", metavar="NAME", help="environment variable that holds the key; without, none is sent"
    )
    made.add_argument(
        "--plain-http", action="store_true", help="send films to another machine without TLS all the same"
    )
    made.add_argument("--concurrency", type=_count, default=4, metavar="N", help="films asked about at a time (4)")
    made.add_argument(
        "--asks", type=_count, default=3, metavar="N", help="answers that a film has to pass the checks (3)"
    )
    made.add_argument("--again", action="store_true", help="ask once more about films whose answers failed earlier")
    made.add_argument("--timeout", type=_count, default=120, metavar="S", help="seconds that a reply may take (120)")
    made.add_argument(
        "--side", type=_count, default=1024, metavar="PX", help="pixels of the longer side of what is sent (1024)"
    )
    made.add_argument(
        "--price-in", type=_price, default=0.0, metavar="X", help="price of a million tokens that are sent"
    )
    made.add_argument(
        "--price-out", type=_price, default=0.0, metavar="X", help="price of a million tokens that are written"
    )
    made.add_argument(
        "--instruction", type=Path, metavar="FILE", help="another text for the teacher; {findings}, {labels}"
    )
    made.add_argument("--body", metavar="JSON", help='further fields of each request, such as {"max_tokens": 2048}')


def run(chosen: argparse.Namespace) -> None:
    """Do what was asked; ValueError or OSError for any mistake in it."""
    chosen.act(chosen)


def _ask(chosen: argparse.Namespace) -> None:
    from vlmalign.progress import Progress
    from vlmalign.studies.engine.chain import load_study
    from vlmalign.teaching.asking import Settings, write
    from vlmalign.teaching.endpoint import Endpoint, Patience, read_body
    from vlmalign.teaching.films import films_of
    from vlmalign.teaching.teacher import Teacher, read_instruction
    from vlmalign.teaching.trace_file import failed_file

    if chosen.format == "only-label":
        raise ValueError("--format only-label needs no traces: its answers are the labels alone")
    endpoint = Endpoint(
        chosen.endpoint,
        chosen.model,
        key=_key(chosen.key_variable),
        body=read_body(chosen.body),
        patience=Patience(timeout=float(chosen.timeout)),
        plain_http=chosen.plain_http,
    )
    warning = _LICENCE.format(host=endpoint.host)
    if not chosen.data_may_leave:
        raise ValueError(f"nothing was sent: {warning}. If they may go there, add --data-may-leave")
    instruction = read_instruction(chosen.instruction or Path(INSTRUCTIONS[chosen.format]))
    study = load_study(chosen.study, [] if chosen.run is None else [f"run={json.dumps(chosen.run)}"])
    asked = films_of(study, chosen.sets)
    teacher = Teacher(instruction, chosen.format, asked.labels)
    settings = Settings(
        chosen.concurrency, chosen.asks, chosen.side, chosen.price_in, chosen.price_out, again=chosen.again
    )
    with Progress() as progress:
        progress.say(f"note: {warning}")
        state = write(chosen.out, asked, teacher, endpoint, chosen.model, settings, progress)
    tokens_in, tokens_out, price = state.cost(settings)
    there = sum(film.id in state.traces for film in asked.films)
    print(f"traces: {there} of {len(asked.films)} films, {state.written} of them now, in {chosen.out}")
    if state.failed:
        print(f"no trace: {len(state.failed)} films, in {failed_file(chosen.out)}; --again asks about them once more")
        for reason, count in state.reasons().most_common(8):
            print(f"  {count} x {reason}")
    priced = f", {price:.2f} at the prices given" if chosen.price_in or chosen.price_out else ""
    print(
        f"tokens on all starts: {tokens_in:,} in, {tokens_out:,} out{priced}; {endpoint.retries} requests were made again"
    )


def _from_answers(chosen: argparse.Namespace) -> None:
    from vlmalign.teaching.rejection import from_answers

    kept = from_answers(chosen.run_folder, chosen.entry, chosen.stage, chosen.set_ref, chosen.out, format=chosen.format)
    share = kept.right / kept.samples if kept.samples else 0.0
    print(f"answers with the true labels: {kept.right} of {kept.samples} ({share:.1%})")
    print(f"traces: {kept.traces} of {kept.films} films, in {chosen.out}")


def _review(chosen: argparse.Namespace) -> None:
    from vlmalign.teaching.reviews import export

    written = export(chosen.file, chosen.out, count=chosen.count, seed=chosen.seed)
    print(
        f"{written} traces to review in {chosen.out}; verdict: accept, reject, or correct with the text in correction"
    )


def _import(chosen: argparse.Namespace) -> None:
    from vlmalign.teaching.reviews import VERDICTS, apply
    from vlmalign.teaching.trace_file import rejected_file

    done = apply(chosen.file, chosen.reviews)
    print(", ".join(f"{name} {done.counts[name]}" for name in VERDICTS) + f", without a verdict {done.counts['open']}")
    print(f"{done.left} traces are left in {chosen.file}; rejected ones are in {rejected_file(chosen.file)}")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise ValueError(f"--key-variable {variable}: expected the key in this environment variable, found nothing")
    return key


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a price of at least 0, found {text!r}")
    return price
