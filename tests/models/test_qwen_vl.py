"""Qwen2.5-VL whole: logits, groups, gradients, greedy answers and features of images of any size equal transformers'."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    Checkpoint,
    assert_close,
    edit_config,
    logits,
    read,
    scores,
    scores_and_gradients,
    write,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmalign.data.groups import collate
from vlmalign.models.families import read_config
from vlmalign.models.towers import arrange
from vlmalign.rollout.engine import generate
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import Grid, Group, GroupBatch, Layout, Patches, Segment

BEGIN, END, SOFT = 90, 91, 92
MERGE = 2
#: soft tokens (rows, columns) of each image; windows are 2 x 2 of them
SIZES = {"square": Grid(2, 2), "wide": Grid(1, 5), "tall": Grid(3, 2)}
SECTIONS = [1, 1, 2]
TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 95,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 2, "window_size": 8,
    "out_hidden_size": 32, "fullatt_block_indexes": [1],
}  # fmt: skip
PIECES = {
    0: ([5, 6, "wide", 7], [8, 9, 10], [11, 12, 13, 14]),
    1: (["square", 20, "tall", 21, 22], [23, "square", 24], [25]),
    2: ([30, 31, 32, 33], [34, 35], [36, "wide", 37, 38]),
}
LAYOUT = Layout(24, 2, 12)


def model(**top) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=SOFT, vision_start_token_id=BEGIN,
        vision_end_token_id=END, attn_implementation="eager", **top,
    )  # fmt: skip
    module = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                # Norms are stored around 1; the decoder's last one of both signs, as a tied head would repeat its input.
                last = key == "model.language_model.norm.weight"
                value.copy_((0.0 if last else float("norm" in key or "ln_q" in key)) + (3.0 if last else 0.3) * noise)
            else:
                value.copy_(noise * (0.15 if "embed_tokens" in key else 1.3 * float(np.prod(value.shape[1:])) ** -0.5))
    return module.float().eval()


@functools.cache
def checkpoint() -> Checkpoint:
    module = model()
    return read(write(module, "qwen-vl"), module)


@functools.cache
def picture(key: str) -> Patches:
    grid = SIZES[key]
    rows, columns = grid.rows * MERGE, grid.columns * MERGE
    rng = np.random.default_rng([ord(c) for c in key])
    return Patches(rng.normal(size=(rows * columns, 3 * 2 * 2 * 2)).astype(np.float32), rows, columns)


class Pictures:
    def grid(self, key: str) -> Grid:
        return SIZES[key]

    def read(self, keys: list[str]) -> list[Patches]:
        return [picture(key) for key in keys]


def segment(parts: Sequence[int | str], images: Sequence[str]) -> Segment:
    tokens, image = [], []
    for part in parts:
        if isinstance(part, str):
            soft = SIZES[part].tokens
            tokens += [BEGIN] + [SOFT] * soft + [END]
            image += [-1] + [images.index(part)] * soft + [-1]
        else:
            tokens.append(part)
            image.append(-1)
    return Segment(np.asarray(tokens, np.int32), np.asarray(image, np.int32), np.ones(len(tokens), np.float32))


def group(number: int) -> Group:
    pieces = PIECES[number]
    images = tuple(dict.fromkeys(part for piece in pieces for part in piece if isinstance(part, str)))
    return Group(number, segment(pieces[0], images), tuple(segment(p, images) for p in pieces[1:]), images)


GROUPS = [group(number) for number in PIECES]


def put(groups: Sequence[Group], layout: Layout) -> GroupBatch:
    """With patches of all three images, so that every batch has the same shapes."""
    batch, keys = collate(groups, layout, rows=len(groups), grid=SIZES.__getitem__, position_axes=3)
    order = [*keys, *(key for key in SIZES if key not in keys)]
    return batch._replace(pixels=arrange(checkpoint().model.config.vision, [picture(key) for key in order]))


def whole(number: int, k: int | None) -> list[int | str]:
    return [*PIECES[number][0], *([] if k is None else PIECES[number][k + 1])]


def torch_inputs(parts: Sequence[int | str]) -> dict[str, torch.Tensor]:
    images = [part for part in parts if isinstance(part, str)]
    ids = torch.from_numpy(segment(parts, list(dict.fromkeys(images))).tokens.astype(np.int64))[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == SOFT).int()}
    if images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([picture(key).values for key in images]))
        inputs["image_grid_thw"] = torch.tensor([[1, picture(key).rows, picture(key).columns] for key in images])
    return inputs


def torch_logits(parts: Sequence[int | str]) -> np.ndarray:
    with torch.no_grad():
        return checkpoint().torch(**torch_inputs(parts)).logits[0].numpy()


def test_positions_equal_transformers():
    """Prompt and continuation, with an image in either."""
    batch = put(GROUPS, LAYOUT)
    assert batch.position.shape == (3, LAYOUT.row, 3)
    for row, item in enumerate(GROUPS):
        for k, continuation in enumerate(item.continuations):
            inputs = torch_inputs(whole(row, k))
            expected, _ = checkpoint().torch.model.get_rope_index(
                inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
            )
            start = LAYOUT.prompt + k * LAYOUT.completion
            found = np.concatenate(
                [batch.position[row, : len(item.prompt)], batch.position[row, start : start + len(continuation)]]
            )
            assert np.array_equal(found, expected[:, 0].numpy().T), (row, k)


def test_logits():
    prompts = [Group(g.id, g.prompt, (), g.images) for g in GROUPS]
    batch = put(prompts, Layout(24, 0, 0))
    found = np.asarray(logits(checkpoint().model, checkpoint().params, batch))
    for row, item in enumerate(GROUPS):
        expected = torch_logits(whole(row, None))
        assert expected.std() > 0.3, "logits that do not vary prove nothing"
        assert_close(found[row, : len(item.prompt)], expected, 1e-4, f"row {row}")


def test_group_equals_sequences_alone():
    """Two continuations over one prompt, some with an image of their own, have the log-probabilities of two sequences."""
    found = np.asarray(scores(checkpoint().model, checkpoint().params, put(GROUPS, LAYOUT)).logp)
    for row, item in enumerate(GROUPS):
        for k, continuation in enumerate(item.continuations):
            table = torch.log_softmax(torch.from_numpy(torch_logits(whole(row, k))), -1).numpy()
            start = len(item.prompt)
            expected = [table[start + i - 1, token] for i, token in enumerate(continuation.tokens)]
            assert_close(found[row, k, : len(continuation)], np.array(expected), 1e-5, f"{row}, {k}")


@pytest.mark.full
def test_gradients_equal_transformers():
    """The sum of all continuations' log-probabilities, with respect to every parameter, the tower's included."""
    ours = checkpoint()
    batch = put(GROUPS, LAYOUT)
    _, found = scores_and_gradients(ours.model, ours.params, batch, batch.weight)
    module = ours.torch
    module.zero_grad()
    for row, item in enumerate(GROUPS):
        for k, continuation in enumerate(item.continuations):
            start = len(item.prompt)
            table = torch.log_softmax(module(**torch_inputs(whole(row, k))).logits[0], -1)
            tokens = torch.from_numpy(continuation.tokens.astype(np.int64))
            table[start - 1 + torch.arange(len(tokens)), tokens].sum().backward()
    names = {name.removeprefix("model."): value for name, value in module.named_parameters()}
    assert set(names) == set(found)
    for name, value in names.items():
        assert_close(found[name], value.grad.numpy(), 1e-4, name)
    module.zero_grad()


def test_greedy_answers_through_the_feature_store():
    """From stored features, prompts with and without images in one batch."""
    ours = checkpoint()
    store = FeatureStore(ours.model, ours.params, Pictures(), chunk=2)
    prompts = [Group(g.id, g.prompt, (), g.images) for g in GROUPS]
    batch = assemble(prompts, Layout(24, 0, 0), rows=3, images=3, features=store)
    assert store.encoded == 3
    length = 32
    found = generate(
        ours.model, ours.params, batch, jax.random.key(0), group=1, completion=length, stop_ids=(95,),
        sampling=Sampling(temperature=0.0), first_sample=jnp.int32(0),
    )  # fmt: skip
    for row, item in enumerate(GROUPS):
        with torch.no_grad():
            expected = ours.torch.generate(
                **torch_inputs(whole(row, None)),
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=95,
                pad_token_id=0,
            )[0, len(item.prompt) :].numpy()
        assert found.tokens[row, 0, : int(found.length[row, 0])].tolist() == expected.tolist(), row


def test_features_are_those_of_transformers():
    ours = checkpoint()
    store = FeatureStore(ours.model, ours.params, Pictures(), chunk=2)
    for key, found in zip(SIZES, store.features(list(SIZES)), strict=True):
        image = picture(key)
        with torch.no_grad():
            grid = torch.tensor([[1, image.rows, image.columns]])
            expected = ours.torch.model.visual(torch.from_numpy(image.values), grid).pooler_output.numpy()
        assert_close(found, expected, 1e-5, key)


def test_pictures_that_are_not_as_their_grid_said():
    """The features of one would be taken for those of the next."""
    ours = checkpoint()

    class Turned(Pictures):
        def read(self, keys):
            return [image._replace(rows=image.columns, columns=image.rows) for image in super().read(keys)]

    key = next(key for key, (rows, columns) in SIZES.items() if rows != columns)
    with pytest.raises(ValueError, match=rf"image {key} was read as \d+ x \d+ soft tokens, its grid said"):
        FeatureStore(ours.model, ours.params, Turned(), chunk=2).features([key])


def test_hub_spelling_of_the_config():
    """Hub files keep the decoder's settings at the top level, call the rotary kind mrope, and the channels in_chans."""

    def age(config):
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        vision = config["vision_config"]
        vision["in_chans"] = vision.pop("in_channels")
        vision.pop("rope_parameters")
        config.update(
            {k: v for k, v in text.items() if k not in ("model_type", "layer_types")},
            rope_theta=rope["rope_theta"],
            rope_scaling={"type": "mrope", "mrope_section": rope["mrope_section"]},
            sliding_window=32_768,
        )

    old = read(edit_config(checkpoint().folder, "qwen-vl-old", age), checkpoint().torch)
    assert old.model.config == checkpoint().model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "mrope"}}, "must give mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "sum head_dim / 2 = 4"),
        ({"vision_config": {**VISION, "out_hidden_size": 64}}, "out_hidden_size must be the decoder's hidden_size 32"),
        ({"vision_config": {**VISION, "rope_parameters": {"rope_theta": 77.0}}}, "rope_theta 10000, found"),
        ({"vision_config": {**VISION, "rope_parameters": {"rope_type": "yarn"}}}, "turns by rope_type axial"),
        ({"vision_config": None}, "needs vision_config"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    text = {k: v for k, v in TEXT.items() if k != "rope_parameters"}
    hub = {
        "model_type": "qwen2_5_vl", **text, "vision_config": VISION,
        "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS},
    }  # fmt: skip
    read_config(hub)
    with pytest.raises(ValueError, match=message):
        read_config({**hub, **change})
