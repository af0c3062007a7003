"""The library: docs/library.md runs as it stands, what it shows is so, and mistakes are said before work is done."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny_medgemma import film, quick, shortened

import vlmalign
from vlmalign import api

ROWS = 6
MOST_LINES = 30  #: of an example, as the page's readers are promised


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(repository) -> str:
    return (repository / "docs" / "library.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names(page, repository, tmp_path_factory):
    """What the page's code has made, run in a folder with the films and the table that it speaks of."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "configs" / "models").mkdir(parents=True)
    shortened(repository / "configs/models/tiny-medgemma", folder / "configs/models/tiny-medgemma")
    for i, name in enumerate(["film", *(f"film{i}" for i in range(ROWS))]):
        film(folder / f"{name}.png", seed=i)
    rows = [f"film{i}.png,{'effusion' if i % 2 else 'fracture'},no finding|lesion" for i in range(ROWS)]
    (folder / "findings.csv").write_text("film,finding,others\n" + "\n".join(rows) + "\n")
    found = {"__name__": "library_page"}
    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in code_blocks(page):
            exec(compile(block, "docs/library.md", "exec"), found)
        yield found


def metrics(run: str) -> list[dict]:
    with open(f"runs/{run}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def flat(found: list[list[vlmalign.ContinuationScores]]) -> np.ndarray:
    return np.concatenate([scores.logp for own in found for scores in own])


def test_each_example_is_short(page):
    sizes = [sum(bool(line.strip()) for line in block.splitlines()) for block in code_blocks(page)]
    assert len(sizes) == 6
    assert max(sizes) < MOST_LINES


def test_the_page_names_all_that_is_public(page):
    assert set(vlmalign.__all__) == {*api.__all__, "__version__"}
    table = page[page.index("## All names") :]
    assert {name for name in api.__all__ if f"`{name}" not in table} == set()
    assert set(api.__all__) <= set(dir(vlmalign))
    with pytest.raises(AttributeError, match=r"no attribute 'loda'.*LoadedModel"):
        vlmalign.loda  # noqa: B018


def test_the_import_is_light():
    program = "import sys, vlmalign; print({'jax', 'numpy', 'transformers'} & {*sys.modules}, 'load' in dir(vlmalign))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() True"


def test_scores_have_an_entry_per_token(names):
    ((*scores,),) = names["model"].score([names["group"]])
    assert [len(one.logp) for one in scores] == [len(own) for own in names["group"].continuations]
    assert scores[0].total == pytest.approx(float(np.sum(scores[0].logp)), rel=1e-6)
    assert repr(names["model"]) == ("<LoadedModel configs/models/tiny-medgemma (gemma3, float32, adapter of rank 4)>")


def test_sampling_and_scoring_agree_and_blocks_are_watched(names):
    """A greedy answer, scored as a continuation, is the likeliest token at every place with the same log-probability."""
    model, seen = names["model"], []
    ((answer,),) = model.sample(
        [names["prompt"]], max_tokens=40, temperature=0, watch=lambda *found: seen.append(found)
    )
    ((scores,),) = model.score([model.group(names["question"], [answer])])
    assert scores.greedy.all()
    np.testing.assert_allclose(scores.logp, answer.logp, atol=1e-4)
    assert len(seen) == -(-len(answer.tokens) // 14) > 1, "40 tokens are three blocks of 14"
    for prompt, sample, tokens in seen:
        assert (prompt, sample) == (0, 0)
        assert np.array_equal(tokens, answer.tokens[: len(tokens)])
    assert len(seen[-1][2]) == len(answer.tokens)


def test_draws_follow_from_seed_and_place(names):
    model, prompt = names["model"], names["prompt"]

    def texts(seed: int) -> list[str]:
        return [answer.text for answer in model.sample([prompt], n=4, max_tokens=32, temperature=0.7, seed=seed)[0]]

    assert texts(1) == [answer.text for answer in names["answers"]]
    assert len(set(texts(1))) > 1
    assert texts(2) != texts(1)


def test_own_loss_and_source_learn(names):
    first, *_, last = metrics("choice")
    assert first["accuracy"] < 1
    assert last["accuracy"] == 1
    assert last["loss"] < 0.1 * first["loss"]
    right, *wrong = names["trained"].score([names["group"]])[0]
    assert all(right.total > other.total for other in wrong)


def test_training_leaves_the_model_as_it_was(names):
    """Its buffers are not given to the optimiser, and a new adapter is the base alone."""
    base = vlmalign.load("configs/models/tiny-medgemma", lora=vlmalign.LoraSpec(rank=4, alpha=8), dtype="float32")
    group = [names["group"]]
    assert np.array_equal(flat(names["model"].score(group)), flat(base.score(group)))


def test_what_is_saved_is_loaded_again(names):
    again = vlmalign.load("configs/models/tiny-medgemma", adapter="runs/choice-adapter", dtype="float32")
    group = [names["group"]]
    assert np.array_equal(flat(again.score(group)), flat(names["trained"].score(group)))
    with pytest.raises(ValueError, match="exclude each other"):
        vlmalign.load(
            "configs/models/tiny-medgemma", adapter="runs/choice-adapter", lora=vlmalign.LoraSpec(rank=2, alpha=2)
        )


def test_a_function_makes_groups_with_the_model_as_it_is(names):
    lines = metrics("reinforce")
    assert len(lines) == 2
    assert all(line["grad_norm"] > 0 for line in lines)
    changed = {
        name for name, value in names["tuned"].trained.items() if (value != names["trained"].trained[name]).any()
    }
    assert changed == set(names["trained"].trained)


def train_again(names, **changes):
    settings = {
        "folder": "runs/choice",
        "steps": 6,
        "batch": 4,
        "optimiser": vlmalign.OptimiserSettings(learning_rate=5e-3, schedule="constant"),
        "shapes": vlmalign.Shapes(rows=4, completion_multiple=16),
        "quiet": True,
    }
    examples = names["Findings"](names["model"], "findings.csv")
    return vlmalign.train(names["model"], names["choice"], changes.pop("examples", examples), **{**settings, **changes})


def test_a_finished_training_is_not_done_again(names):
    before = metrics("choice")
    again = train_again(names)
    assert metrics("choice") == before
    assert all((again.trained[name] == value).all() for name, value in names["trained"].trained.items())


def test_a_folder_of_another_training_is_refused(names, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(steps, seed; steps was 6 and is 7\)"):
        train_again(names, steps=7, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train_again(names, folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 7}, "at least as many examples, found 6"),
        ({"steps": 0}, "steps, batch and the number of examples must be >= 1, found 0, 4 and 6"),
        ({"examples": []}, "must be >= 1, found 6, 4 and 0"),
    ],
)
def test_mistakes_in_settings_leave_no_folder(names, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_again(names, folder=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_examples_that_are_no_groups_are_named(names, tmp_path):
    messages = names["question"]
    group, prompt = names["group"], names["prompt"]
    with pytest.raises(ValueError, match=r"examples\[0\] must be a group with answers.*found list"):
        train_again(names, folder=tmp_path / "one", examples=[messages] * 4)
    with pytest.raises(ValueError, match=r"examples\[0\] must be .*found a group without continuations"):
        train_again(names, folder=tmp_path / "one", examples=[prompt] * 4)
    assert not (tmp_path / "one").exists()
    with pytest.raises(ValueError, match="group 1 of update 0 must be a group"):
        train_again(names, folder=tmp_path / "three", examples=lambda step, policy: [group, None])
    with pytest.raises(ValueError, match="update 0 was given no groups"):
        train_again(names, folder=tmp_path / "three", examples=lambda step, policy: [], seed=3)


def test_one_weight_for_each_answer(names):
    group = names["model"].group(names["question"], ["effusion", names["answers"][0]], weights=[0.5, -2])
    assert [set(own.weight.tolist()) for own in group.continuations] == [{0.5}, {-2.0}]
    assert np.array_equal(group.continuations[1].tokens, names["answers"][0].tokens)
    with pytest.raises(ValueError, match="one number for each of the 2 answers, found 1"):
        names["model"].group(names["question"], ["a", "b"], weights=[1])


def test_earlier_answers_are_context(names):
    turns = [*vlmalign.question("And the heart?"), {"role": "assistant", "content": "normal"}]
    group = names["model"].group([*turns, *vlmalign.question("And the lungs?")], ["clear"])
    assert names["model"].chat.decode(group.continuations[0].tokens) == "clear"
    assert "normal" in names["model"].chat.decode(group.prompt.tokens)


@pytest.mark.full
def test_a_whole_decoder_with_its_start_as_the_reference(names, tmp_path):
    """Without an adapter; the first update is measured before anything has changed."""
    model = vlmalign.load("configs/models/tiny-medgemma", dtype="float32")

    def gap(scores, batch):
        weight = batch.weight.sum()
        return vlmalign.LossParts(
            sums={"choice": -(batch.weight * scores.logp).sum()},
            metrics={"moved": (abs(batch.weight * (scores.logp - scores.ref_logp)).sum(), weight)},
        )

    objective = vlmalign.Objective("gap", gap, names["count_groups"], needs_reference=True)
    trained = vlmalign.train(
        model,
        objective,
        [names["group"]],
        folder=tmp_path / "run",
        steps=2,
        batch=1,
        checkpoint_every=2,
        optimiser=vlmalign.OptimiserSettings(learning_rate=1e-3),
        shapes=vlmalign.Shapes(rows=1, completion_multiple=16),
        quiet=True,
    )
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["moved"] < 1e-5 < second["moved"]
    assert {name.split(".")[0] for name in trained.trained} == {"language_model"}
    trained.save(tmp_path / "whole")
    with pytest.raises(ValueError, match="nothing was trained"):
        model.save(tmp_path / "other")
    again = vlmalign.load(tmp_path / "whole", dtype="float32")
    for name, value in trained.trained.items():
        # The folder's tensors are bfloat16, as those of the checkpoint that it came from.
        assert np.array_equal(again.frozen[name], value.astype("bfloat16").astype("float32"))
