"""`vlmalign inspect` finds what is in a folder, and everything that is wrong with one, without reading weights."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import random_adapter, vlm

from vlmalign import cli
from vlmalign.inspection.inspect import inspect
from vlmalign.inspection.report import describe
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.weights.adapter import save_adapter
from vlmalign.weights.checkpoint import load_config

NORM = "language_model.model.norm.weight"


@pytest.fixture
def folder(repository, tmp_path) -> Path:
    """A good checkpoint folder to spoil: the tiny base model of the quickstart."""
    shutil.copytree(repository / "configs" / "models" / "tiny-medgemma", tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    path.write_text(json.dumps(content))


def retensor(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_good_folder(folder):
    found = inspect(folder)
    assert found.problems == found.notes == ()
    tensors = load_file(folder / "model.safetensors")
    assert sum(part.parameters for part in found.parts) == sum(t.size for t in tensors.values())
    assert sum(part.stored for part in found.parts) == sum(t.nbytes for t in tensors.values())
    sizes = {part.name: part.parameters for part in found.parts}
    assert sizes["embedding"] == tensors["language_model.model.embed_tokens.weight"].size
    assert sizes["vision tower"] == sum(t.size for name, t in tensors.items() if name.startswith("vision_tower."))
    assert sizes["projector"] == sum(t.size for name, t in tensors.items() if name.startswith("multi_modal_pro"))
    assert found.files.names == ("model.safetensors",)
    assert found.files.tensors == {"BF16": len(tensors)}
    assert found.text.stops == ((1, "<eos>"), (5, "<end_of_turn>"))
    assert not found.text.marked
    assert found.images == "16 soft tokens each, from 64 x 64 px"


def test_the_command_prints_the_report_and_exits_with_0_or_2(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    said = capsys.readouterr()
    for line in (
        "family         gemma3 (model_type gemma3)",
        "decoder        4 layers of width 128, 4 heads and 2 key-value heads of 32, feed-forward 384",
        "windows        64 tokens; local x 3, global x 1",
        "stop ids       1 <eos>, 5 <end_of_turn>",
        "nothing wrong was found",
    ):
        assert line in said.out.splitlines()
    assert said.err == ""
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    assert cli.main(["inspect", str(folder)]) == 2
    said = capsys.readouterr()
    assert "problems\n  - weights: lacks model.safetensors\n" in said.out
    assert f"vlmalign inspect: {folder} has 3 problems, listed above\n" in said.err


def template_without_stops(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<end_of_turn>", ""))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


SPOILED = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["weights: lacks model.safetensors"]),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        [r"lacks model\.safetensors \(found pytorch_model\.bin: pickled weights are never read.*save_pretrained"],
    ),
    "truncated": (
        lambda f: truncate(f / "model.safetensors"),
        [r"weights: .*model\.safetensors is not a whole safetensors file"],
    ),
    "tensors": (
        lambda f: retensor(f, lambda t: t.update({"extra": t.pop(NORM), "vision_tower.x": np.zeros(3, np.int8)})),
        [
            r"tensors unknown \(2\): extra, vision_tower\.x",
            r"tensors missing \(1\): language_model\.norm",
            "not of one model",
        ],
    ),
    "integers": (
        lambda f: retensor(f, lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        [r"tensors of a dtype that is not read \(1\): .*norm\.weight is I8", "not of one model"],
    ),
    "code": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "m.M"}), [r"^config\.json asks for code"]),
    "code in the tokenizer": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
        [r"tokenizer_config\.json asks for code"],
    ),
    "code in the processor": (
        lambda f: edit(f / "processor_config.json", auto_map={"AutoProcessor": "p.P"}),
        [r"processor_config\.json asks for code"],
    ),
    "unknown family": (
        lambda f: edit(f / "config.json", model_type="mamba"),
        [r"model_type must be one of gemma3, .*qwen2.*; config\.json says 'mamba'"],
    ),
    "classifier": (
        lambda f: edit(f / "config.json", architectures=["Gemma3ForSequenceClassification"]),
        [r"describes a Gemma3ForSequenceClassification; only models that write text"],
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        [r"quantised \(quantization_config: gptq\).*dequantise"],
    ),
    "a setting is missing": (
        lambda f: edit(f / "config.json", text_config={"rope_scaling": {"rope_type": "linear"}}),
        [
            r"config\.json: a setting is missing or of the wrong kind \(KeyError\('factor'\)\)",
            "the tokenizer cannot be opened",  # transformers reads config.json too
        ],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer"]),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["the tokenizer cannot be opened"]),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), ["has no chat template|no chat template"]),
    "turns without a stop": (template_without_stops, ["the chat template makes no training example"]),
    "no generation settings": (
        lambda f: (f / "generation_config.json").unlink(),
        [
            "makes no training example",
            r"no generation_config\.json: only the tokenizer's own token ends an answer; copy the file",
        ],
    ),
    "no stop id": (
        lambda f: (edit(f / "generation_config.json", eos_token_id=None), edit(f / "tokenizer_config.json", eos_token=None)),
        [r"neither generation_config\.json nor the tokenizer names a stop token: set eos_token_id"],
    ),
    "unknown stop id": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[1, 5, 70000]),
        [r"generation_config\.json names stop ids that the tokenizer does not have \(70000\)"],
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), [r"config\.json is not valid JSON", "tokenizer"]),
    "broken tokenizer settings": (
        lambda f: (f / "tokenizer_config.json").write_text("["),
        [r"tokenizer_config\.json is not valid JSON"],
    ),
    "broken generation settings": (lambda f: (f / "generation_config.json").write_text("{"), ["set eos_token_id in"]),
    "no image settings": (lambda f: (f / "processor_config.json").unlink(), ["no image settings"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_each_problem_is_one_line(folder, name):
    spoil, expected = SPOILED[name]
    spoil(folder)
    found = inspect(folder)
    assert len(found.problems) == len(expected), found.problems
    for line, pattern in zip(found.problems, expected, strict=True):
        assert "\n" not in line
        assert re.search(pattern, line)
    assert describe(found).endswith("\n".join(f"  - {line}" for line in found.problems))


def test_all_problems_come_at_once(folder):
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", auto_map={}, quantization_config={"quant_method": "fp8"})
    (folder / "chat_template.jinja").unlink()
    (folder / "processor_config.json").unlink()
    said = "\n".join(inspect(folder).problems)
    for part in ("auto_map", "fp8", "lacks model.safetensors", "no chat template", "no image settings"):
        assert part in said


def test_a_tokenizer_that_is_larger_than_the_embedding(folder):
    """The weights do not fit such a config either; both are said."""
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], "vocab_size": 800})
    found = inspect(folder)
    assert any("misshaped (1)" in line for line in found.problems)
    assert any("97 tokens (ids up to 896) that the embedding of 800 rows has not" in line for line in found.problems)


def test_a_processor_of_another_size(folder):
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["size"] = {"height": 32, "width": 32}
    (folder / "processor_config.json").write_text(json.dumps(config))
    assert [line for line in inspect(folder).problems if "makes 32 x 32 px, the tower takes 64 x 64" in line]


def test_float16_is_noted_not_refused(folder):
    """Weights in float16 are cast; only computing in it is refused."""
    edit(folder / "config.json", torch_dtype="float16")
    found = inspect(folder)
    assert found.problems == ()
    assert [note for note in found.notes if "float16" in note and "overflow" in note]


def test_a_template_that_marks_answers(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{% generation %}{% endgeneration %}")
    assert inspect(folder).text.marked


LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
QWEN_2_5_VL_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 3584,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(LLAMA_3_8B, 8_030_261_248), (GEMMA_3_4B, 4_300_079_472), (QWEN_2_5_VL_7B, 8_292_166_656)],
    ids=["llama 3 8b", "gemma 3 4b", "qwen 2.5 vl 7b"],
)
def test_published_sizes_from_a_config_alone(tmp_path, config, parameters):
    """The numbers of parameters that the models are published with."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert sum(part.parameters for part in found.parts) == parameters
    assert found.files is None
    assert found.problems[:2] == (
        "weights: lacks model.safetensors",
        "no tokenizer (tokenizer.json with tokenizer_config.json): copy it from the original model",
    )
    assert f"{parameters:,}" in describe(found)


