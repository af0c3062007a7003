"""Operations of compiled updates and decode programs, as the compiler counts them, against 4N and 2N per token. No clock.

Held elsewhere: encodes, prefills and compilations per step, donated caches, and no sort over the vocabulary in
`tests/rollout`; no [tokens, vocab] in the log-probabilities alone in `tests/objectives/test_logprobs.py`.
"""

import copy
import re

import pytest
from small_gates import LARGE_ENOUGH, compiled_job, workload_of

from vlmalign.models.sizes import head_weights, layer_weights
from vlmalign.planning.cost import adapter_weights
from vlmalign.planning.jobs import micro_job, rollout_jobs
from vlmalign.rollout.engine import block_length

# Sizes in which matrices are nearly all of the work, as in the models this is for; one chunk of the head, since the
# compiler counts a loop's body once.
PROMPT, COMPLETION, ROWS = 75, 16, 2


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Operations of the compiled GRPO update by group size, and its workload."""
    found = {}
    for group in (4, 16):
        workload = workload_of(tmp_path_factory.mktemp("sizes"), PROMPT, group, COMPLETION, ROWS)
        flops = compiled_job(workload, micro_job).cost_analysis()["flops"]
        found[group] = flops, workload
    return found


@pytest.mark.parametrize("group", [4, 16])
def test_update_is_four_operations_per_weight_and_token(updates, group):
    """Forward and gradients of inputs: none of frozen weights, no prompt twice, and the head forward, again, backward."""
    flops, workload = updates[group]
    config, (prompt, k, c) = workload.model.config.decoder, workload["grpo"].layout
    assert (prompt, k, c) == (PROMPT, group, COMPLETION)
    weights = layer_weights(config) + adapter_weights(workload.model)
    head = 6 * head_weights(config) * ROWS * k * c
    ideal = 4 * weights * ROWS * (prompt + k * c) + head
    # At least the products themselves, or the counter misses what it is to count.
    assert 0.98 * ideal <= flops <= 1.15 * ideal


def test_four_times_the_completions_cost_less_than_three_times(updates):
    """The prompt is shared: 2.4 times the tokens (75 + 16 K)."""
    assert updates[16][0] < 2.8 * updates[4][0]


def test_decoding_is_two_operations_per_weight_and_token(tmp_path):
    """The body of the loop over tokens is counted once: one token of every completion."""
    workload = workload_of(tmp_path, PROMPT, 4, COMPLETION, ROWS)

    def decode(model, update, where, target):
        return rollout_jobs(model, workload["grpo"].rollout, where, target)[1]

    flops = compiled_job(workload, decode).cost_analysis()["flops"]
    config = workload.model.config.decoder
    assert block_length(COMPLETION) == COMPLETION
    ideal = 2 * (layer_weights(config) + head_weights(config)) * ROWS * 4
    assert 0.98 * ideal <= flops <= 1.1 * ideal


def test_the_last_layer_of_a_prompt_makes_one_state(tmp_path):
    """Of it all tokens have queries, keys and values; what follows them, the larger part of a layer, has one."""
    workload = workload_of(tmp_path, PROMPT, 4, COMPLETION, ROWS)

    def prefill(model, update, where, target):
        return rollout_jobs(model, workload["grpo"].rollout, where, target)[0]

    flops = compiled_job(workload, prefill).cost_analysis()["flops"]
    config = workload.model.config.decoder
    after_attention = config.embed * (config.heads * config.head_dim + 3 * config.ffn)
    # One prompt at once, of two rows. Beside the products, attention and norms.
    ideal = 2 * (PROMPT * (layer_weights(config) - after_attention) + after_attention)
    assert 0.98 * ideal <= flops <= 1.15 * ideal
    assert flops < 0.7 * 2 * PROMPT * layer_weights(config)


def test_no_array_of_the_update_holds_all_tokens_by_vocabulary(tmp_path):
    """2 x 4 x 160 loss tokens are more than a chunk of the head."""
    sizes = copy.deepcopy(LARGE_ENOUGH)
    sizes["text_config"] |= {"vocab_size": 509, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes["text_config"]["layer_types"] = ["full_attention"]
    workload = workload_of(tmp_path, PROMPT, 4, 160, ROWS, sizes=sizes)
    text = compiled_job(workload, micro_job).as_text()
    with_vocabulary = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
        if "509" in dims.split(",")
    }
    assert (1024, 509) in with_vocabulary, "a chunk's logits are there under the size that is looked for"
    for shape in with_vocabulary:
        tokens = 1
        for size in shape:
            tokens *= 1 if size == 509 else size
        assert tokens <= 1024, shape
