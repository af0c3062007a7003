"""The page of documentation says what is so: its protocol loads, its tables name every key, its pictures are small."""

import re

import pytest

from vlmalign.review import protocol
from vlmalign.review.database import SCHEMA
from vlmalign.review.protocol import load_protocol


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "reader_studies.md").read_text(encoding="utf-8")


def test_the_protocol_on_the_page_loads(page, tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "study.yaml").write_text(block)
    assert len(load_protocol(tmp_path / "study.yaml").arms) == 3


@pytest.mark.parametrize(
    "section", [protocol.Protocol, protocol.Design, protocol.Rendering, protocol.Form, protocol.Cases]
)
def test_every_key_is_on_the_page(page, section):
    assert [name for name in section.model_fields if f"`{name}`" not in page] == []


def test_every_table_of_the_record_is_on_the_page(page):
    tables = set(re.findall(r"CREATE TABLE (\w+)", SCHEMA))
    listed = page.split("## What is stored")[1].split("##")[0]
    assert tables == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", listed, re.MULTILINE))))


def test_pictures_are_small(page, repository):
    pictures = re.findall(r"!\[[^\]]+\]\((images/[\w.]+)\)", page)
    assert len(pictures) == 2
    assert all((repository / "docs" / name).stat().st_size < 150_000 for name in pictures)
