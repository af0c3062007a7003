"""The tiny base model: it can be made again (same losses), and what is kept is an ordinary checkpoint folder."""

from __future__ import annotations

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlmalign.data.chat.chat import open_chat
from vlmalign.data.groups import collate
from vlmalign.models.model import Model
from vlmalign.types import Grid, Layout
from vlmalign.weights.checkpoint import load_config, load_params

STEPS = 20


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "configs" / "models" / "tiny-medgemma"


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("make_tiny_base", repository / "scripts" / "make_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    # The worker process that draws films imports the module by its name.
    sys.modules["make_tiny_base"] = module
    sys.path.insert(0, str(repository / "scripts"))
    spec.loader.exec_module(module)
    return module


def test_first_steps_of_the_course_repeat(script, folder, tmp_path):
    """The losses of the first 20 steps are those recorded when the kept model was made (to 1 %: processors round
    differently), they fall, and the folder that is written is whole."""
    record = json.loads((folder / script.CURVE).read_text())
    losses = script.train(tmp_path, steps=STEPS, total=record["total"], seed=record["seed"])
    np.testing.assert_allclose(losses, record["losses"][:STEPS], rtol=0.01)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    kept = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == kept
    for name in kept - {"model.safetensors", script.CURVE}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_kept_folder_is_small_and_complete(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6e6
    model = Model(load_config(folder))
    params = load_params(folder, model)
    assert 1e6 <= sum(value.size for value in params.values()) <= 2e6
    assert {value.dtype.name for value in load_file(folder / "model.safetensors").values()} == {"bfloat16"}


def test_kept_model_was_trained_to_the_end(folder, script):
    losses = json.loads((folder / script.CURVE).read_text())["losses"]
    assert len(losses) == script.STEPS
    assert np.mean(losses[-100:]) < 0.5 * np.mean(losses[100:200])


def test_transformers_opens_the_kept_folder(folder):
    """The same logits as the reference implementation, on a film and its question."""
    torch = pytest.importorskip("torch")
    from transformers import Gemma3ForConditionalGeneration

    model = Model(load_config(folder))
    params = load_params(folder, model)
    chat = open_chat(folder, family="gemma3", image_tokens=lambda key: model.config.vision.tokens)
    question = [{"role": "user", "content": [{"type": "image", "image": "film"}, {"type": "text", "text": "Report."}]}]
    prompt = chat.prompt(question)
    length = len(prompt.prompt)
    batch, _ = collate([prompt], Layout(length, 0, 0), rows=1, grid=lambda key: Grid(1, model.config.vision.tokens))
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    hidden = jax.jit(model.hidden)(params, batch._replace(pixels=pixels))
    found = np.asarray(hidden[0] @ model.head(params).T)

    reference = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = (
            reference.eval()(
                input_ids=torch.from_numpy(prompt.prompt.tokens[None].astype(np.int64)),
                token_type_ids=torch.from_numpy((prompt.prompt.image[None] >= 0).astype(np.int64)),
                pixel_values=torch.from_numpy(pixels),
            )
            .logits[0]
            .numpy()
        )
    assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
