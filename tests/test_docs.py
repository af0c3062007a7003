"""The documentation says what is so: its links lead somewhere, its studies load, its commands are understood."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from vlmalign.cli import build_parser
from vlmalign.studies.engine.chain import load_study

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OWN_FILMS = REPOSITORY / "configs" / "own_films.yaml"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The fragments by which the headings of a page are linked to."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def studies() -> list[pytest.param]:
    """The YAML blocks that are whole studies."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"```yaml\n(.*?)```", text_of(page), re.DOTALL)
        whole = [block for block in blocks if re.search(r"^run:", block, re.MULTILINE)]
        found += [pytest.param(block, id=f"{page.name} {number}") for number, block in enumerate(whole)]
    return found


def commands() -> list[str]:
    """The lines of the pages that call `vlmalign`, without prompt and comment."""
    lines = [line for page in PAGES for line in text_of(page).splitlines()]
    return sorted({line.strip() for line in lines if re.match(r"    vlmalign \S", line)})


def test_the_readme_is_short():
    assert len(text_of(REPOSITORY / "README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not re.match(r"\w+:", target) and (not file.exists() or (anchor and anchor not in anchors(file))):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("block", studies())
def test_studies_on_the_pages_load(block, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(block, encoding="utf-8")
    assert load_study(file).stages


@pytest.mark.parametrize("line", commands())
def test_commands_on_the_pages_are_understood(line):
    assert build_parser().parse_args(shlex.split(line, comments=True)[1:]).command


def test_the_page_of_rewards_shows_what_they_give(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    table = importlib.import_module("reward_table")
    page = text_of(table.PAGE)
    assert table.page_with(page) == page, "run: python scripts/reward_table.py"


@pytest.mark.parametrize("page", [page for page in PAGES if "\n>>> " in text_of(page)], ids=lambda page: page.name)
def test_examples_on_the_pages_give_what_they_show(page):
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried > 0
    assert not failed


def test_the_page_shows_the_study_of_own_films_as_it_is():
    study = OWN_FILMS.read_text(encoding="utf-8")
    assert len(study.splitlines()) <= 40
    assert f"```yaml\n{study}```" in text_of(REPOSITORY / "docs" / "studies.md")
