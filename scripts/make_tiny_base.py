"""Train the tiny base model of the quickstart from nothing, and write it as an ordinary Hugging Face folder.

    python scripts/make_tiny_base.py --out configs/models/tiny-medgemma

MedGemma's architecture with 1.3 M parameters and 64 px films. It is taught on invented films of an institution of its
own ("base"), in that institution's wording: to report a film in sentences and to list what is on it, however asked. It has never
seen the films, the label conventions or the answer format of the institutions it is later aligned on.
About 14 minutes on 2 CPU cores; the same seed and machine give the same files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3Config, Gemma3Processor, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.groups import collate
from vlmalign.data.phantoms.institutions import BASE, WIDE_MEDIASTINUM
from vlmalign.data.phantoms.phantom import PREVALENCE, Case, draw_case, render
from vlmalign.data.phantoms.synthetic import Study, truth_row
from vlmalign.data.phantoms.traces import WORDINGS, reason, spoken
from vlmalign.data.sources.schema import CHEXPERT, NIH14
from vlmalign.models.gemma3 import read_config
from vlmalign.models.model import Model
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.randomness import key_for
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.types import Grid, Group, Layout
from vlmalign.weights.checkpoint import save_params

SIDE = 64  # pixels
SOFT_TOKENS = 16
VOCAB = 1024
BATCH = 48
STEPS = 1600
PASS = 800  # steps until films come again
#: the loss of every step, beside the weights
CURVE = "loss_curve.json"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
IMAGE = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}

#: what the base institution asks for, in which words, and how many tokens question and answer may take
LIST, REPORT = "list", "report"
LAYOUTS = {LIST: Layout(56, 1, 24), REPORT: Layout(56, 1, 72)}
QUESTIONS = {
    LIST: (
        "List the findings.",
        "What is on this film?",
        "Findings?",
        "Look at the film and list the findings.",
        "Name what you see and where it is.",
        "Please read the chest film, then list every finding with its side and zone.",
    ),
    REPORT: (
        "Report the film.",
        "Describe the film in sentences.",
        "Report.",
        "Please read the chest film and write a report.",
        "Look at the film, then say what you see and why you call it so.",
    ),
}
#: said before every other question: a model that has met one length of prompt only would be lost in another
CONTEXT = (
    "The patient is an old woman.",
    "The patient is a young man.",
    "The patient has a cough.",
    "Earlier films are not at hand.",
    "The film was taken in bed.",
    "This is a chest film.",
)

#: findings are drawn more evenly than in life, so that a short training sees enough of the rare ones
PREVALENCE_TAUGHT = {
    **PREVALENCE,
    "normal": 0.12, "cardiomegaly": 0.20, "mediastinum": 0.12, "opacity": 0.17, "lesion": 0.16, "edema": 0.14,
    "consolidation": 0.12, "pneumonia": 0.14, "atelectasis": 0.18, "pneumothorax": 0.15, "effusion": 0.22,
    "rind": 0.12, "fracture": 0.14, "device": 0.32, "emphysema": 0.04, "fibrosis": 0.04, "hernia": 0.04,
}  # fmt: skip

#: in Gemma 3's manner: system text joins the first user turn, an image part becomes the begin-of-image token
TEMPLATE = """{{ bos_token }}\
{%- set system = namespace(text='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system.text = (messages[0]['content'] if messages[0]['content'] is string \
else messages[0]['content'][0]['text']) + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate user/assistant/user/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{%- if loop.first -%}{{ system.text }}{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
{%- else -%}{{ part['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""


def make_case(number: int, seed: int) -> Case:
    """What is wrong with patient `number` of the base institution."""
    return draw_case(np.random.default_rng([seed, number]), PREVALENCE_TAUGHT)


def make_film(number: int, seed: int) -> np.ndarray:
    """The patient's film, [64, 64] uint8, its look varied as from one machine of the house to the next."""
    rng = np.random.default_rng([seed, number, 1])
    look = replace(
        BASE.look,
        contrast=rng.uniform(0.82, 1.25),
        brightness=rng.uniform(-0.07, 0.07),
        gamma=rng.uniform(0.82, 1.22),
        noise=rng.uniform(0.01, 0.03),
        blur=int(rng.integers(0, 3)),
        border=rng.uniform(0.0, 0.06),
        scale=rng.uniform(0.93, 1.06),
    )
    film = render(make_case(number, seed), look, rng, 2 * SIDE).reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))
    return (film + 0.5).astype(np.uint8)


def make_answers(number: int, seed: int) -> dict[str, str]:
    """What the base institution answers to each of its questions about the film."""
    case = make_case(number, seed)
    study = Study("train", number, number, 0, ("PA",), case, BASE.convention.labels(case), "F", 60)
    row = truth_row(f"base-{number}", study, BASE)
    return {REPORT: " ".join(reason(row)), LIST: _list(row)}


def make_question(number: int, task: str, seed: int) -> str:
    """How the question about film `number` is put."""
    rng = np.random.default_rng([seed, number, 2])
    before = rng.choice(CONTEXT, size=rng.integers(0, 2), replace=False)
    return " ".join([*before, rng.choice(QUESTIONS[task])])


def _list(row: dict) -> str:
    """What is on the film and where, in the fewest words."""
    found = []
    if "Cardiomegaly" in row["labels"]:
        found.append("heart")
    if row["mediastinum"] >= WIDE_MEDIASTINUM:
        found.append("middle")
    for finding in row["findings"]:
        word = finding["style"] or finding["kind"]
        found.append(" ".join(part for part in (word, finding["side"], finding["zone"]) if part))
    return "; ".join(found or ["clear"])


@cache
def make_films(step: int, seed: int) -> np.ndarray:
    """The films of one optimiser step, [48, 64, 64]; kept, since every course of `PASS` steps shows the same ones."""
    return np.stack([make_film(step * BATCH + i, seed) for i in range(BATCH)])


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of the invented radiologists, label names and answer tags."""
    texts = [text for number in range(4000) for text in make_answers(number, seed).values()]
    for wording in WORDINGS.values():
        texts += 200 * [wording.opening, wording.short, wording.implied, wording.normal]
        texts += 200 * [*wording.evidence.values(), *wording.ratios.values(), *wording.absent.values()]
    labels = [*CHEXPERT.labels, *NIH14.labels]
    texts += 200 * [*labels, *map(spoken, labels), f"<solution>{', '.join(labels)}</solution>"]
    texts += 200 * [*CONTEXT, *(question for asked in QUESTIONS.values() for question in asked)]
    texts += 200 * ["<think>", "</think>", "user\n", "model\n", "Read this film. Give your reasoning, then the labels."]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[*SPECIAL, *IMAGE.values()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=IMAGE,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Gemma3Config:
    """MedGemma's shape in small: three local layers and a global one, grouped-query attention, pooled patches."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE.items()}
    return Gemma3Config(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32,
            "sliding_window": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "max_position_embeddings": 1024,
        },
        vision_config={
            "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": SIDE, "patch_size": 8, "vision_use_head": False,
        },
        mm_tokens_per_image=SOFT_TOKENS,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        architectures=["Gemma3ForConditionalGeneration"],
        dtype="bfloat16",
    )  # fmt: skip


def write_text_side(folder: Path, tokenizer: PreTrainedTokenizerFast, config: Gemma3Config) -> Chat:
    """Tokenizer, template, processor and generation settings; returns the chat side read back from the folder."""
    size = {"height": SIDE, "width": SIDE}
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=size), tokenizer, chat_template=TEMPLATE, image_seq_length=SOFT_TOKENS
    )
    processor.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    return open_chat(folder, family="gemma3", image_tokens=lambda key: SOFT_TOKENS)


