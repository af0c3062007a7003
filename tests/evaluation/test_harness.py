"""lm-evaluation-harness on our models: equal to its own `hf` model in torch, request by request and as whole tasks.

One tiny Gemma 3 with a tokenizer, written by transformers, is read by both. Its context is 64 tokens, so that windows
and truncation show.
"""

import functools
import json
import logging
import os
import sys
from pathlib import Path

# Nothing is downloaded here, and the harness's libraries must not try.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import numpy as np
import pytest
import torch
import yaml
from lm_eval import simple_evaluate, tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny_checkpoints import assert_close, random_adapter, scratch, text_model, write
from tiny_tokenizer import processor
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vlmalign import cli
from vlmalign.data.groups import collate
from vlmalign.evaluation import answers
from vlmalign.evaluation.harness import VlmalignLM, read_sampling
from vlmalign.evaluation.scoring import Request, bucket, check_tokens, plan, score, text_segment
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.types import Group, Layout
from vlmalign.weights.adapter import save_adapter
from vlmalign.weights.checkpoint import load_config, save_params

CONTEXT = 64  #: tokens
HEART = "Is the heart enlarged? No effusion is seen."
#: contexts and options: repeated contexts, several tokens, trailing spaces, no context, unicode, longer than the model
PAIRS = [
    (HEART, " Yes"),
    (HEART, " No, the heart is not large."),
    ("", "the heart"),
    ("Größe des Herzens – 心臓?", " größer"),
    ("Größe des Herzens – 心臓?", " 大きい"),
    (HEART + "  ", "Yes"),
    (HEART, " Yes"),
    ("<bos>Is the heart large?\n", "Yes"),
    ("the heart is seen. " * 30 + "Is it large?", " Yes, it is."),
    ("a", "b"),
    ("", "\n"),
]
TEXTS = ["", "the heart", "Is the heart enlarged? Größe 心臓. " * 12]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """The tiny tokenizer; with `bos` it begins every text with BOS, as Gemma's and Llama's do."""
    made = PreTrainedTokenizerFast.from_pretrained(processor_folder())
    if bos:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return made


@functools.cache
def processor_folder() -> str:
    folder = scratch() / "harness-tokenizer"
    processor().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder() -> Path:
    own = tokenizer(bos=True)
    module = text_model(
        1,
        vocab_size=len(own),
        max_position_embeddings=CONTEXT,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    with torch.no_grad():
        module.model.embed_tokens.weight[5] *= 3  # a stop token that is written every now and then
    module.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=[1, 5], pad_token_id=0)
    found = write(module, "harness")
    own.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def ours(folder) -> VlmalignLM:
    return VlmalignLM(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)


def greedy_pairs(theirs: HFLM) -> list[tuple[str, str]]:
    """Contexts with their most likely next token, where the two are cut apart again as they were put together."""
    found = []
    for i in range(len(HEART)):
        context = HEART[: i + 1].rstrip()
        token = int(theirs.model(theirs.tok_batch_encode([context])[0]).logits[0, -1].argmax())
        text = theirs.tok_decode([token])
        if text and theirs._encode_pair(context, text)[1] == [token]:
            found.append((context, text))
    return found


def test_loglikelihood(ours, theirs):
    asked = requests("loglikelihood", *PAIRS, *greedy_pairs(theirs))
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert_close([logp for logp, _ in found], [logp for logp, _ in expected], 1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}
    assert np.std([logp for logp, _ in expected]) > 1, "scores that do not vary prove nothing"


@pytest.mark.parametrize("bos", [True, False], ids=["begins with BOS", "no BOS"])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_texts_are_cut_into_tokens_as_the_harness_does(bos, add_bos_token):
    """Of each class only what cuts text into tokens: no weights."""
    settings = {"tokenizer": tokenizer(bos=bos), "add_bos_token": add_bos_token, "backend": "causal"}
    theirs = HFLM.__new__(HFLM)
    vars(theirs).update(settings, custom_prefix_token_id=None)
    ours = VlmalignLM.__new__(VlmalignLM)
    vars(ours).update(settings, _prefix_token_id=None, stop_ids=(1, 5))
    seen = {"ours": [], "theirs": []}
    for name, model in (("ours", ours), ("theirs", theirs)):
        vars(model).update(_loglikelihood_tokens=lambda pairs, name=name, **_: seen[name].append(pairs) or [])
        vars(model).update(enable_thinking=None)
        model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
        seen[name].append([model.tok_encode(text) for text in TEXTS])
    assert seen["ours"] == seen["theirs"]


