"""What a trace may say: forms, leaks and labels, each by a truth table; and the texts that ask for traces."""

import re
from pathlib import Path

import pytest

from vlmalign.data.phantoms.institutions import MIMIC_LIKE
from vlmalign.data.phantoms.synthetic import plan_studies, truth_row
from vlmalign.data.phantoms.traces import reason
from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.tasks.mentions import claimed, label_faults, named
from vlmalign.teaching.command import INSTRUCTIONS
from vlmalign.teaching.films import Film
from vlmalign.teaching.forms import FORMS, form_faults
from vlmalign.teaching.leaks import LEAKS, leaks
from vlmalign.teaching.teacher import Teacher, read_instruction

LEAKING = [
    "The heart is wide, as the labels state.",
    "Given the findings, the opacity must be a pneumonia.",
    "This agrees with the ground truth.",
    "The ground-truth diagnosis is edema.",
    "Based on the provided labels I conclude that there is an effusion.",
    "As stated, there is a pneumothorax.",
    "As instructed, I describe the film as if unaided.",
    "I was told that the film shows a fracture.",
    "We know from the annotation that a nodule is present.",
    "The report states that the heart is enlarged.",
    "You have told me that the findings are edema and effusion.",
    "The known findings are cardiomegaly and edema.",
    "The film is known to show consolidation.",
    "According to the instructions I name no other finding.",
    "To match the given diagnosis, the left base must be dense.",
    "The labels provided are consistent with this.",
    "These findings were given beforehand.",
    "The correct answer is pneumonia.",
    "Here is the revised narrative: the lungs are clear.",
    "My previous answer mentioned a label.",
    "I'm sorry, but I cannot interpret medical images.",
    "As an AI I can only describe the film.",
    "The information provided suggests heart failure.",
    "The prompt says that devices are present.",
    "In line with the listed findings, the pleura is thick.",
    "This training text shows a wide heart.",
    "Per report, the catheter ends in the atrium.",
    "The expected findings are all present.",
    "The diagnosis is already known.",
    "As requested, the reading follows in twelve steps.",
]  # fmt: skip

CLEAN = [
    "The heart is wide for the chest, so I call cardiomegaly.",
    "Taken together these findings point to heart failure.",
    "These findings are consistent with pulmonary edema.",
    "Given the blunted angle, an effusion is present.",
    "Given the findings in the left base, I look at the pleura again.",
    "As noted above, the mediastinum is wide.",
    "The catheter ends in the superior vena cava, as expected after placement.",
    "Both lungs are well expanded; the technique is adequate.",
    "The known landmark of the carina is displaced.",
    "A sharp line without lung markings beyond it decides: pneumothorax.",
    "The stated side marker is on the left.",
    "There is no report of trauma visible on the film; a rib shows a step.",
    "I first check the devices, then the airways.",
    "The last rib is cut off at the edge.",
    "The earlier film is not at hand, so the age of the fracture stays open.",
    "It is difficult to know whether the density is old.",
    "The patient was asked to hold the breath, and the inspiration is deep.",
    "Provided that the film is upright, the level of fluid is real.",
    "The true size of the heart is overestimated in this projection.",
    "The answer lies in the pleura: a meniscus.",
    "The correct position of the tube is confirmed by the carina.",
    "The findings listed so far spare the right lung.",
    "As told by the wide vessels, the pressure is high.",
    "A reference line drawn across the chest shows a ratio above one half.",
    "The tracheal tube is in place as required for ventilation.",
    "The lungs are clear and the vessels are sharp, so nothing is found.",
    "What decides is the dense block in the right lower zone.",
    "The instrument over the chest is a monitoring lead.",
    "I conclude that the opacity is atelectasis.",
    "According to the position of the diaphragm the left lobe has lost volume.",
]  # fmt: skip

#: what the net catches though it is innocent: the price of a table of phrases
TOO_STRICT = {
    "The tracheal tube is in place as required for ventilation.",
    "As told by the wide vessels, the pressure is high.",
}


@pytest.mark.parametrize("text", LEAKING)
def test_a_leak_is_found(text):
    assert leaks(text) != []


