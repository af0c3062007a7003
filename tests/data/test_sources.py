"""Sources of films in a config: archives, invented ones, and the user's own table with any names of labels."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import Field

from vlmalign.config import Config, ConfigError, dump_config, load_config
from vlmalign.data.sources import examples
from vlmalign.data.sources.formats import SOURCES, AnySource
from vlmalign.data.sources.schema import CHEXPERT, NIH14


class Study(Config):
    sources: dict[str, AnySource] = Field(default_factory=dict)


def source(tmp_path, **settings):
    """As a study's YAML gives it."""
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"sources": {"films": settings}}))
    study = load_config(Study, path)
    assert load_config(Study, _written(tmp_path, study)) == study
    return study.sources["films"]


def _written(tmp_path, study):
    (tmp_path / "again.yaml").write_text(dump_config(study))
    return tmp_path / "again.yaml"


def refused(tmp_path, said, **settings):
    with pytest.raises(ConfigError, match=said):
        source(tmp_path, **settings)


def place(tmp_path):
    return lambda path: tmp_path / path.replace("{run}", "run")


# ---- archives -----------------------------------------------------------------------------------------------------

SPLITS = {"mimic-cxr-jpg": "train", "chexpert": "train", "nih-cxr14": "train_val", "nih-extract": None}


@pytest.mark.parametrize("kind", SPLITS)
def test_an_invented_archive_is_written_once_and_whole(tmp_path, kind):
    films = 10 if SPLITS[kind] is None else {SPLITS[kind]: 10}
    settings = {"kind": kind, "root": "{run}/films", "traces": "{run}/films/traces.jsonl"}
    config = source(tmp_path, **settings, phantom={"films": films, "seed": 3, "size": 16})
    with pytest.raises(FileNotFoundError, match="no folder"):
        config.open(place(tmp_path))  # looking at a source writes nothing
    with ThreadPoolExecutor() as pool:  # two studies with one root
        for writer in [pool.submit(config.invent, place(tmp_path)) for _ in range(2)]:
            writer.result()
    opened = config.open(place(tmp_path))
    assert len(opened) == 10
    assert all(example.meta["trace"] for example in opened)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["films"]
    assert all(path.is_file() for path in opened.files)
    assert opened.files[-1].name == "traces.jsonl"
    SOURCES[kind].write(tmp_path / "same", films=films, seed=3, size=16)
    again = source(tmp_path, kind=kind, root="same").open(place(tmp_path))
    assert [example.labels for example in again] == [example.labels for example in opened]
    assert "trace" not in again[0].meta
    changed = source(tmp_path, **settings, phantom={"films": 3, "seed": 4, "size": 16})
    changed.invent(place(tmp_path))
    assert len(changed.open(place(tmp_path))) == 10  # what is there is left as it is


def test_the_same_films_under_the_convention_of_another_institution(tmp_path):
    phantom = {"films": {"train": 40}, "seed": 3, "size": 16}
    own = source(tmp_path, kind="chexpert", root="own", phantom=phantom)
    other = source(tmp_path, kind="chexpert", root="other", phantom={**phantom, "convention": "mimic-like"})
    films = []
    for each in (own, other):
        each.invent(place(tmp_path))
        films.append(each.open(place(tmp_path)))
    assert [a.image.read_bytes() for a in films[0]] == [b.image.read_bytes() for b in films[1]]
    pairs = [(set(a.labels), set(b.labels)) for a, b in zip(*films, strict=True)]
    assert any("Lung Opacity" in a - b for a, b in pairs), "the parent is named by its own convention alone"
    refused(
        tmp_path, "mimic-like labels in chexpert", kind="nih-cxr14", root="x",
        phantom={"films": 3, "convention": "mimic-like"},
    )  # fmt: skip


def test_options_reach_the_reader(tmp_path):
    SOURCES["mimic-cxr-jpg"].write(tmp_path / "mimic", films={"train": 30, "test": 6}, seed=7, size=16)
    every = source(tmp_path, kind="mimic-cxr-jpg", root="mimic", split=None, views=["AP", "PA", "LATERAL", ""])
    some = source(
        tmp_path, kind="mimic-cxr-jpg", root="mimic", split="test", views=["PA"], uncertain="positive", bits=12
    )
    every, some = every.open(place(tmp_path)), some.open(place(tmp_path))
    assert len(every) > 36 > len(some) > 0
    assert {example.meta["view"] for example in some} == {"PA"}
    assert {example.meta["split"] for example in some} == {"test"}
    assert (every.bits, some.bits) == (16, 12)
    assert [path.name.split("-")[-1] for path in some.files] == ["metadata.csv.gz", "chexpert.csv.gz", "split.csv.gz"]


