"""Label lists are read as models write them: a truth table, names that hold separators, and linear time."""

import doctest
import random

import pytest

from vlmalign.data.sources.schema import SCHEMAS
from vlmalign.tasks import label_list, spelling
from vlmalign.tasks.label_list import label_index, read_label_list

E, F, P, N, T = LABELS = ("Edema", "Fracture", "Pleural Effusion", "No Finding", "Pleural_Thickening")
SYNONYMS = (("Pleural Effusion", ("effusion", "fluid at the base, either side")), ("Edema", ("oedema",)))

# (list as written, labels read, unknown names); duplicates have a table of their own
TABLE = [
    # plain lists
    ("", [], []),
    (" \n ,; ", [], []),
    ("Edema", [E], []),
    ("Edema, Fracture", [E, F], []),
    ("Fracture,Edema", [E, F], []),
    ("Edema; Fracture", [E, F], []),
    ("Edema\nFracture", [E, F], []),
    ("Edema;Pleural Effusion\r\nNo Finding,", [E, P, N], []),
    ("  eDEMA  ", [E], []),
    ("pleural \t EFFUSION", [P], []),
    ("Edema, Flu", [E], ["Flu"]),
    ("Flu, Edema, Cold, Flu", [E], ["Flu", "Cold", "Flu"]),
    ("Flu", [], ["Flu"]),
    # the end of a sentence
    ("Edema.", [E], []),
    ("Edema, Fracture.", [E, F], []),
    ("Edema. Fracture.", [E, F], []),
    ("Edema!", [E], []),
    ("Edema...", [E], []),
    ("Edema, Fracture。", [E, F], []),
    # bullets
    ("- Edema", [E], []),
    ("- Edema\n- Fracture", [E, F], []),
    ("-Edema\n-Fracture", [E, F], []),
    ("* Edema\n* Fracture", [E, F], []),
    ("• Edema\n• Fracture", [E, F], []),
    ("+ Edema\n+ Fracture", [E, F], []),
    ("– Edema\n— Fracture", [E, F], []),
    ("\u2022\u00a0Edema", [E], []),
    ("- [x] Edema\n- [ ] Fracture", [E], ["[ ] Fracture"]),
    ("☑ Edema\n☐ Fracture", [E], ["☐ Fracture"]),
    # numbers and letters
    ("1. Edema", [E], []),
    ("1. Edema\n2. Fracture", [E, F], []),
    ("1) Edema; 2) Fracture", [E, F], []),
    ("(1) Edema (2) Fracture", [E, F], []),
    ("1. Edema 2. Fracture 3. Flu", [E, F], ["Flu"]),
    ("1.\nEdema", [E], []),
    ("a) Edema\nb) Fracture", [E, F], []),
    ("① Edema ② Fracture", [], ["Edema ② Fracture"]),
    ("10.Edema", [E], []),
    # emphasis, quotes, code
    ("**Edema**, **Fracture**", [E, F], []),
    ("*Edema*", [E], []),
    ("_Edema_, __Fracture__", [E, F], []),
    ("- **Edema.**", [E], []),
    ("`Edema`", [E], []),
    ('"Edema", "Fracture"', [E, F], []),
    ("'Edema'", [E], []),
    ("“Edema”, «Fracture»", [E, F], []),
    ("```\nEdema\n```", [E], []),
    ("~~Edema~~", [], ["~~Edema~~"]),
    # JSON
    ('["Edema", "Fracture"]', [E, F], []),
    ("['Edema', 'Fracture']", [E, F], []),
    ('```json\n["Edema",\n "Fracture"]\n```', [E, F], []),
    ('{"labels": ["Edema", "Fracture"]}', [E, F], []),
    ("[]", [], []),
    ("[Edema; Fracture]", [E, F], []),
    # joined
    ("Edema and Fracture", [E, F], []),
    ("Edema, Fracture, and Pleural Effusion.", [E, F, P], []),
    ("Edema, Fracture and Pleural Effusion.", [E, F, P], []),
    ("Edema & Fracture", [E, F], []),
    ("Edema/Fracture", [E, F], []),
    ("Edema|Fracture", [E, F], []),
    ("Edema + Fracture", [E, F], []),
    ("Edema and flu", [E], ["flu"]),
    ("redness and swelling", [], ["redness and swelling"]),
    # full width and other scripts
    ("Edema，Fracture", [E, F], []),
    ("Edema、Fracture；No Finding", [E, F, N], []),
    ("Ｅｄｅｍａ，Ｆｒａｃｔｕｒｅ", [E, F], []),
    ("Edema和Fracture", [E, F], []),
    ("答案：Edema", [E], []),
    # invisible characters
    ("Ed\u200bema", [E], []),
    ("\ufeffEdema\u200e, Frac\u00adture", [E, F], []),
    ("Pleural\u00a0Effusion", [P], []),
    ("Edema\u2028Fracture", [E, F], []),
    ("Edema\x00", [E], []),
    # the schema's underscores
    ("Pleural_Thickening", [T], []),
    ("pleural thickening", [T], []),
    ("Pleural_Effusion", [P], []),
    # headings
    ("Labels: Edema, Fracture", [E, F], []),
    ("**Labels:** Edema", [E], []),
    ("Final answer:\n- Edema", [E], []),
    ("The labels are Edema and Fracture.", [E, F], []),
    ("Absent: Edema", [], ["Absent: Edema"]),
    # synonyms
    ("oedema, Effusion", [E, P], []),
    ("Fluid at the base, either side; Edema", [E, P], []),
    # nothing
    ("none", [], []),
    ("None.", [], []),
    ("N/A", [], []),
    ("none, Edema", [E], ["none"]),
    ("No Finding.", [N], []),
    # never searched for, never guessed
    ("No Edema", [], ["No Edema"]),
    ("no edema and fracture", [], ["no edema and fracture"]),
    ("Edema and fracture are absent", [], ["Edema and fracture are absent"]),
    ("No fracture. Edema.", [E], ["No fracture"]),
    ("Edema?", [], ["Edema?"]),
    ("Edema (mild)", [], ["Edema (mild)"]),
    ("Edema: absent", [], ["Edema: absent"]),
    ("Edemas", [], ["Edemas"]),
    ("Pleural\nEffusion", [P], ["Pleural"]),
    ("The film shows edema", [], ["The film shows edema"]),
]


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(label_list).failed == 0
    assert doctest.testmod(spelling).failed == 0


