"""Llama 2, 3.1, Mistral and Qwen2: logits, groups and greedy answers equal transformers', old and new spellings alike."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import Checkpoint, assert_close, edit_config, group, logits, put, read, scores, write
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlmalign.models.families import read_config
from vlmalign.rollout.engine import generate
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import Layout

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

#: what shows each family's peculiarity at this size
CASES = {
    "llama 2": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama 3.1": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama with biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5, "num_key_value_heads": 1}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 with windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    # What transformers makes of a config.json of model_type mistral with layer_types.
    "mistral by layer type": (
        MinistralForCausalLM,
        MinistralConfig,
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
TOKENS = np.random.default_rng(3).integers(3, 90, size=64).tolist()
LAYOUT = Layout(24, 0, 0)
PROMPTS = [group(0, TOKENS[:24]), group(1, TOKENS[30:43]), group(2, TOKENS[50:51])]
GROUPS = [
    group(0, TOKENS[:9], TOKENS[9:14], TOKENS[20:26], TOKENS[30:31]),
    group(1, TOKENS[32:38], TOKENS[38:44], TOKENS[50:52], TOKENS[52:55]),
]


@functools.cache
def checkpoint(name: str) -> Checkpoint:
    module_class, config_class, changes = CASES[name]
    module = module_class(config_class(**{**SIZES, **changes}, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                # Norms are stored around 1; the last one of both signs, or a tied head would repeat its input.
                center, spread = (0.0, 3.0) if key == "model.norm.weight" else (float("norm" in key), 0.3)
                value.copy_(center + spread * noise)
            else:
                value.copy_(noise * (0.15 if "embed" in key else 1.3 * value.shape[1] ** -0.5))
    folder = write(module.eval(), name.replace(" ", "-"))
    if config_class is MinistralConfig:
        folder = edit_config(folder, "mistral-with-layer-types", lambda config: config.update(model_type="mistral"))
        assert isinstance(AutoConfig.from_pretrained(folder), MinistralConfig)
    return read(folder, module)


def torch_logits(module, tokens) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.tensor([list(map(int, tokens))])).logits[0].numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    ours = checkpoint(name)
    found = np.asarray(logits(ours.model, ours.params, put(PROMPTS, LAYOUT, images=None)))
    for row, item in enumerate(PROMPTS):
        expected = torch_logits(ours.torch, item.prompt.tokens)
        assert expected.std() > 0.3, "logits that do not vary prove nothing"
        assert_close(found[row, : len(item.prompt)], expected, 1e-4, f"{name}, row {row}")


@pytest.mark.parametrize("name", CASES)
def test_group_equals_sequences_alone(name):
    """Three continuations over one prompt have the log-probabilities of three whole sequences in torch."""
    ours = checkpoint(name)
    found = np.asarray(scores(ours.model, ours.params, put(GROUPS, Layout(12, 3, 6), images=None)).logp)
    for row, item in enumerate(GROUPS):
        for k, continuation in enumerate(item.continuations):
            whole = np.concatenate([item.prompt.tokens, continuation.tokens])
            table = torch.log_softmax(torch.from_numpy(torch_logits(ours.torch, whole)), -1).numpy()
            start = len(item.prompt)
            expected = [table[start + i - 1, token] for i, token in enumerate(continuation.tokens)]
            assert_close(found[row, k, : len(continuation)], np.array(expected), 1e-5, f"{name}, {row}, {k}")


@pytest.mark.parametrize(
    "name", ["llama 3.1", *(pytest.param(name, marks=pytest.mark.full) for name in ("mistral", "qwen2"))]
)
def test_greedy_answers(name):
    ours = checkpoint(name)
    item = PROMPTS[1]
    length = 12
    with torch.no_grad():
        expected = ours.torch.generate(
            torch.tensor([item.prompt.tokens.tolist()]), max_new_tokens=length, do_sample=False, eos_token_id=95,
            pad_token_id=0,
        )[0, len(item.prompt) :].numpy()  # fmt: skip
    found = generate(
        ours.model, ours.params, put([item], LAYOUT, images=None), jax.random.key(0), group=1, completion=length,
        stop_ids=(95,), sampling=Sampling(temperature=0.0), first_sample=jnp.int32(0),
    )  # fmt: skip
    assert found.tokens[0, 0, : int(found.length[0, 0])].tolist() == expected.tolist()


def test_older_spelling_of_rotary_settings():
    """Hub files write rope_theta and rope_scaling where newer ones write rope_parameters."""
    new = checkpoint("llama 3.1")

    def age(config):
        settings = config.pop("rope_parameters")
        config["rope_theta"] = settings.pop("rope_theta")
        config["rope_scaling"] = settings

    old = read(edit_config(new.folder, "llama-old", age), new.torch)
    assert old.model.config == new.model.config


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 700.0}, "rope_theta": 500.0},
        {"rope_scaling": None, "rope_theta": 500.0},
    ],
)
def test_both_spellings_in_one_file(changes):
    """What transformers makes of them: `rope_scaling` stands for the whole, the other's base included."""
    both = {"model_type": "llama", **SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **changes}
    expected = LlamaConfig(**both).rope_parameters
    rope = read_config(both).decoder.layers[0].rope
    assert (rope.theta, rope.factor) == (expected["rope_theta"], expected.get("factor", 1.0))


def test_a_window_in_words_or_of_no_tokens_is_refused():
    """A word would count as true; a window of 0 tokens sees nothing, not even itself."""
    base = {"model_type": "qwen2", **SIZES, "max_window_layers": 0, "sliding_window": 4}
    assert read_config({**base, "use_sliding_window": None}).decoder.layers[0].window is None
    with pytest.raises(ValueError, match="use_sliding_window must be true or false, found 'false'"):
        read_config({**base, "use_sliding_window": "false"})
    for window in (0, -1, "4", 4.0, True):
        with pytest.raises(ValueError, match="sliding_window must be null or a number of tokens >= 1"):
            read_config({**base, "use_sliding_window": True, "sliding_window": window})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one set of rotary settings .* full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 here"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be default, linear or llama3"),
        ({"model_type": "falcon"}, "model_type must be one of"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config({"model_type": "llama", **SIZES, **changes})
