"""The `vlmalign` command: one line of COMMANDS a command, each a thin call of the room that does the work.

Exit codes: 0 done, 2 a mistake in what was asked (said in plain words), 85 told to end and saved (SIGTERM and the like),
130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmalign import __version__, distributed, doctor
from vlmalign.answering import command as answer_command
from vlmalign.evaluation import harness_command
from vlmalign.exporting import command as export_command
from vlmalign.host_memory import computes_on_cpu, keep_freed_memory
from vlmalign.inspection import command as inspect_command
from vlmalign.planning import command as plan_command
from vlmalign.reporting.visible_text import plain
from vlmalign.review import command as review_command
from vlmalign.sampling import command as sample_command
from vlmalign.stopping import STOPPED, Stopped
from vlmalign.teaching import command as traces_command


class Command(NamedTuple):
    name: str
    summary: str  #: one line, as `vlmalign --help` shows it
    arguments: Callable[[argparse.ArgumentParser], None]  #: declares the command's arguments
    run: Callable[[argparse.Namespace], None]  #: imports what it needs, so that --help stays instant


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="STUDY.yaml", help="YAML file of a study, such as configs/quickstart.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="a.b=c",
        nargs="+",
        action="extend",
        default=[],
        help="change settings of the file: --set seed=1 stages.sft.optimiser.learning_rate=1e-4",
    )
    parser.add_argument("--run", metavar="DIR", help="run folder; short for --set run=DIR")


def _training_arguments(parser: argparse.ArgumentParser) -> None:
    _study_arguments(parser)
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", action="extend", default=[],
        help="make only these artefacts and what they are made from (vlmalign status lists the names)",
    )  # fmt: skip
    parser.add_argument(
        "--redo", metavar="NAME", nargs="+", action="extend", default=[],
        help="set these artefacts aside, and all that was made from them, and make them again",
    )  # fmt: skip
    parser.add_argument(
        "--take-over", action="store_true",
        help="what other processes are at work on in this run folder is this one's, whether they have ended or not",
    )  # fmt: skip
    parser.add_argument(
        "--trust-code", action="store_true",
        help="run rewards' Python files also where they, or the study, lie in a run folder or a checkpoint",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--device", metavar="NAME", help="with --dry: hours on such devices, as `vlmalign plan` names them"
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="with --device: how many of them (1)")
    several = parser.add_argument_group(
        "several processes",
        "read from SLURM, Open MPI or Kubernetes, or set by scripts/launch_ssh.py, unless given here",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: this one alone")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument("--local-devices", metavar="0,1", help='devices of this host that it uses, or "all"')
    several.add_argument("--heartbeat", type=int, metavar="S", help="seconds of silence after which one is dead (30)")


def _begin(arguments: argparse.Namespace) -> None:
    """Get this process ready to train: its memory, and its place among several where flags or variables say so."""
    from vlmalign import stopping

    if computes_on_cpu():
        keep_freed_memory()
    distributed.start(
        distributed.Processes(
            arguments.coordinator,
            arguments.processes,
            arguments.process,
            arguments.local_devices,
            arguments.heartbeat,
        )
    )
    stopping.install()


def _run_folder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, finished or not")


def _run(arguments: argparse.Namespace) -> None:
    from vlmalign.planning.auto import settled
    from vlmalign.studies.engine.chain import load_study
    from vlmalign.studies.engine.run import Asked, run

    if arguments.device is not None and not arguments.dry:
        raise ValueError(
            "--device is for --dry: it says how long a study would take; a run takes the devices that are here"
        )
    _begin(arguments)
    config = load_study(arguments.config, _overrides(arguments))
    hours = {}
    if arguments.device is not None:
        from vlmalign.planning.study import hours as planned

        hours = planned(config, arguments.device, arguments.count)
    asked = Asked(
        tuple(arguments.only), tuple(arguments.redo), arguments.dry, hours, arguments.trust_code, arguments.take_over
    )
    run(config, Path(arguments.config), asked, settle=lambda config: settled(config, _say, keep=not arguments.dry))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _status(arguments: argparse.Namespace) -> None:
    from vlmalign.studies.engine.status import print_status

    print_status(arguments.run)


def _report(arguments: argparse.Namespace) -> None:
    from vlmalign.reporting.html import write_report

    print(f"report: {write_report(arguments.run)}")


def _preview_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a model")
    parser.add_argument(
        "messages", metavar="ROWS", type=Path, help="JSON Lines, Parquet or a saved folder, as a study reads it"
    )
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="folder that image paths start from (the file's own)"
    )
    parser.add_argument("--row", metavar="N", type=int, default=1, help="line of the file, the first is 1 (default)")
    parser.add_argument("--no-color", dest="color", action="store_false", help="mark labels by « and » alone")


def _preview(arguments: argparse.Namespace) -> None:
    from vlmalign.preview import preview

    preview(arguments.checkpoint, arguments.messages, row=arguments.row, color=arguments.color, images=arguments.images)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    # JSON quotes the folder's name, so that one such as `007` or `a: b` is not read as something else.
    chosen = [] if arguments.run is None else [f"run={json.dumps(arguments.run, ensure_ascii=False)}"]
    return [*arguments.overrides, *chosen]


COMMANDS = (
    Command("run", "make a study: data, training, answers, scores, report", _training_arguments, _run),
    Command("align", "the same; for studies that are a list of stages", _training_arguments, _run),
    Command("status", "what of a run is done, under way, waiting or stale", _run_folder_arguments, _status),
    Command("answer", "ask a model one question, about films or none", answer_command.arguments, answer_command.run),
    Command("preview", "show a conversation as it is trained on", _preview_arguments, _preview),
    Command("report", "write report.html and the completion pages of a run again", _run_folder_arguments, _report),
    Command(
        "inspect",
        "what a checkpoint or adapter folder holds; what is wrong",
        inspect_command.arguments,
        inspect_command.run,
    ),
    Command("export", "an adapter as a PEFT folder or a merged model", export_command.arguments, export_command.run),
    Command("sample", "draw balanced sets from any table of labels", sample_command.arguments, sample_command.run),
    Command("doctor", "can this machine run it, and what to do", doctor.arguments, doctor.run),
    Command("plan", "what a config needs and costs on GPUs not here", plan_command.arguments, plan_command.run),
    Command("review", "blinded reader studies of answers", review_command.arguments, review_command.run),
    Command(
        "traces", "reasoning traces from a teacher, and their review", traces_command.arguments, traces_command.run
    ),
    Command("lm-eval", "tasks of lm-evaluation-harness", harness_command.arguments, harness_command.run),
)

#: what the system says of a disk that takes no more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_EPILOG = """examples:
  vlmalign run configs/quickstart.yaml
  vlmalign run configs/quickstart.yaml --set seed=1 --run runs/seed1
  vlmalign status runs/seed1
  vlmalign report runs/seed1

