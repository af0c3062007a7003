"""A label's probability by its first token: the right place whatever the tokenizer joins, and the model's own number there."""

import itertools
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_models import checkpoint, gemma3_text
from tiny_tokenizer import family_folder
from transformers import AutoModelForCausalLM

from vlmalign.data.chat.chat import open_chat
from vlmalign.evaluation.samples import FIRST_TOKEN, PROBABILITY, score_samples
from vlmalign.evaluation.scoring import text_segment
from vlmalign.models.model import Model
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.first_token import first_token_probabilities, place_of
from vlmalign.types import Group
from vlmalign.weights.checkpoint import load_config, load_params

LABELS = ("Edema", "Fracture", "Pleural Other", "Pleural Effusion")
ANSWER = "<think>Fluid.</think><solution>Fracture, Edema</solution>"


class Words(dict):
    """A tokenizer: pieces of text that a pattern finds -> ids, given as they are met."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = pattern

    def answer_ids(self, text: str) -> list[int]:
        return [self.setdefault(piece, len(self)) for piece in re.findall(self.pattern, text, re.DOTALL)]

    def text(self, ids) -> str:
        return "".join([*self][each] for each in ids)


@pytest.mark.parametrize(
    ("pattern", "answer", "lead", "first"),
    [
        (r"<|>|\w+|\s|[^\w\s]", ANSWER, "<solution>", ["Edema", "Fracture", "Pleural"]),
        (r">\w+|<|>|\w+|\s|[^\w\s]", ANSWER, "<solution", [">Edema", ">Fracture", ">Pleural"]),  # Qwen's joins the sign
        (r"\s?\w+|\s|[^\w\s]", ANSWER.replace("<solution>", "<solution> "), "<solution>", [" Edema", " Fracture", " Pleural"]),
        (r"\s?\w+|\s|[^\w\s]", ANSWER.replace("<solution>", "<solution>\n\n"), "<solution>\n", ["\nEdema", "\nFracture", "\nPleural"]),
        (r".", ANSWER, "<solution>", ["E", "F", "P"]),
    ],
)  # fmt: skip
def test_the_place_is_where_labels_begin(pattern, answer, lead, first):
    chat = Words(pattern)
    prompt = Group(7, text_segment(chat.answer_ids("Q")), (), ("film.png",))
    place = place_of(prompt, chat.answer_ids, answer, LABELS)
    assert chat.text(place.group.prompt.tokens) == "Q<think>Fluid.</think>" + lead
    assert [chat.text(each.tokens) for each in place.group.continuations] == first
    assert place.token == {"Edema": 0, "Fracture": 1, "Pleural Other": 2, "Pleural Effusion": 2}
    assert (place.group.id, place.group.images) == (7, ("film.png",))


@pytest.mark.parametrize("answer", ["Edema", "<solution>a</solution><solution>b</solution>", ""])
def test_an_answer_without_one_solution_has_no_place(answer):
    assert place_of(Group(0, text_segment([1]), (), ()), Words(".").answer_ids, answer, LABELS) is None


def test_a_label_that_begins_another_shares_its_token():
    place = place_of(Group(0, text_segment([1]), (), ()), Words(".").answer_ids, ANSWER, ("a", "ab"))
    assert [*place.token.values()] == [0, 0]


def test_probabilities_are_the_models_own(tmp_path):
    folder = checkpoint(tmp_path / "model", family_folder("gemma3"), gemma3_text())
    config = load_config(folder)
    model = Model(config)
    chat = open_chat(folder, family=config.family, image_tokens=None, vocab=config.decoder.vocab)
    prompts = [
        chat.prompt([{"role": "user", "content": text}], group_id=i) for i, text in enumerate(("Which?", "And now?"))
    ]
    texts = [[ANSWER, "nothing"], [ANSWER.replace("Fluid.", "Clear."), ANSWER]]
    told: list[int] = []
    found = first_token_probabilities(
        model,
        load_params(folder, model),
        prompts,
        texts,
        LABELS,
        answer_ids=chat.answer_ids,
        features=None,
        advance=told.append,
    )
    assert sum(told) == 3
    assert found[0][1] is None
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, own, probabilities in zip(prompts, texts, found, strict=True):
        for text, each in zip(own, probabilities, strict=True):
            if each is None:
                continue
            before = text[: text.index("<solution>") + len("<solution>")]
            lines = [chat.tokenizer(before + label, add_special_tokens=False)["input_ids"] for label in ("", *LABELS)]
            lead = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*lines, strict=False))]
            tokens = torch.tensor([[*prompt.prompt.tokens.tolist(), *lead]])
            with torch.no_grad():
                expected = torch.softmax(reference(tokens).logits[0, -1].double(), dim=-1).numpy()
            for label, line in zip(LABELS, lines[1:], strict=True):
                assert each[label] == pytest.approx(expected[line[len(lead)]], rel=1e-4)
    assert found[1][0] != found[1][1], "the reasoning counts"


def test_scores_take_the_probabilities_of_the_rows_where_they_are_asked_to():
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": str(i), "patient": str(i), "truth": [LABELS[i % 2]], "predicted": [], "valid": i > 0, "unknown": [],
            "probability": {label: float(rng.random() / 2 + (label == LABELS[i % 2]) * 0.2) for label in LABELS} if i else None,
        }
        for i in range(40)
    ]  # fmt: skip
    found = score_samples(rows, LABELS, draws=10, given=True)
    assert found["probability"] == FIRST_TOKEN != PROBABILITY == score_samples(rows, LABELS, draws=10)["probability"]
    for each in found["blocks"]["all"]["per_label"][:2]:
        truth = [each["label"] in row["truth"] for row in rows]
        probability = [(row["probability"] or {}).get(each["label"], 0.0) for row in rows]
        assert each["auroc"]["value"] == pytest.approx(roc_auc_score(truth, probability))


def test_it_is_refused_where_there_is_no_solution_block(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("""
run: runs/x
sources: {films: {kind: table, path: a.csv, image: file, labels: [a, b]}}
sets: {test: {from: films, role: test}}
tasks: {labels: {kind: labels, prompt: 'Which?', labels: [a, b], form: plain}}
stages: {base: {kind: model, path: m}}
answers: {all: {stages: [base], sets: [test], completion: 8, probability: first-token}}
""")
    with pytest.raises(
        ValueError, match=r"answers\.all\.probability: first-token is of label lists in a <solution> block"
    ):
        load_study(file)
    assert load_study(file, ["tasks.labels.form=solution"]).answers["all"].probability == "first-token"