def make_groups(chat: Chat, step: int, task: str, seed: int) -> list[Group]:
    """The conversations of one step; the few answers that are too long for the layout are left out."""
    groups = []
    for i in range(BATCH):
        number = step % PASS * BATCH + i
        image = {"type": "image", "image": str(i)}
        question = {"role": "user", "content": [image, {"type": "text", "text": make_question(number, task, seed)}]}
        answer = {"role": "assistant", "content": make_answers(number, seed)[task]}
        group = chat.example([question, answer], group_id=i)
        if len(group.continuations[0]) <= LAYOUTS[task].completion:
            groups.append(group)
    return groups


def task_of(step: int, total: int) -> str:
    """Lists first, since they teach the eye fastest; then more and more reports (at the end one in three)."""
    return REPORT if (step * 7919) % 100 < 5 + 30 * step / total else LIST


def train(out: Path, *, steps: int, total: int, seed: int) -> list[float]:
    """Train the first `steps` of a course of `total`, write the folder, return every step's loss (nat per token)."""
    started = time.perf_counter()
    tokenizer = train_tokenizer(seed)
    config = model_config(tokenizer)
    chat = write_text_side(out, tokenizer, config)
    model = Model(read_config(config.to_dict()))
    params = model.init(key_for(seed, 0, "init"))
    print(f"{sum(v.size for v in params.values()):,} parameters")

    settings = OptimiserSettings(learning_rate=2e-3, warmup=0.05, weight_decay=0.05, clip_norm=1.0)
    trainer = Trainer(model, Objective("sft", sft_loss, sft_counts), build_optimiser(settings, total))
    state = trainer.init(params)
    losses = []
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for step, films in enumerate(pool.imap(partial(make_films, seed=seed), (step % PASS for step in range(steps)))):
            task = task_of(step, total)
            groups = make_groups(chat, step, task, seed)
            batch, keys = collate(groups, LAYOUTS[task], rows=BATCH, grid=lambda key: Grid(1, SOFT_TOKENS))
            # Distinct images in the order in which the batch asks for them; rows left out are filled up.
            order = [int(key) for key in keys] + [0] * (BATCH - len(keys))
            pixels = np.repeat(films[order][:, None].astype(np.float32) / 127.5 - 1.0, 3, axis=1)
            state, metrics = trainer.step(state, {}, [MicroBatch(batch._replace(pixels=pixels), {})])
            losses.append(metrics.loss)  # still on the device: the next batch is made while this one is computed
            if step % 100 == 99:
                mean = np.mean(jax.device_get(losses[-100:]))
                print(f"step {step + 1} of {steps}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    losses = [float(loss) for loss in losses]
    saved = {name: value.astype(jnp.bfloat16) for name, value in state.params.items()}
    save_params(out, saved, model, json.loads(config.to_json_string(use_diff=False)))
    record = {"seed": seed, "total": total, "losses": [round(loss, 5) for loss in losses]}
    (out / CURVE).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps of {BATCH} films")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    started = time.perf_counter()
    train(options.out, steps=options.steps, total=options.steps, seed=options.seed)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(
        f"wrote {options.out} ({size / 1e6:.1f} MB) in {(time.perf_counter() - started) / 60:.1f} min on {jax.devices()}"
    )


if __name__ == "__main__":
    main()