def test_the_table_has_at_least_eighty_rows():
    assert len({text for text, _, _ in TABLE}) == len(TABLE) >= 80


@pytest.mark.parametrize(("text", "labels", "unknown"), TABLE)
def test_a_list_as_it_is_written(text, labels, unknown):
    found = read_label_list(text, LABELS, SYNONYMS)
    assert (list(found.labels), list(found.unknown), found.duplicates) == (labels, unknown, 0)


@pytest.mark.parametrize(
    ("text", "duplicates"),
    [("Edema, edema\nEDEMA", 2), ("- Edema\n- oedema.", 1), ("Edema and Edema, Fracture", 1), ("flu, flu", 0)],
)
def test_a_label_named_twice_is_counted(text, duplicates):
    assert read_label_list(text, LABELS, SYNONYMS).duplicates == duplicates


ODD = (
    "Fluid, left",
    "Fluid",
    "Consolidation and Collapse",
    "Collapse",
    "2 vessel disease",
    "3",
    "Enl. Heart",
    "Fracture (acute)",
    "T1/T2 change",
    "HLA-B*27",
    "水肿",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fluid, left, Fluid", ["Fluid, left", "Fluid"]),
        ("- **Fluid, left**\n- Collapse", ["Fluid, left", "Collapse"]),
        ("Fluid; Collapse", ["Fluid", "Collapse"]),
        ("Collapse and Consolidation and Collapse", ["Consolidation and Collapse", "Collapse"]),
        ("1. 2 vessel disease 2. 3", ["2 vessel disease", "3"]),
        ("3, Fluid", ["Fluid", "3"]),
        ("Enl. Heart. Fluid.", ["Fluid", "Enl. Heart"]),
        ("Fracture (acute).", ["Fracture (acute)"]),
        ("T1/T2 change and Collapse", ["Collapse", "T1/T2 change"]),
        ("HLA-B*27", ["HLA-B*27"]),
        ("水肿、Fluid，left。", ["Fluid, left", "水肿"]),
    ],
)
def test_names_that_hold_separators_words_and_numbers(text, expected):
    found = read_label_list(text, ODD)
    assert (list(found.labels), found.unknown) == (expected, ())


