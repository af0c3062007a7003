"""Label schemas, the maps between them, and the institutions' labelling conventions as a truth table."""

import numpy as np
import pytest

from vlmalign.data.phantoms.cases import Case, Finding
from vlmalign.data.phantoms.institutions import BASE, CHEXPERT_LIKE, INSTITUTIONS, MIMIC_LIKE, NIH_LIKE
from vlmalign.data.sources.schema import (
    CHEXPERT,
    CHEXPERT9,
    IDENTITY,
    LABEL_MAPS,
    NIH14,
    NIH_TO_CHEXPERT9,
    LabelSchema,
)


def test_schemas_hold_the_released_names_and_order():
    assert len(CHEXPERT) == 14
    assert CHEXPERT.labels[0] == "No Finding"
    assert CHEXPERT.labels[3:5] == ("Lung Opacity", "Lung Lesion")
    assert CHEXPERT.labels[-1] == "Support Devices"
    assert len(NIH14) == 15
    assert "Pleural_Thickening" in NIH14.labels
    assert set(CHEXPERT9.labels) == {
        "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Lung Lesion", "No Finding", "Pleural Other",
        "Pneumonia", "Pneumothorax",
    }  # fmt: skip
    assert set(CHEXPERT9.labels) < set(CHEXPERT.labels)


@pytest.mark.parametrize(
    ("truth", "mapped"),
    [
        (("No Finding",), ("No Finding",)),
        (("Mass",), ("Lung Lesion",)),
        (("Nodule", "Mass"), ("Lung Lesion",)),
        (("Pleural_Thickening", "Edema"), ("Edema", "Pleural Other")),
        (("Effusion",), ()),
        (("Infiltration", "Emphysema", "Fibrosis", "Hernia"), ()),
        (("Hernia", "Pneumonia"), ("Pneumonia",)),
        ((), ()),
    ],
)
def test_nih_truth_in_chexpert_names(truth, mapped):
    assert NIH_TO_CHEXPERT9.map_truth(truth) == mapped


def test_map_lists_what_it_drops_and_restricts_predictions():
    assert set(NIH_TO_CHEXPERT9.unmapped) == {"Effusion", "Infiltration", "Emphysema", "Fibrosis", "Hernia"}
    assert NIH_TO_CHEXPERT9.restrict(("Support Devices", "Edema", "No Finding")) == ("No Finding", "Edema")
    assert IDENTITY.restrict(CHEXPERT.labels) == CHEXPERT.labels == IDENTITY.map_truth(CHEXPERT.labels)
    assert IDENTITY.unmapped == ()
    assert set(LABEL_MAPS) == {"identity", "nih14-to-chexpert9"}


def test_unknown_labels_are_named_with_the_nearest_known():
    with pytest.raises(ValueError, match=r"'Pleural Thickening'.*Pleural_Thickening.*correct the spelling"):
        NIH_TO_CHEXPERT9.map_truth(["Pleural Thickening"])
    with pytest.raises(ValueError, match=r"'Pneumonya'.*Pneumonia"):
        NIH_TO_CHEXPERT9.restrict(["Pneumonya"])
    with pytest.raises(ValueError, match="twice"):
        LabelSchema("x", ("a", "a"), normal=None)
    with pytest.raises(ValueError, match="No Finding"):
        LabelSchema("x", ("a",))


def _case(*kinds, heart=0.45, mediastinum=0.22, size=0.1):
    findings = tuple(Finding(kind, "left", "middle", 0.4, 0.0, size, "line") for kind in kinds)
    return Case(heart, mediastinum, findings)


LO, EC, CM, NF, SD = (
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "No Finding",
    "Support Devices",
)


@pytest.mark.parametrize(
    ("case", "mimic", "chexpert", "nih", "base"),
    [
        (_case(), {NF}, {NF}, {NF}, {NF}),
        (_case("device"), {NF, SD}, {SD}, {NF}, {SD}),
        (_case("opacity"), {LO}, {LO}, {"Infiltration"}, {LO}),
        (_case("edema"), {"Edema"}, {"Edema", LO}, {"Edema"}, {"Edema"}),
        (_case("pneumonia"), {"Pneumonia"}, {"Pneumonia", LO}, {"Pneumonia"}, {"Pneumonia", LO}),
        (_case("atelectasis"), {"Atelectasis"}, {"Atelectasis", LO}, {"Atelectasis"}, {"Atelectasis"}),
        (_case("lesion", size=0.08), {"Lung Lesion"}, {"Lung Lesion", LO}, {"Nodule"}, {"Lung Lesion"}),
        (_case("lesion", size=0.15), {"Lung Lesion"}, {"Lung Lesion", LO}, {"Mass"}, {"Lung Lesion"}),
        (_case("effusion"), {"Pleural Effusion"}, {"Pleural Effusion"}, {"Effusion"}, {"Pleural Effusion"}),
        (_case("rind"), {"Pleural Other"}, {"Pleural Other"}, {"Pleural_Thickening"}, {"Pleural Other"}),
        (_case("fracture"), {"Fracture"}, {"Fracture"}, {NF}, {"Fracture"}),
        (_case("hernia"), {NF}, {NF}, {"Hernia"}, {NF}),
        (_case(heart=0.51), {NF}, {CM, EC}, {NF}, {NF}),
        (_case(heart=0.60), {CM}, {CM, EC}, {CM}, {CM}),
        (_case(mediastinum=0.4), {EC}, {EC}, {NF}, {EC}),
    ],
)
def test_one_case_four_conventions(case, mimic, chexpert, nih, base):
    places = (MIMIC_LIKE, CHEXPERT_LIKE, NIH_LIKE, BASE)
    assert [set(place.convention.positives(case)) for place in places] == [mimic, chexpert, nih, base]


def test_written_values_hold_doubt_and_silence_at_the_conventions_rates():
    rng = np.random.default_rng(0)
    rows = [MIMIC_LIKE.convention.labels(_case("edema"), rng) for _ in range(2000)]
    edema = [row["Edema"] for row in rows]
    assert set(edema) == {1.0, -1.0}
    assert edema.count(-1.0) / 2000 == pytest.approx(MIMIC_LIKE.convention.uncertain, abs=0.015)
    assert {row["Fracture"] for row in rows} == {0.0, None}
    assert {row["No Finding"] for row in rows} == {None}
    crisp = CHEXPERT_LIKE.convention.labels(_case("edema"), rng)
    assert list(crisp) == list(CHEXPERT.labels)
    assert {label for label, value in crisp.items() if value} == {"Edema", LO}
    assert set(INSTITUTIONS) == {"mimic-like", "chexpert-like", "nih-like", "base"}