A run that was interrupted continues when the same command is given again."""


def build_parser(commands: Sequence[Command] = COMMANDS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmalign",
        description="Align medical vision-language and text models with SFT, DPO and GRPO in JAX.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vlmalign {__version__}")
    entries = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in commands:
        entry = entries.add_parser(command.name, help=command.summary, description=command.summary, allow_abbrev=False)
        command.arguments(entry)
        entry.add_argument("--traceback", action="store_true", help="on an error, show where in the code it arose")
        entry.set_defaults(run_command=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `vlmalign` with these arguments (by default the process's own)."""
    arguments = build_parser().parse_args(argv)
    # Rows, answers and weights are for their owner; a study may open them to its group (`readable_by`).
    before = os.umask(0o077)
    try:
        return _run_command(arguments)
    finally:
        os.umask(before)


def _run_command(arguments: argparse.Namespace) -> int:
    try:
        arguments.run_command(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; a run goes on when the same command is given again", file=sys.stderr)
        return distributed.leave(130)
    except Stopped as stopped:
        print(
            f"vlmalign {arguments.command}: told to end by {stopped.by}: {stopped}; the same command goes on",
            file=sys.stderr,
        )
        return STOPPED
    except (
        ValueError,
        OSError,
    ) as error:  # how the package tells users of a mistake; anything else is a defect
        if arguments.traceback:
            raise
        # What a file's name or content made part of the message must not steer the terminal.
        print(f"vlmalign {arguments.command}: {plain(str(error))}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno in FULL:
            print("make room there; the same command goes on where this one ended", file=sys.stderr)
        print("(--traceback shows where in the code this arose)", file=sys.stderr)
        return distributed.leave(2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
