"""The tiny base models: they can be made again (same losses), what is kept are ordinary checkpoint folders, and each
answers its studies' tasks in a form that can be read.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlmalign.config_yaml import write_yaml
from vlmalign.data.chat.chat import open_chat
from vlmalign.data.films.pixels import open_pixels
from vlmalign.data.groups import collate
from vlmalign.data.sources.examples import write_table
from vlmalign.models.model import Model
from vlmalign.models.towers import arrange
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import run
from vlmalign.types import Grid, Layout
from vlmalign.weights.checkpoint import load_config, load_params

STEPS = 20
#: family of the script -> folder
KEPT = {
    "gemma3": "tiny-medgemma",
    "qwen2_5_vl": "tiny-qwen2_5-vl",
    "llama": "tiny-llama",
    "qwen2_5": "tiny-qwen2_5",
}
#: how the reference implementation is named
REFERENCE = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "qwen2_5": "Qwen2ForCausalLM",
}
each_family = pytest.mark.parametrize("family", KEPT)


@pytest.fixture
def folder(repository, family) -> Path:
    return repository / "configs" / "models" / KEPT[family]


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("make_tiny_base", repository / "scripts" / "make_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    # The worker process that draws films imports the module by its name.
    sys.modules["make_tiny_base"] = module
    sys.path.insert(0, str(repository / "scripts"))
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
@each_family
def test_first_steps_of_the_course_repeat(script, folder, family, tmp_path):
    """The losses of the first 20 steps are those recorded when the kept model was made (to 1 %: processors round
    differently), they fall, and the folder that is written is whole."""
    record = json.loads((folder / script.CURVE).read_text())
    losses = script.train(family, tmp_path, steps=STEPS, total=record["total"], seed=record["seed"])
    np.testing.assert_allclose(losses, record["losses"][:STEPS], rtol=0.01)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    kept = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == kept
    for name in kept - {"model.safetensors", script.CURVE}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@each_family
def test_kept_folder_is_small_and_complete(folder, family):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6
    model = Model(load_config(folder))
    params = load_params(folder, model)
    assert 0.9e6 <= sum(value.size for value in params.values()) <= 1.5e6
    assert {value.dtype.name for value in load_file(folder / "model.safetensors").values()} == {"bfloat16"}


@each_family
def test_kept_model_was_trained_to_the_end(folder, script, family):
    losses = json.loads((folder / script.CURVE).read_text())["losses"]
    assert len(losses) == script.TINY_BASES[family].steps
    assert np.mean(losses[-100:]) < 0.5 * np.mean(losses[100:200])


@each_family
def test_transformers_opens_the_kept_folder(folder, family):
    """The same logits as the reference implementation: of a question, for the vision-language models with a film."""
    torch = pytest.importorskip("torch")
    import transformers

    model = Model(load_config(folder))
    config, sees = model.config, model.config.vision is not None
    params = load_params(folder, model)
    chat = open_chat(folder, family=config.family, image_tokens=(lambda key: 16) if sees else None)
    parts = [{"type": "image", "image": "film"}, {"type": "text", "text": "Report."}]
    prompt = chat.prompt([{"role": "user", "content": parts if sees else "Report."}])
    grid = (lambda key: Grid(4, 4)) if sees else None
    layout = Layout(len(prompt.prompt), 0, 0)
    batch, _ = collate([prompt], layout, rows=1, grid=grid, position_axes=config.decoder.position_axes)
    tokens = torch.from_numpy(prompt.prompt.tokens[None].astype(np.int64))
    given = {"input_ids": tokens}
    if sees:
        film = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        picture = open_pixels(folder, family=config.family, image_tokens=16).finish(film)
        batch = batch._replace(pixels=arrange(config.vision, [picture]))
        shown = torch.from_numpy((prompt.prompt.image[None] >= 0).astype(np.int64))
        if family == "gemma3":
            given |= {"token_type_ids": shown, "pixel_values": torch.from_numpy(np.array(picture)[None])}
        else:
            sizes = torch.tensor([[1, picture.rows, picture.columns]])
            given |= {"mm_token_type_ids": shown, "pixel_values": torch.from_numpy(picture.values)}
            given |= {"image_grid_thw": sizes}
    hidden = jax.jit(model.hidden)(params, batch)
    found = np.asarray(hidden[0] @ model.head(params).T)

    kind = getattr(transformers, REFERENCE[family])
    reference = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(**given).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


# ------------------------------------------------------------------- what a base answers after thirty steps of its study

#: at most this many steps of SFT, on sixty rows
SFT = {
    "kind": "sft", "from": "base", "batch": 8, "optimiser": {"learning_rate": 5e-3, "warmup": 0.1, "beta2": 0.99},
}  # fmt: skip
LEAST_VALID = 0.2


def answered(run_folder: Path, entry: str, stage: str, which: str) -> list[dict]:
    path = run_folder / "answers" / entry / stage / which / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def clinic(rng: np.random.Generator) -> dict:
    """A record of a fertility clinic, as an instruct model is asked about it; the rule behind the strategy is invented."""
    age, sperm, carrier = int(rng.integers(22, 45)), int(rng.integers(1, 60)), bool(rng.random() < 0.25)
    strategy = "PGT-M" if carrier else "ICSI" if sperm < 15 else "IVF"
    told = f"Woman, {age} years. Sperm {sperm} million per ml. {'Both carry a disease gene.' if carrier else ''}"
    return {"record": told.strip(), "strategy": strategy, "protocol": "short" if age > 38 else "long"}


def exam(rng: np.random.Generator) -> dict:
    """A question with four options."""
    organs = [str(each) for each in rng.permutation(["heart", "liver", "kidney", "lung", "brain", "skin"])[:4]]
    asked = organs[rng.integers(4)]
    signs = {
        "heart": "a loud murmur", "liver": "yellow eyes", "kidney": "blood in the urine", "lung": "a dry cough",
        "brain": "a sudden headache", "skin": "a red rash",
    }  # fmt: skip
    question = f"A patient comes with {signs[asked]}. Which organ is ill?"
    return {"question": question, "options": organs, "answer": organs.index(asked)}


def request(rng: np.random.Generator) -> dict:
    """Advice under a constraint, with an answer that keeps it."""
    topic = str(rng.choice(["sleep", "food", "sport", "stress", "smoking"]))
    said = [f"Ask your doctor about {topic}.", f"Write down your {topic} each day.", "Come again in a month."]
    count = int(rng.integers(2, 4))
    if rng.random() < 0.5:
        asked, answer = f"Use {count} bullets.", "\n".join(f"- {sentence}" for sentence in said[:count])
        constraints = [{"kind": "bullets", "low": count, "high": count}]
    else:
        asked, answer = "Use at most 12 words.", said[0]
        constraints = [{"kind": "words", "high": 12}]
    return {"prompt": f"Give advice about {topic}. {asked}", "answer": answer, "constraints": constraints}


TEXT_TASKS = {
    "fields": (clinic, {
        "kind": "fields",
        "prompt": "{record}\n\nAnswer with one JSON object: {{\"strategy\": ..., \"protocol\": ...}}",
        "fields": {
            "strategy": {"kind": "single", "options": ["IVF", "ICSI", "PGT-M"]},
            "protocol": {"kind": "single", "options": ["short", "long"]},
        },
    }),
    "choice": (exam, {"kind": "choice"}),
    "instructions": (request, {"kind": "instructions", "prompt": "{prompt}"}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["llama", "qwen2_5"])
def test_text_bases_answer_records_options_and_constraints(folder, family, tmp_path):
    """Sampled at temperature 1: at least a fifth is valid, before SFT or after 30 steps; of answers under constraints,
    which any text is, at least a fifth keeps them."""
    study = {
        "run": str(tmp_path / "run"), "sources": {}, "sets": {}, "tasks": {},
        "stages": {"base": {"kind": "model", "path": str(folder), "lora": {"rank": 16, "alpha": 32}}}, "answers": {},
    }  # fmt: skip
    for name, (make, task) in TEXT_TASKS.items():
        rng = np.random.default_rng(5)
        for role, count in (("train", 60), ("test", 48)):
            path = tmp_path / f"{name}-{role}.jsonl"
            path.write_text("".join(json.dumps(make(rng) | {"id": f"{role}-{i}"}) + "\n" for i in range(count)))
            study["sources"][f"{name}-{role}"] = {"kind": "rows", "path": str(path)}
        study["sets"][name] = {"from": f"{name}-test", "role": "test"}
        study["sets"][f"{name}-train"] = {"from": f"{name}-train", "may_overlap": [name]}
        study["tasks"][name] = task
        shapes = {"rows": 8, "prompt_multiple": 96, "completion_multiple": 48}
        study["stages"][f"sft-{name}"] = {**SFT, "data": f"{name}-train", "task": name, "epochs": 4, "shapes": shapes}
        study["answers"][name] = {
            "stages": ["base", f"sft-{name}"], "sets": [name], "task": name, "completion": 48, "temperature": 1.0,
            "rows": 16, "prompt_multiple": 96, "draws": 20,
        }  # fmt: skip
    config = tmp_path / "study.yaml"
    config.write_text(write_yaml(study))
    done = run(load_study(config), config)
    shares = {}
    for name in TEXT_TASKS:
        for stage in ("base", f"sft-{name}"):
            found = answered(done, name, stage, name)
            good = [all(row["predicted"]) if name == "instructions" else row["valid"] for row in found]
            shares[name, stage] = np.mean(good)
    for name in TEXT_TASKS:
        assert max(shares[name, "base"], shares[name, f"sft-{name}"]) >= LEAST_VALID, shares


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_vision_language_base_answers_about_films(folder, family, repository, tmp_path):
    """By the documented config for own films, whose SFT is cut to 30 steps; sampled as ChexReason samples."""
    (tmp_path / "data").mkdir()
    table = write_table(tmp_path / "data", films=60, seed=1, size=64)
    overrides = [
        f"run={tmp_path / 'run'}", f"sources.mine.path={table}", f"sources.mine.images={table.parent / 'scans'}",
        f"stages.base.path={folder}", "stages.sft.epochs=6", "answers.test.stages=[base, sft]",
        "answers.test.temperature=0.8", "answers.test.top_p=0.95", "stages.sft.optimiser.learning_rate=8.0e-3",
        "stages.sft.shapes.prompt_multiple=32",
    ]  # fmt: skip
    path = repository / "configs" / "own_films.yaml"
    done = run(load_study(path, overrides), path)
    found = answered(done, "test", "sft", "held-out")
    assert np.mean([row["valid"] for row in found]) >= LEAST_VALID
    steps = (done / "stages" / "sft" / "metrics.jsonl").read_text().count("\n")
    assert steps <= 30