@pytest.mark.parametrize("text", [text for text in CLEAN if text not in TOO_STRICT])
def test_an_honest_reading_passes(text):
    assert leaks(text) == []


def test_the_net_is_known_to_be_too_strict_here_and_every_kind_of_leak_is_tried():
    assert all(leaks(text) for text in TOO_STRICT)
    assert {kind for text in LEAKING for kind in leaks(text)} == set(LEAKS)


CLAIMS = [
    ("There is a left pleural effusion.", {"Pleural Effusion"}),
    ("There is no pleural effusion.", set()),
    ("No pneumothorax, effusion or edema is seen.", set()),
    ("The lungs are free of consolidation.", set()),
    ("Without consolidation; atelectasis at the base.", {"Atelectasis"}),
    ("No pneumothorax, but a fracture of the sixth rib.", {"Fracture"}),
    ("No pneumothorax, there is pulmonary oedema.", {"Edema"}),
    ("Pneumothorax is absent.", set()),
    ("Consolidation and edema are not seen.", set()),
    ("A fracture is not visible.", set()),
    ("Edema is unlikely.", set()),
    ("10. Pleura: no effusion, pleural thickening absent.", set()),
    ("10. Pleura: none blunted, pleural effusion on the left.", {"Pleural Effusion"}),
    ("Pneumothorax: none.", set()),
    ("Fracture: no.", set()),
    ("I look for a pneumothorax.", set()),
    ("This argues against pneumonia.", set()),
    ("Atelectasis rather than pneumonia.", {"Atelectasis"}),
    ("Pneumonia cannot be excluded.", {"Pneumonia"}),
    ("There may be a small pneumothorax.", {"Pneumothorax"}),
    ("Cardiomegaly without pleural effusion.", {"Cardiomegaly"}),
    ("Not only edema, also a consolidation.", {"Edema", "Consolidation"}),
    ("The heart is clearly enlarged.", {"Cardiomegaly"}),
    ("The heart isn't wide; no cardiomegaly.", set()),
    ("The heart is not enlarged. The mediastinum is not wide.", set()),
    ("The cardiomediastinal contour is not widened.", set()),
    ("The mediastinum is widened.", {"Enlarged Cardiomediastinum"}),
    ("Enlarged cardiomediastinum.", {"Enlarged Cardiomediastinum"}),
    ("A chest tube and a pacemaker.", {"Support Devices"}),
    ("No support devices.", set()),
    ("A hazy opacity in the left base.", set()),  # evidence of many labels
    ("Lung opacity in the left base.", {"Lung Opacity"}),
    ("**Pneumonia** in the right lower zone.", {"Pneumonia"}),
    ("No finding.", {"No Finding"}),
    ("No Finding, and a support device.", {"No Finding", "Support Devices"}),
    ("This is a normal film.", {"No Finding"}),
    ("No finding of the bones is of note.", set()),
    ("The film is not a normal film.", set()),
    ("No change in the edema.", {"Edema"}),
    ("Neither edema nor consolidation.", set()),
    ("The angle is 3.5 cm wide. No fracture. Edema of both lungs.", {"Edema"}),
    ("No pneumothorax is seen, and there is a pleural effusion on the right.", {"Pleural Effusion"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "present"), CLAIMS)
def test_labels_that_a_text_claims(text, present):
    assert set(claimed(text, CHEXPERT.labels)) == present


def test_every_label_is_claimed_by_its_own_name_and_denied_with_it():
    for label in CHEXPERT.labels:
        said = label.lower()
        assert claimed(f"On the left there is {said}.", CHEXPERT.labels) == (label,)
        if label != "No Finding":
            assert claimed(f"On the left there is no {said}.", CHEXPERT.labels) == ()
    assert claimed("Pleural_Thickening, a round shadow.", ["Pleural_Thickening", "round shadow"]) != ()


def test_traces_of_invented_films_are_read_as_their_labels():
    """Sentences that were not written for these rules, with findings named, denied and left out."""
    for number, study in enumerate(plan_studies({"": 300}, MIMIC_LIKE, CHEXPERT, seed=5, laterals=False)):
        row = truth_row(str(number), study, MIMIC_LIKE)
        text = " ".join(reason(row))
        assert label_faults(text, row["labels"], CHEXPERT.labels) == []
        assert leaks(text) == []
        for label in set(row["labels"]) - {"No Finding"}:
            others = [each for each in row["labels"] if each != label]
            assert f"claims {label}" in label_faults(text, others, CHEXPERT.labels)


def test_wider_words_name_a_true_label_and_claim_no_other():
    assert named("A round nodule.", CHEXPERT.labels) == ("Lung Lesion",)
    assert label_faults("A round nodule.", ["Lung Lesion"], CHEXPERT.labels) == []
    assert label_faults("Edema with hazy opacities.", ["Edema"], CHEXPERT.labels) == []
    assert label_faults("Edema. No fracture.", ["Edema", "Fracture"], CHEXPERT.labels) == [
        "does not name Fracture as present"
    ]
    assert label_faults("Edema and pneumonia.", ["Edema"], CHEXPERT.labels) == ["claims Pneumonia"]
    assert label_faults("Nothing is seen.", [], CHEXPERT.labels) == []


STEPS = "\n".join(f"{n}. Region: what is seen here is described in some eight words." for n in range(1, 13))


@pytest.mark.parametrize(
    ("format", "text", "fault"),
    [
        ("reasoning-a", STEPS, None),
        ("reasoning-a", STEPS.replace("7. Region", "Region"), "expected lines numbered 1 to 12"),
        ("reasoning-a", STEPS.replace("2. Region", "13. Region"), "expected lines numbered 1 to 12"),
        ("reasoning-a", STEPS + "\n12. Once more: this step is here a second time.", "expected lines numbered 1 to 12"),
        ("reasoning-a", "I begin.\n" + STEPS, "text before step 1"),
        ("reasoning-a", STEPS.split("\n", 1)[0].split(".")[0] + ".\n" + STEPS.split("\n", 1)[1], "no text in step 1"),
        ("free", "A wide heart decides. " * 5, None),
        ("free", "A wide heart decides. " * 2, "expected 15 to 200 words, found 8"),
        ("free", "A wide heart decides. " * 51, "expected 15 to 200 words, found 204"),
        ("free", "<think>" + "A wide heart decides. " * 5 + "</think>", "holds a tag"),
        ("free", "A ratio < 0.5 and > 0.3 is narrow. " * 5, None),
        ("free", "- A wide heart decides.\n" * 5, "holds a list"),
        ("narrative", "The film is upright. " * 20, None),
        ("narrative", "# Reading\n" + "The film is upright. " * 20, "holds a list or a heading"),
        ("narrative", "```\n" + "The film is upright. " * 20, "code fence"),
    ],
)  # fmt: skip
def test_forms(format, text, fault):
    found = form_faults(text, FORMS[format])
    assert found == [] if fault is None else fault in "; ".join(found)


@pytest.mark.parametrize("format", FORMS)
def test_the_instructions_ask_for_what_is_checked(format):
    text = read_instruction(Path(__file__).parents[2] / INSTRUCTIONS[format])
    low, high = map(int, re.search(r"(\d+) to (\d+) words", text).groups())
    form = FORMS[format]
    assert form.least <= low < high <= form.most
    assert len(re.findall(r"^\d+\. \w", text, re.MULTILINE)) == form.steps
    teacher = Teacher(text, format, CHEXPERT.labels)
    asked = teacher.question(Film("id-7", "/films/7.jpg", ("Edema", "Fracture"), "", 16), "data:")[0]["content"][1][
        "text"
    ]
    assert "exactly this: Edema, Fracture." in asked
    assert ", ".join(CHEXPERT.labels) in asked
    assert not {"id-7", "/films/7.jpg"} & set(asked.split())
    none = teacher.question(Film("id", "f", (), "", 16), "data:")[0]["content"][1]["text"]
    assert "exactly this: none of the listed findings." in none


def test_there_is_an_instruction_for_every_format():
    assert set(INSTRUCTIONS) == set(FORMS)