@pytest.mark.parametrize("labels", [ODD, *(schema.labels for schema in SCHEMAS.values())])
@pytest.mark.parametrize("style", ["{}, ", "{};", "- {}\n", "{}. ", '"{}", ', "**{}**\n", "{} and "])
def test_every_set_of_labels_is_read_back_in_every_style(labels, style):
    draw = random.Random(0)
    for _ in range(40):
        chosen = draw.sample(labels, draw.randint(0, len(labels)))
        if style in ("{}. ", "{} and "):  # there the comma of a name splits the phrase, and "3." numbers what follows
            chosen = [label for label in chosen if "," not in label and label != "3"]
        text = "".join(style.format(label) for label in chosen).removesuffix(" and ")
        found = read_label_list(text, labels)
        assert set(found.labels) == set(chosen)
        assert (found.unknown, found.duplicates) == ((), 0)


@pytest.mark.parametrize(
    ("labels", "synonyms", "message"),
    [
        ((), (), "at least one name, found none"),
        ((E, " "), (), "a name in one line with letters or digits, found ' '"),
        ((E, "**"), (), r"found '\*\*'; rename it"),
        (("Edema\nleft",), (), "in one line"),
        ((E, "EDEMA"), (), "found 'Edema' and 'EDEMA'; drop one"),
        (("No Finding", "No  Finding"), (), "found 'No Finding' and 'No  Finding'"),
        (("No Finding", "No_Finding"), (), "case, spacing and underscores"),
        (("A, B", "A", "B"), (), "'A, B' cannot be told from a list of other labels"),
        (("A, B", "C, A", "B, D"), (), "'A, B' cannot be told"),
        ((E,), (("Flu", ("cold",)),), "synonyms must be of labels of the schema .*, found 'Flu'"),
        ((E, F), ((E, ("x", "Fracture")),), "found 'Fracture' and 'Fracture'; drop one"),
        ((E, F), ((E, ("x",)), (F, ("X",))), "found 'x' and 'X'; drop one"),
    ],
)
def test_names_that_could_not_be_read_back_are_refused(labels, synonyms, message):
    with pytest.raises(ValueError, match=message):
        label_index(labels, synonyms)


@pytest.mark.parametrize(
    "text",
    [
        "Edema,x;" * 25_000,
        "".join(f"name {i}, " for i in range(2_000)),
        "Edema and " * 5_000,
        "flu and " * 5_000,
        "no. " * 5_000,
        "Edema. 1. " * 3_000,
        " " * 100_000 + "x" + " " * 100_000,
        "*" * 200_000 + "x" + "*" * 200_000,
        "-" * 200_000,
        "[(" * 100_000,
        "e" + "\u0323\u0301" * 100_000,
        "（" * 100_000 + "ａ",
        "labels: " * 20_000,
        "Fluid, " * 5_000,
        "Fluid" + "|Fluid" * 5_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_long_answers_take_linear_time(text, cpu_seconds):
    # a few tenths of a second
    assert cpu_seconds(lambda: read_label_list(text, ODD)) < 3