def test_weights_are_never_read(tmp_path):
    """4 GB of a file that has a header and a hole behind it."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_8B, "num_hidden_layers": 4}))
    header, at = {}, 0
    for name, shape in Model(load_config(tmp_path)).shapes.items():
        size = 2 * int(np.prod(shape.shape))
        stored = name.replace("language_model.", "model.")
        header[stored] = {"dtype": "BF16", "shape": shape.shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    found = inspect(tmp_path)
    assert [line for line in found.problems if "tokenizer" not in line] == []
    assert sum(part.stored for part in found.parts) == at > 3_800_000_000


def test_images_of_any_size(tmp_path):
    small = {"vision_config": {**QWEN_2_5_VL_7B["vision_config"], "depth": 1}, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN_2_5_VL_7B, **small}))
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    expected = "4 to 16384 soft tokens by size, one for 28 x 28 px (min_pixels 3,136, max_pixels 12,845,056)"
    found = inspect(tmp_path)
    assert found.images == expected
    assert not [line for line in found.problems if line.startswith("images:")]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "merge_size": 1}))
    said = [line for line in inspect(tmp_path).problems if line.startswith("images:")]
    assert len(said) == 1
    assert "cuts by (patch_size, merge_size, temporal_patch_size) = (14, 1, 2), the tower takes (14, 2, 2)" in said[0]


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    model = Model(vlm().model.config, lora=LoraSpec(rank=2, alpha=3.0, targets=("q_proj", "up_proj")))
    save_adapter(tmp_path / "adapter", random_adapter(model, seed=1), model, base="google/medgemma-4b-it")
    return tmp_path / "adapter"


def test_an_adapter_folder(adapter):
    found = inspect(adapter)
    assert found.problems == ()
    assert (found.adapter.rank, found.adapter.alpha) == (2, 3.0)
    assert set(found.adapter.targets) == {"q_proj", "up_proj"}
    assert found.adapter.base == "google/medgemma-4b-it"
    assert found.adapter.layers == 2
    assert found.adapter.parameters == sum(t.size for t in load_file(adapter / "adapter_model.safetensors").values())
    said = describe(found).splitlines()
    assert "adapter        LoRA, rank 2, alpha 3" in said
    assert "on             q_proj, up_proj of 2 layers" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            r"no adapter_model\.safetensors \(found adapter_model\.bin: pickled",
        ),
        (lambda f: truncate(f / "adapter_model.safetensors"), "not a whole safetensors file"),
        (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "peft_type must be LORA, found 'IA3'"),
        (lambda f: edit(f / "adapter_config.json", rank_pattern={"q_proj": 4}), "not understood here: rank_pattern"),
    ],
    ids=["pickle", "truncated", "kind", "setting"],
)
def test_a_bad_adapter_folder(adapter, spoil, said):
    spoil(adapter)
    found = inspect(adapter)
    assert len(found.problems) == 1
    assert re.search(said, found.problems[0])


def test_an_adapter_on_the_tower(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: np.zeros((2, 24), np.float32)}, file)
    assert [line for line in inspect(adapter).problems if "1 tensors on the vision tower" in line]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_neither(tmp_path, there):
    path = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(ValueError, match="is neither a checkpoint" if there else "is not a folder; fetch the model"):
        inspect(path)


def test_a_template_that_reads_the_clock_is_noted(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# {{ strftime_now('%d') }} #}")
    (note,) = inspect(folder).notes
    assert note.startswith("the chat template writes the date: a run keeps that of its first start")


def test_a_template_that_leaves_out_what_the_tokenizer_would_write_is_noted(folder):
    """The tokenizer begins every text by <bos>, the template writes none: tools differ in what they train on."""
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", "").replace("{{- bos_token }}", ""))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    pair = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": pair, "pair": [*pair, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    (note,) = inspect(folder).notes
    assert note.startswith("the chat template does not write <bos>, which the tokenizer puts before a text by itself")