def test_labels_in_other_names(tmp_path):
    SOURCES["nih-extract"].write(tmp_path / "nih", films=60, seed=2, size=16)
    theirs = source(tmp_path, kind="nih-extract", root="nih").open(place(tmp_path))
    named = source(tmp_path, kind="nih-extract", root="nih", label_map="nih14-to-chexpert9").open(place(tmp_path))
    assert named.schema.name == "chexpert9"
    own = {"Mass": "Lump", "Nodule": "Lump", "No Finding": "Clear", "Hernia": None}
    ours = source(tmp_path, kind="nih-extract", root="nih", label_map=own).open(place(tmp_path))
    assert ours.schema.normal == "Clear"
    assert ours.schema.labels == tuple(
        {"Mass": "Lump", "No Finding": "Clear"}.get(label, label)
        for label in NIH14.labels
        if label not in ("Nodule", "Hernia")
    )
    for a, b in zip(theirs, ours, strict=True):
        assert set(b.labels) == {own.get(label, label) for label in a.labels} - {None}
    lumps = ours.label_matrix()[:, ours.schema.index("Lump")]
    either = theirs.label_matrix()[:, [NIH14.index("Mass"), NIH14.index("Nodule")]].any(axis=1)
    assert (lumps == either).all()
    assert either.any()


def test_what_needs_no_disk_is_refused_with_the_config(tmp_path):
    refused(
        tmp_path, r"sources\.films\.kind: expected one of .*'tabel'; the nearest is 'table'", kind="tabel", root="x"
    )
    refused(
        tmp_path, r"films\.split: expected 'train', .* found 'valid'", kind="mimic-cxr-jpg", root="x", split="valid"
    )
    refused(tmp_path, r"unknown key; the nearest known key is .*\.views", kind="nih-cxr14", root="x", view=["AP"])
    refused(tmp_path, r"root: required", kind="chexpert")
    refused(tmp_path, r"bits: .*less than or equal to 16", kind="chexpert", root="x", bits=17)
    refused(
        tmp_path,
        "no split 'validate'; its splits are train, valid, test",
        kind="chexpert",
        root="x",
        phantom={"films": {"validate": 3}},
    )
    refused(
        tmp_path, "it has no splits: give one number", kind="nih-extract", root="x", phantom={"films": {"train": 3}}
    )
    refused(tmp_path, "one of identity for chexpert labels", kind="chexpert", root="x", label_map="nih14-to-chexpert9")
    refused(
        tmp_path, r"unknown label 'Edemas' .*nearest known: Edema", kind="chexpert", root="x", label_map={"Edemas": "x"}
    )
    for kind in SOURCES:
        assert any(member is SOURCES[kind] for member in AnySource.__args__[0].__args__)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent for a chexpert archive"):
        source(tmp_path, kind="chexpert", root="absent").open(place(tmp_path))
    SOURCES["chexpert"].write(tmp_path / "chex", films=10, seed=0, size=16)
    for lines, said in (
        ('{"id": "other", "trace": "t"}', r"traces\.jsonl: none of its 1 ids is a film"),
        ('{"id": "a", "trace": "t"}\n{"id": "a", "trace": "u"}', 'line 2: the "id" of an earlier line again'),
        ('{"id": "a", "text": "t"}', 'line 1: expected {"id": text, "trace": text}'),
        ("{", r"line 1: not a line of JSON \(Expecting"),
    ):
        (tmp_path / "traces.jsonl").write_text(lines)
        with pytest.raises(ValueError, match=said):
            source(tmp_path, kind="chexpert", root="chex", traces="traces.jsonl").open(place(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file .*gone"):
        source(tmp_path, kind="chexpert", root="chex", traces="gone.jsonl").open(place(tmp_path))


# ---- a table and a folder -----------------------------------------------------------------------------------------

CSV = """film,who,side,set,Veil,Ring of light,note
a.png,7,AP,train,1,0,first
sub/b.png,7,PA,train,true,,second
c.jpg,8,AP,test,-1,1.0,third
"""
OWN = {"kind": "table", "path": "films.csv", "images": "scans", "image": "film", "labels": ["Veil", "Ring of light"]}


@pytest.fixture
def own(tmp_path):
    (tmp_path / "scans" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "c.jpg"):
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "scans" / name)
    (tmp_path / "films.csv").write_text(CSV)
    return tmp_path


def test_a_column_for_each_label(own):
    opened = source(own, **OWN, patient="who", view="side", split="set").open(place(own))
    assert opened.schema.labels == ("Veil", "Ring of light")
    assert opened.schema.normal is None
    assert opened.label_matrix().tolist() == [[True, False], [True, False], [False, True]]
    first, second, third = opened
    assert (first.id, first.patient, first.labels) == ("a.png", "7", ("Veil",))
    assert first.image == own / "scans" / "a.png"
    assert first.meta == {"note": "first", "view": "AP", "split": "train"}
    assert (second.id, second.patient) == ("sub/b.png", "7")
    assert (third.labels, third.meta["note"]) == (("Ring of light",), "third")
    assert opened.files == (own / "films.csv",)
    assert opened.notes == ()
    alone = source(own, **OWN).open(place(own))
    assert list(alone.patients()) == list(alone.ids()) == ["a.png", "sub/b.png", "c.jpg"]
    assert "no patient column" in alone.notes[0]
    uncertain = OWN | {"labels": {"columns": ["Ring of light", "Veil"], "uncertain": "positive", "normal": "Veil"}}
    opened = source(own, **uncertain, id="note").open(place(own))
    assert opened.label_matrix().tolist() == [[False, True], [False, True], [True, True]]
    assert opened.schema.normal == "Veil"
    assert list(opened.ids()) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("positive-only", "negative"),
        ("u-zeros", "negative"),
        ("u-ones", "positive"),
        ("u-ignore", "ignore"),
        ("ignore", "ignore"),
    ],
)
def test_policies_have_the_names_of_the_paper(own, written, means):
    labels = {"columns": ["Ring of light", "Veil"], "uncertain": written}
    config = source(own, **OWN | {"labels": labels})
    assert config.labels.uncertain == means
    opened = config.open(place(own))
    assert [row["id"] for row in opened.skipped] == (["c.jpg"] if means == "ignore" else [])
    assert len(opened) == 3 - len(opened.skipped)


