"""The command line: help that reads well, plain words for users' mistakes, the documented exit codes."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vlmalign import __version__, cli
from vlmalign.config import Config, load_config


class SmallConfig(Config):
    run: Path = Path("runs/small")
    steps: int = 3


@pytest.fixture
def study(monkeypatch):
    """Studies of another config in place of the real ones: `study.action` is called with it, and with what was asked."""
    chain, room, auto = (
        ModuleType(f"vlmalign.{name}") for name in ("studies.engine.chain", "studies.engine.run", "planning.auto")
    )
    seen = SimpleNamespace(configs=[], asked=[], action=lambda config: None)

    def run(config, source, asked, *, settle):
        assert settle(config) is config
        seen.configs.append(config)
        seen.asked.append(asked)
        seen.action(config)

    chain.load_study = lambda path, overrides: load_config(SmallConfig, path, overrides)
    room.run, room.Asked = run, namedtuple("Asked", ["only", "redo", "dry", "hours", "trust_code", "take_over"])
    auto.settled = lambda config, say, keep: config
    for module in (chain, room, auto):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("steps: 4\n")
    return str(path)


def test_study_gets_the_typed_config_with_overrides_and_run_folder(study, config_file):
    assert cli.main(["run", config_file]) == 0
    assert cli.main(["run", config_file, "--set", "steps=5", "run=x", "--set", "steps=6", "--run", "007"]) == 0
    assert study.configs == [SmallConfig(steps=4), SmallConfig(steps=6, run=Path("007"))]


def test_what_is_asked_for_is_passed_on(study, config_file):
    assert cli.main(["run", config_file, "--only", "sft", "scores", "--redo", "grpo", "--dry"]) == 0
    assert study.asked == [(("sft", "scores"), ("grpo",), True, {}, False, False)]
    assert cli.main(["run", config_file, "--trust-code", "--take-over"]) == 0
    assert study.asked[1:] == [((), (), False, {}, True, True)]


def test_config_mistakes_are_said_in_plain_words(study, config_file, capsys):
    assert cli.main(["run", config_file, "--set", "stepz=1", "--run", "r"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"vlmalign run: {config_file}: 1 problem",
        "  stepz: unknown key; the nearest known key is steps",
        "(--traceback shows where in the code this arose)",
    ]
    assert study.configs == []


@pytest.mark.parametrize("error", [ValueError("labels.csv has no column 'Edema'"), FileNotFoundError("no films.csv")])
def test_errors_for_users_have_no_traceback_unless_asked(study, config_file, capsys, error):
    def action(config):
        raise error

    study.action = action
    assert cli.main(["run", config_file]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vlmalign run: {error}\n")
    assert "Traceback" not in said
    with pytest.raises(type(error)):
        cli.main(["run", config_file, "--traceback"])


def test_defects_are_not_hidden(study, config_file):
    def action(config):
        raise AssertionError("an invariant")

    study.action = action
    with pytest.raises(AssertionError, match="an invariant"):
        cli.main(["run", config_file])


def test_interrupt_exits_130(study, config_file, capsys):
    def action(config):
        raise KeyboardInterrupt

    study.action = action
    assert cli.main(["run", config_file]) == 130
    assert "goes on when the same command is given again" in capsys.readouterr().err


def test_report_writes_the_report_of_a_run_folder(monkeypatch, tmp_path, capsys):
    room = ModuleType("vlmalign.reporting.html")
    asked = []
    room.write_report = lambda run: asked.append(run) or run / "report.html"
    monkeypatch.setitem(sys.modules, room.__name__, room)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert asked == [tmp_path]
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command.name, "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert command.summary in " ".join(said.split())
    assert len(command.summary) <= 60, "one line of --help"


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["statsu"])
    assert left.value.code == 2
    assert "status" in capsys.readouterr().err


def test_help_and_version_are_instant_and_need_no_library():
    program = (
        "import sys\n"
        "from vlmalign.cli import main\n"
        "try: main([sys.argv[1]])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "heavy = {'jax', 'flax', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for option, expected in (("--help", "commands:"), ("--version", f"vlmalign {__version__}")):
        done = subprocess.run(
            [sys.executable, "-c", program, option],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
