"""`vlmalign answer`: the answer as it is decoded, nothing that steers the terminal, mistakes before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_medgemma import film, quick, shortened
from tiny_tokenizer import family_folder

import vlmalign
from vlmalign import cli
from vlmalign.answering import command
from vlmalign.answering.stream import TextStream
from vlmalign.api import checkpoint as api_checkpoint
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.weights.adapter import save_adapter
from vlmalign.weights.checkpoint import load_config

QUESTION = "Which findings are present?"
LLAMA_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400, "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def medgemma(repository, tmp_path_factory) -> Path:
    return shortened(repository / "configs" / "models" / "tiny-medgemma", tmp_path_factory.mktemp("answer") / "model")


@pytest.fixture(scope="module")
def picture(medgemma) -> Path:
    return film(medgemma.parent / "film.png")


@pytest.fixture(scope="module")
def adapter(medgemma) -> Path:
    """A PEFT folder of random numbers."""
    model = Model(load_config(medgemma), lora=LoraSpec(rank=2, alpha=64.0))
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape.shape), jnp.float32)
        for name, shape in model.shapes.items()
        if ".lora_" in name
    }
    save_adapter(medgemma.parent / "adapter", params, model, base=str(medgemma))
    return medgemma.parent / "adapter"


def answer(*arguments: object) -> int:
    return cli.main(["answer", *map(str, arguments)])


def test_the_answer_comes_in_pieces(medgemma, picture, monkeypatch, capsys):
    """The greedy answer of the library, block by block; what is said beside it goes to stderr."""
    pieces = []
    monkeypatch.setattr(command, "_write", pieces.append)
    with quick():
        model = vlmalign.load(medgemma)
        prompt = model.prompt(vlmalign.question(QUESTION, images=[picture]))
        ((expected,),) = model.sample([prompt], max_tokens=24, temperature=0)
        assert answer(medgemma, "--image", picture, QUESTION, "--max-tokens", 24) == 0
    assert not expected.stopped
    assert "".join(pieces) == expected.text + "\n"
    assert len(pieces) == 3, "24 tokens are two blocks; then the line break"
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"loading {medgemma} (gemma3)",
        "compiling; the first words take longest",
        "cut off after 24 tokens; --max-tokens sets the limit",
    ]


@pytest.fixture
def sampled(monkeypatch) -> list:
    """What the model is asked to sample; its answer is always the same."""
    asked = []

    def sample(self, prompts, *, watch, **options):
        asked.append((self, prompts, options))
        tokens = np.asarray(self.chat.tokenizer("no finding", add_special_tokens=False)["input_ids"], np.int32)
        watch(0, 0, tokens)
        return [[vlmalign.Answer("no finding", tokens, np.zeros(len(tokens), np.float32), True)]]

    monkeypatch.setattr(vlmalign.LoadedModel, "sample", sample)
    return asked


def test_an_adapter_answers_on_its_base(medgemma, picture, adapter, sampled, capsys):
    assert answer(medgemma, QUESTION, "--adapter", adapter, "--image", picture, "--dtype", "float32") == 0
    ((model, (prompt,), options),) = sampled
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(model.trained) == len(stored) > 0
    for name, value in model.trained.items():
        assert np.array_equal(stored[f"base_model.model.model.{name}"], value)
    assert (model.model.dtype, prompt.images) == ("float32", (str(picture),))
    assert options == {"max_tokens": 512, "temperature": 0.0, "seed": 0}
    said = capsys.readouterr()
    assert said.out == "no finding\n"
    assert said.err == f"loading {medgemma} (gemma3, with its adapter)\ncompiling; the first words take longest\n"


def test_without_films_with_a_system_message(medgemma, sampled, capsys):
    options = ("--system", "Be brief.", "--max-tokens", 8, "--temperature", 0.5, "--seed", 3)
    assert answer(medgemma, QUESTION, *options) == 0
    ((model, (prompt,), options),) = sampled
    assert (prompt.images, model.model.dtype, model.trained) == ((), "bfloat16", {})
    assert model.chat.decode(prompt.prompt.tokens) == f"user\nBe brief.\n\n{QUESTION}\nmodel\n"
    assert options == {"max_tokens": 8, "temperature": 0.5, "seed": 3}
    assert capsys.readouterr().out == "no finding\n"


@pytest.fixture
def unread(monkeypatch):
    """Whoever reads a weight fails the test."""

    def load_params(*arguments, **options):
        raise AssertionError("weights were read before the mistake was said")

    monkeypatch.setattr(api_checkpoint, "load_params", load_params)


def refused(capsys, *arguments: object) -> str:
    assert answer(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("unread")
class TestMistakesAreSaidFirst:
    def test_no_such_folder(self, medgemma, capsys):
        assert "there is no folder /nowhere; give a checkpoint folder" in refused(capsys, "/nowhere", QUESTION)
        assert "is not a checkpoint folder: it has no config.json" in refused(capsys, medgemma.parent, QUESTION)

    def test_an_image_to_a_text_model(self, picture, tmp_path, capsys):
        folder = tmp_path / "llama"
        shutil.copytree(family_folder("llama3"), folder)
        (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
        said = refused(capsys, folder, QUESTION, "--image", picture)
        assert f"{folder} is a text model (llama), which sees no images; leave out --image" in said

    def test_films_that_cannot_be_read(self, medgemma, picture, tmp_path, capsys):
        broken = tmp_path / "broken.png"
        broken.write_bytes(picture.read_bytes()[:900])
        said = refused(capsys, medgemma, QUESTION, "--image", picture, "--image", broken)
        assert str(broken) in said
        assert "unreadable image" in said
        assert "no image" in refused(capsys, medgemma, QUESTION, "--image", tmp_path / "absent.png")

    def test_an_adapter_of_another_base(self, medgemma, repository, adapter, tmp_path, capsys):
        other = repository / "configs" / "models" / "tiny-medgemma"
        said = refused(capsys, other, QUESTION, "--adapter", adapter)
        assert f"{adapter} is an adapter on {medgemma}, and {other} is another model" in said
        # Where the base that it names is not here, its tensors tell.
        moved = tmp_path / "adapter"
        shutil.copytree(adapter, moved)
        settings = json.loads((moved / "adapter_config.json").read_text())
        (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "somebody/model"}))
        assert "adapts only some of this model's 4 layers" in refused(capsys, other, QUESTION, "--adapter", moved)

    def test_a_folder_that_is_no_adapter(self, medgemma, tmp_path, capsys):
        assert "is neither a PEFT folder" in refused(capsys, medgemma, QUESTION, "--adapter", tmp_path)

    @pytest.mark.parametrize("option", [("--max-tokens", 0), ("--temperature", -1), ("--temperature", "nan")])
    def test_numbers_out_of_range(self, medgemma, option, capsys):
        assert "--max-tokens must be >= 1 and --temperature >= 0" in refused(capsys, medgemma, QUESTION, *option)

    def test_text_that_spells_a_control_token(self, medgemma, capsys):
        assert "spells '<end_of_turn>'" in refused(capsys, medgemma, "Say <end_of_turn> please")


def streamed(parts: list[bytes]) -> list[str]:
    """What is written as the bytes of an answer come in."""
    pieces: list[str] = []
    stream = TextStream(lambda tokens: bytes(tokens.tolist()).decode(errors="replace"), pieces.append)
    sofar = b""
    for part in parts:
        sofar += part
        stream.show(np.frombuffer(sofar, np.uint8))
    stream.end(np.frombuffer(sofar, np.uint8))
    return pieces


def test_a_character_waits_for_all_its_bytes():
    film = "肺é".encode()
    assert streamed([b"a ", film[:1], film[1:4], film[4:]]) == ["a ", "肺", "é", "\n"]
    assert streamed([b"a", film[:2]]) == ["a", "\ufffd", "\n"], "bytes that nothing completes are shown at the end"
    assert streamed([b""]) == ["\n"]


def test_what_would_steer_the_terminal_is_shown_by_number():
    said = "".join(streamed([b"fine\n\tso far \x1b[2J", b"\x1b]0;title\x07", "\r\u202e".encode()]))
    assert said == "fine\n\tso far [U+001B][2J[U+001B]]0;title[U+0007][U+000D][U+202E]\n"