def test_rolling(ours, theirs):
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert len(theirs.tok_encode(TEXTS[-1])) > 3 * CONTEXT, "several windows"
    assert_close(ours.loglikelihood_rolling(asked, disable_tqdm=True), expected, 1e-4)


@pytest.mark.full
def test_generate_until(ours, theirs, monkeypatch):
    contexts = [context for context, _ in PAIRS if context]
    free = requests("generate_until", *((context, {"until": [], "max_gen_toks": 40}) for context in contexts))
    rounds = []

    def counted(model, params, waiting, key, *, room, **options):
        rounds.append((room, sum(map(len, waiting.values()))))
        return decode_round(model, params, waiting, key, room=room, **options)

    decode_round = answers._decode_round
    monkeypatch.setattr(answers, "_decode_round", counted)
    expected = theirs.generate_until(free, disable_tqdm=True)
    assert ours.generate_until(free, disable_tqdm=True) == expected
    # Some answers ended at a stop token within the first 32 tokens, the others were continued.
    assert [room for room, _ in rounds] == [32, 16]
    assert len(contexts) == rounds[0][1] > rounds[1][1] > 0
    # Stop strings that the model does write: two characters, from anywhere in an answer, across tokens or not.
    pairs = [
        text[i : i + 2] for text in expected for i in (1, 5, 12, 25) if text[i : i + 2].isascii() and text[i + 1 :]
    ]
    settings = [
        {"until": pairs[::2], "max_gen_toks": 40},
        {"until": pairs[1::2], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0},
        {"until": ["<end_of_turn>", "<unk>", pairs[0]], "max_gen_toks": 9},
    ]
    asked = requests("generate_until", *((context, setting) for setting in settings for context in contexts))
    stopped = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == stopped
    assert sum(len(text) < len(whole) for text, whole in zip(stopped, expected * 3, strict=True)) > 10


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, theirs) -> Path:
    """Two tasks in the harness's own format: options in a few-shot prompt, and answers of which half are right."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [f"Is the heart {word}?" for word in ("large", "enlarged", "seen", "not seen", "a model", "Größe")]
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    answers = theirs.generate_until(
        requests("generate_until", *((f"Q: {q}\nA:", settings) for q in questions)), disable_tqdm=True
    )
    rows = [
        {"q": q, "options": ["Yes", "No, it is not", "the effusion"], "gold": i % 3, "answer": a if i % 2 else a + "?"}
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "Q: {{q}}\nA:",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    written = {
        "task": "tiny_written",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": settings,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return folder


@pytest.fixture
def only_local_tasks(monkeypatch):
    """Reading the harness's own 14,000 task files would take most of these tests' time."""
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def expected_results(theirs, task_folder):
    manager = tasks.TaskManager(include_path=str(task_folder), include_defaults=False)
    return simple_evaluate(
        theirs, tasks=["tiny_choice", "tiny_written"], num_fewshot=1, task_manager=manager, bootstrap_iters=100
    )


@pytest.mark.full
def test_whole_tasks_by_the_command(folder, task_folder, expected_results, only_local_tasks, tmp_path, capsys):
    out, samples = tmp_path / "results.json", tmp_path / "samples.jsonl"
    status = cli.main(
        ["lm-eval", str(folder), "--tasks", "tiny_*", "--include-path", str(task_folder), "--num-fewshot", "1",
         "--dtype", "float32", "--out", str(out), "--samples", str(samples), "--traceback"]
    )  # fmt: skip
    assert status == 0
    assert "tiny_choice" in capsys.readouterr().out
    record = json.loads(out.read_text())
    found = {(row["task"], row["metric"]): row for row in record["scores"]}
    assert set(found) == {("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_written", "exact_match")}
    for (task, metric), row in found.items():
        theirs = expected_results["results"][task]
        assert row["value"] == theirs[f"{metric},none"], (task, metric)
        assert row["stderr"] == theirs[f"{metric}_stderr,none"]
        assert (row["n"], row["filter"], row["shots"]) == (6, "none", 1 if task == "tiny_choice" else 0)
    assert found["tiny_written", "exact_match"]["value"] == 0.5
    # six questions with three options each: the contexts are computed once
    assert record["computed"] == {"scored requests": 18, "prompts": 6, "truncated contexts": 0}
    assert record["environment"]["lm_eval"]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["task"] for line in lines].count("tiny_choice") == 6
    for line in lines:
        (theirs,) = (s for s in expected_results["samples"][line["task"]] if s["doc_id"] == line["doc_id"])
        if line["task"] == "tiny_written":
            assert line["resps"] == theirs["resps"]
        else:
            assert_close([r[0][0] for r in line["resps"]], [r[0][0] for r in theirs["resps"]], 1e-4)


def test_contexts_are_computed_once(ours, theirs):
    before = dict(ours.computed)
    asked = requests("loglikelihood", *PAIRS)
    ours.loglikelihood(asked, disable_tqdm=True)
    pairs = [theirs._encode_pair(*pair)[0] if pair[0] else [2] for pair in PAIRS]
    distinct = len({tuple(context) for context in pairs})
    assert distinct < len(PAIRS)
    assert ours.computed["prompts"] - before["prompts"] == distinct
    assert ours.computed["scored requests"] - before["scored requests"] == len(PAIRS)


def test_contexts_that_do_not_fit_are_counted(ours, caplog):
    before = ours.computed["truncated contexts"]
    with caplog.at_level(logging.WARNING):
        fitted = ours._fit([(list(range(80)), [1, 2]), ([3], [4]), (list(range(63)), [1, 2])])
    assert [len(r.context) for r in fitted] == [CONTEXT + 1 - 2, 1, CONTEXT + 1 - 2]
    assert fitted[0].context[-1] == 79
    assert ours.computed["truncated contexts"] - before == 1
    assert "1 of 3 contexts do not fit 64 tokens: up to 17 tokens were cut" in caplog.text
    with pytest.raises(ValueError, match="1 continuations are longer than max_length = 64"):
        ours._fit([([1], list(range(65)))])


@pytest.mark.full
def test_splitting_a_large_group_changes_no_score(ours):
    """A budget that holds neither all continuations of a context nor more than one row."""
    rng = np.random.default_rng(0)
    context = tuple(rng.integers(6, 300, 9).tolist())
    asked = [Request(context, tuple(rng.integers(6, 300, n).tolist())) for n in (1, 4, 2, 3)]
    whole = score(ours.model, ours.params, asked, budget=10_000)
    parts = score(ours.model, ours.params, asked, budget=40, limit=1)
    assert (whole.prompts, parts.prompts) == (1, 2)
    assert_close([s.logp for s in parts.scores], [s.logp for s in whole.scores], 1e-5)


def test_the_head_in_chunks_gives_the_same(ours):
    rng = np.random.default_rng(1)
    pieces = [text_segment(rng.integers(6, 300, n).tolist()) for n in (9, 4, 3, 1, 2)]
    batch, _ = collate([Group(0, pieces[0], tuple(pieces[1:]), ())], Layout(32, 4, 4), rows=8, grid=None)
    whole = jax.device_get(check_tokens(ours.model, ours.params, batch))
    chunked = jax.device_get(check_tokens(ours.model, ours.params, batch, chunk=3))
    for k, piece in enumerate(pieces[1:]):  # padding holds values of no meaning
        assert_close(chunked.logp[0, k, : len(piece)], whole.logp[0, k, : len(piece)], 1e-6)
        assert (chunked.greedy == whole.greedy)[0, k, : len(piece)].all()


@pytest.mark.parametrize("budget", [48, 200, 5000])
def test_plans_hold_every_group_once_within_the_budget(budget):
    rng = np.random.default_rng(budget)
    groups = [
        Group(
            i, text_segment(range(rng.integers(1, 90))), (text_segment(range(rng.integers(1, 20))),) * (i % 4 + 1), ()
        )
        for i in range(40)
    ]
    batches = plan(groups, budget=budget, limit=12)
    assert sorted(g.id for b in batches for g in b.groups) == list(range(40))
    for b in batches:
        assert len(b.groups) <= b.rows <= 12
        assert b.rows == 1 or b.rows * b.layout.row <= budget
        for g in b.groups:
            assert len(g.prompt) <= b.layout.prompt
            assert len(g.continuations) <= b.layout.group
            assert max(map(len, g.continuations)) <= b.layout.completion


def test_buckets_waste_little():
    for least in (1, 4, 32):
        for n in range(1, 3000):
            assert n <= bucket(n, least) <= max(least, 1.5 * n + 1)


@pytest.mark.full
def test_sampled_answers_follow_the_seed_and_share_their_prompt(ours, monkeypatch):
    settings = {"until": ["\n"], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    asked = requests("generate_until", *[(HEART, settings)] * 4)
    first = ours.generate_until(asked, disable_tqdm=True)
    assert len(set(first)) > 1
    assert ours.generate_until(asked, disable_tqdm=True) == first
    monkeypatch.setattr(ours, "seed", 1)
    assert ours.generate_until(asked, disable_tqdm=True) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_k": 5}, "top_k = 5"),
        ({"num_beams": 4}, "num_beams = 4"),
        ({"do_sample": True}, "temperature above 0"),
    ],
)
def test_generation_settings_not_offered_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read_sampling(settings)


def test_greedy_answers_ignore_settings_of_sampling():
    settings = {"do_sample": False, "temperature": 0.0, "top_k": 5, "top_p": 0.9, "num_beams": 1}
    assert read_sampling(settings).temperature == 0


def test_first_stop_is_the_least_prefix():
    own = tokenizer(bos=False)
    tokens = tuple(own.encode("the heart is</s>large<end_of_turn></s>"))
    for until, ending in ((["</s>"], "the heart is</s>"), (["large", "e<end_of_turn>"], "the heart is</s>large")):
        count = answers.first_stop(tokens, until, own)
        assert any(term in own.decode(tokens[:count]) for term in until)
        assert not any(term in own.decode(tokens[: count - 1]) for term in until)
        assert own.decode(tokens[:count]).startswith(ending)
    assert answers.first_stop(tokens, ["<bos>"], own) is None
    assert answers.first_stop((), ["a"], own) is None


def test_adapter_is_merged(folder, ours, tmp_path):
    """An adapter folder gives the scores of a checkpoint that holds the merged matrices."""
    config = load_config(folder)
    model = Model(config, lora=LoraSpec(rank=2, alpha=3.0, targets=("q_proj", "down_proj")))
    adapter = random_adapter(model, seed=5)
    save_adapter(tmp_path / "peft", adapter, model, base="tiny")
    adapted = VlmalignLM(folder, dtype="float32", adapter=str(tmp_path / "peft"))
    merged = tmp_path / "merged"
    save_params(merged, adapted.params, ours.model, json.loads((folder / "config.json").read_text()))
    ours.tokenizer.save_pretrained(merged)
    theirs = HFLM(str(merged), device="cpu", dtype="float32", batch_size=4)
    asked = requests("loglikelihood", *PAIRS)
    found = [logp for logp, _ in adapted.loglikelihood(asked, disable_tqdm=True)]
    assert_close(found, [logp for logp, _ in theirs.loglikelihood(asked, disable_tqdm=True)], 1e-4)
    plain = [logp for logp, _ in ours.loglikelihood(asked, disable_tqdm=True)]
    assert np.abs(np.subtract(found, plain)).max() > 0.1


def test_chat_template(ours, theirs):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HEART}]
    text = ours.apply_chat_template(chat)
    assert text == theirs.apply_chat_template(chat)
    assert text.startswith("<bos><start_of_turn>user\nBe brief.")
    assert ours.tok_encode(text).count(2) == 1, "the template's BOS is the only one"
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name
    begun = [chat[1], {"role": "assistant", "content": "The heart"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == theirs.apply_chat_template(
        begun, add_generation_prompt=False
    )
    with pytest.raises(Exception, match="must alternate"):
        ours.apply_chat_template([chat[1], chat[1]])


def test_the_harness_makes_the_model_by_name(folder):
    assert get_model("vlmalign") is VlmalignLM
    made = VlmalignLM.create_from_arg_string(
        f"path={folder},dtype=bfloat16,max_length=32", {"batch_size": 3, "device": None, "max_batch_size": None}
    )
    info = made.get_model_info()
    assert (info["model_dtype"], info["max_length"], made._limit) == ("bfloat16", 32, 3)
    with pytest.raises(ValueError, match="JAX_PLATFORMS"):
        VlmalignLM(folder, device="cuda:0")


def test_mistakes_are_said_in_plain_words(folder, only_local_tasks, task_folder, ours, monkeypatch, tmp_path, capsys):
    command = ["lm-eval", str(folder), "--include-path", str(task_folder), "--out", str(tmp_path / "r.json")]
    assert cli.main([*command, "--tasks", "tiny_choise"]) == 2
    assert "no such task: 'tiny_choise' (near: tiny_choice" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "no" / "r.json"), "--tasks", "tiny_choice"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 of 1 requests have an empty continuation"):
        ours.loglikelihood(requests("loglikelihood", ("a", "")), disable_tqdm=True)
    with pytest.raises(ValueError, match="leave no room for a prompt in max_length = 64"):
        ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 64})), disable_tqdm=True)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main([*command, "--tasks", "tiny_choice"]) == 2
    assert 'pip install "vlmalign[harness]"' in capsys.readouterr().err