def test_one_column_of_names(own):
    text = "film,seen\na.png,Veil | Ring\nsub/b.png,Plain\nc.jpg,\n"
    (own / "films.csv").write_text(text)
    one = OWN | {"labels": {"column": "seen", "separator": "|", "normal": "Plain"}}
    opened = source(own, **one).open(place(own))
    assert opened.schema.labels == ("Plain", "Ring", "Veil")
    assert opened.schema.normal == "Plain"
    assert [example.labels for example in opened] == [("Ring", "Veil"), ("Plain",), ()]
    listed = OWN | {"labels": {"column": "seen", "separator": "|", "names": ["Veil", "Ring", "Plain", "Never"]}}
    opened = source(own, **listed, label_map={"Veil": "Curtain"}).open(place(own))
    assert opened.schema.labels == ("Curtain", "Ring", "Plain", "Never")
    assert opened[0].labels == ("Curtain", "Ring")
    whole = source(own, **(OWN | {"labels": {"column": "seen"}})).open(place(own))
    assert whole.schema.labels == ("Plain", "Veil | Ring")
    for labels, said in (
        (
            {"column": "seen", "separator": "|", "names": ["Veil", "Plane"]},
            r"unknown label 'Ring' in .*csv, row 2, column 'seen'",
        ),
        (
            {"column": "seen", "separator": "|", "normal": "Plane"},
            r"unknown label 'Plane' in normal.*nearest known: Plain",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            source(own, **(OWN | {"labels": labels})).open(place(own))
    (own / "films.csv").write_text("film,seen\na.png,\n")
    with pytest.raises(ValueError, match="column 'seen': no row has a label"):
        source(own, **one).open(place(own))


@pytest.mark.parametrize("form", ["csv.gz", "parquet", "jsonl"])
def test_every_form_of_table_gives_the_same_films(own, form):
    expected = list(source(own, **OWN, patient="who", view="side").open(place(own)))
    frame = pd.read_csv(own / "films.csv", dtype={"Veil": str})
    path = own / f"films.{form}"
    if form == "csv.gz":
        path.write_bytes(gzip.compress(CSV.encode()))
    elif form == "parquet":
        frame.to_parquet(path)  # Ring of light: floats with a gap; who: integers
    else:
        path.write_text(
            "\n".join(json.dumps({k: v for k, v in row.items() if v == v}) for row in frame.to_dict("records"))
        )
    assert list(source(own, **(OWN | {"path": path.name}), patient="who", view="side").open(place(own))) == expected


def test_lists_of_names_and_images_inside_a_table(own):
    rows = [
        {"film": "a.png", "seen": ["Veil", "Ring"], "scan": {"bytes": b"x", "path": "a"}},
        {"film": "c.jpg", "seen": []},
    ]
    pd.DataFrame(rows).to_parquet(own / "films.parquet")
    config = OWN | {"path": "films.parquet", "labels": {"column": "seen"}}
    opened = source(own, **config).open(place(own))
    assert [example.labels for example in opened] == [("Ring", "Veil"), ()]
    assert opened[0].meta == {}
    with pytest.raises(ValueError, match=r"missing column 'scan' \(nearest found: seen\)"):
        source(own, **(config | {"image": "scan"})).open(place(own))


def test_rows_are_chosen_by_view_and_split(own):
    chosen = source(own, **OWN, view="side", views=["AP"], split="set", splits=["train"])
    assert list(chosen.open(place(own)).ids()) == ["a.png"]
    with pytest.raises(ValueError, match=r"films\.csv, column 'set': no row has 'valid'; found 'train', 'test'"):
        source(own, **OWN, split="set", splits=["valid"]).open(place(own))
    (own / "films.csv").write_text(CSV.replace(",-1,", ",-1?,"))  # in the last row, the second that is taken
    with pytest.raises(ValueError, match=r"films\.csv, row 4, column 'Veil': found '-1\?', expected"):
        source(own, **OWN, view="side", views=["AP"]).open(place(own))


def test_values_of_the_users_own(own):
    (own / "films.csv").write_text(CSV.replace(",1,0,", ",yes,no,"))
    with pytest.raises(ValueError, match=r"row 2, column 'Veil': found 'yes', expected 1, 0, -1, true, .* or blank"):
        source(own, **OWN).open(place(own))
    labels = {"columns": ["Veil", "Ring of light"], "values": {"yes": 1, "no": 0}}
    assert source(own, **(OWN | {"labels": labels})).open(place(own))[0].labels == ("Veil",)


def test_tables_that_do_not_fit(own):
    for change, said in (
        ({"image": "file"}, r"films\.csv: missing column 'file' \(nearest found: film"),
        ({"labels": ["Vail"]}, r"missing column 'Vail' \(nearest found: Veil"),
        ({"patient": "zzz"}, r"missing column 'zzz' \(found: film, who, side, set, Veil, Ring of light, note\)"),
        ({"id": "who"}, r"films\.csv, row 3 \(film 7\): the id is repeated, first found in row 2"),
        ({"suffix": ".gz"}, r"row 2 \(film a\.png\.gz\): no file .*a\.png\.gz"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            list(source(own, **(OWN | change)).open(place(own)))
    with pytest.raises(FileNotFoundError, match=r"no folder .*elsewhere for the images of"):
        source(own, **(OWN | {"images": "elsewhere"})).open(place(own))
    with pytest.raises(FileNotFoundError, match=r"no table .*gone\.csv"):
        source(own, **(OWN | {"path": "gone.csv"})).open(place(own))
    for text, said in (
        (CSV.replace("a.png", ""), r"row 2, column 'film': found nothing, expected text"),
        (CSV.replace("a.png", "../a.png"), r"row 2 .*leaves the data root"),
        (CSV.splitlines()[0] + "\n", r"films\.csv: no film is left"),
    ):
        (own / "films.csv").write_text(text)
        with pytest.raises(ValueError, match=said):
            source(own, **OWN).open(place(own))
    (own / "bad.parquet").write_bytes(b"PAR1")
    (own / "bad.jsonl").write_text('{"film": "a.png"}\n{"film"')
    (own / "bad.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-9])
    for name, said in (
        ("bad.parquet", "not a Parquet file that can be read"),
        ("bad.jsonl", r"bad\.jsonl, row 2: not a line of JSON"),
        ("bad.csv.gz", "cannot read table"),
    ):
        with pytest.raises(ValueError, match=said):
            source(own, **(OWN | {"path": name})).open(place(own))


def test_films_that_are_missing_or_outside_can_be_left_out(own):
    (own / "scans" / "a.png").unlink()
    (own / "secret.png").write_text("")
    (own / "scans" / "out.png").symlink_to(own / "secret.png")
    os.symlink("circle.png", own / "scans" / "circle.png")
    rows = "".join(f"{name},9,AP,train,1,0,x\n" for name in ("out.png", "circle.png", "n" * 300 + ".png"))
    (own / "films.csv").write_text(CSV + rows)
    opened = source(own, **OWN, on_bad="skip").open(place(own))
    assert list(opened.ids()) == ["sub/b.png", "c.jpg"]
    reasons = [row["reason"] for row in opened.skipped]
    for reason, said in zip(reasons, ("no file", "leads by a link", "circle", "too long"), strict=True):
        assert said in reason
    strict = source(own, **OWN).open(place(own))
    for i in (0, 3, 4, 5):
        with pytest.raises((ValueError, FileNotFoundError), match=r"films\.csv, row"):
            strict[i]
    for name in ("sub/b.png", "c.jpg"):
        (own / "scans" / name).unlink()
    with pytest.raises(ValueError, match=r"no film is left; 6 were skipped, the first: .*row 2"):
        source(own, **OWN, on_bad="skip").open(place(own))


def test_settings_of_a_table_that_do_not_fit_together(own):
    refused(own, r"films\.path: a table's name ends in \.csv, .*found 'films\.xlsx'", **(OWN | {"path": "films.xlsx"}))
    refused(own, "views needs to know in which column they stand: set view", **OWN, views=["AP"])
    refused(own, "splits needs to know in which column", **OWN, splits=["train"])
    refused(own, "lists a label twice", **(OWN | {"labels": ["Veil", "Veil"]}))
    refused(
        own, "no label 'Plain' to mean a normal film", **(OWN | {"labels": {"columns": ["Veil"], "normal": "Plain"}})
    )
    refused(own, "give either columns .* found both", **(OWN | {"labels": {"columns": ["Veil"], "column": "seen"}}))
    refused(own, "give either columns .* found neither", **(OWN | {"labels": {"normal": "Veil"}}))
    refused(own, "separator belongs to column", **(OWN | {"labels": {"columns": ["Veil"], "separator": ","}}))
    refused(own, "values belongs to columns", **(OWN | {"labels": {"column": "seen", "values": {"yes": 1}}}))
    refused(
        own,
        r"labels\.values\.yes: expected 1, 0 or -1",
        **(OWN | {"labels": {"columns": ["Veil"], "values": {"yes": 2}}}),
    )
    refused(own, "unknown label 'Rings'", **OWN, label_map={"Rings": "Halo"})
    refused(own, "or one of padchest-to-chexpert; found 'identity'", **OWN, label_map="identity")
    refused(own, "lists belongs to column", **(OWN | {"labels": {"columns": ["Veil"], "lists": True}}))
    refused(own, "need no separator", **(OWN | {"labels": {"column": "a", "lists": True, "separator": ","}}))
    refused(own, r"labels", **(OWN | {"labels": []}))


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_example_is_a_source(tmp_path, form):
    path = examples.write_table(tmp_path, films=60, seed=1, size=24, form=form)
    settings = {"kind": "table", "path": path.name, "images": "scans", "image": "file", "patient": "person"}
    labels = {"column": "findings", "separator": ";", "normal": examples.PLAIN}
    every = source(tmp_path, **settings, view="direction", labels=labels).open(place(tmp_path))
    assert len(every) == 60
    assert set(every.schema.labels) == {*examples.NAMES.values(), examples.PLAIN}
    assert not set(every.schema.labels) & {*CHEXPERT.labels, *NIH14.labels}
    assert every.label_matrix().sum(axis=0).min() >= 5
    parts = [
        source(tmp_path, **settings, labels=labels, split="part", splits=[part]).open(place(tmp_path)).patients()
        for part in ("train", "test")
    ]
    assert len(parts[0]) + len(parts[1]) == 60
    assert not set(parts[0]) & set(parts[1])
