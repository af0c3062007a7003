"""The Qwen2.5-VL tower equals transformers' on images of any size: whole windows, ragged edges, one narrow strip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_checkpoints import assert_close
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vlmalign.models.config import QwenVisionConfig
from vlmalign.models.qwen_vision import QwenTower, lay_out
from vlmalign.models.towers import arrange, size_class
from vlmalign.types import Patches

CONFIG = QwenVisionConfig(
    embed=32, ffn=48, layers=3, heads=2, patch=4, frames=2, channels=3, merge=2, window=4, full_blocks=(1,), out=24
)


@pytest.fixture(scope="module")
def reference():
    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=32, out_hidden_size=24,
        fullatt_block_indexes=[1], in_channels=3, attn_implementation="eager",
    )  # fmt: skip
    module = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.15 * torch.randn(value.shape, generator=generator) + float(value.ndim < 2))
    return module


@pytest.fixture(scope="module")
def tower(reference):
    """Our tower over the reference's weights; every name of the one is a name of the other."""
    graph, state = nnx.split(QwenTower(CONFIG, dtype=jnp.dtype("float32"), rngs=None))
    theirs = {name: jnp.asarray(value.detach().numpy()) for name, value in reference.state_dict().items()}
    ours = [(".".join(map(str, path)), path, slot) for path, slot in nnx.to_flat_state(state)]
    assert {name for name, _, _ in ours} == set(theirs)
    return nnx.merge(graph, nnx.from_flat_state([(path, slot.replace(theirs[name])) for name, path, slot in ours]))


def picture(rows: int, columns: int) -> Patches:
    rng = np.random.default_rng([rows, columns])
    return Patches(rng.normal(size=(rows * columns, CONFIG.patch_size)).astype(np.float32), rows, columns)


def expected_tokens(reference, image: Patches) -> np.ndarray:
    with torch.no_grad():
        grid = torch.tensor([[1, image.rows, image.columns]])
        return reference(torch.from_numpy(image.values), grid).pooler_output.numpy()


@pytest.mark.parametrize("grid", [(8, 8), pytest.param((10, 14), marks=pytest.mark.full), (4, 22), (2, 2)], ids=str)
def test_soft_tokens(tower, reference, grid):
    """`grid` counts patches; windows are 8 x 8 of them."""
    image = picture(*grid)
    expected = expected_tokens(reference, image)
    assert expected.shape == (grid[0] * grid[1] // 4, 24)
    found = np.asarray(tower(jax.tree.map(jnp.asarray, arrange(CONFIG, [image]))))
    assert_close(found[: len(expected)], expected, 1e-5)


@pytest.mark.full
def test_images_of_different_sizes_in_one_call(tower, reference):
    """One, two and three windows, padded to three: each image's tokens end to end, whatever stands beside it."""
    images = [picture(8, 8), picture(4, 22), picture(10, 6)]
    found = np.asarray(tower(jax.tree.map(jnp.asarray, arrange(CONFIG, images))))
    expected = np.concatenate([expected_tokens(reference, image) for image in images])
    assert_close(found[: len(expected)], expected, 1e-5)


def test_size_classes_waste_little():
    """Windows 1..24 -> the next of 1, 2, 3, 4, 6, 8, 12, 16, 24."""
    classes = [size_class(CONFIG, Patches(np.zeros((0, 96), np.float32), 8, 8 * n)) for n in range(1, 25)]
    assert sorted(set(classes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert all(n <= c <= max(n, 1.5 * (n - 1)) for n, c in enumerate(classes, 1))


def test_layout_by_hand():
    """A grid of 2 x 5 soft tokens, windows of 4 x 4: the fifth column opens a second window."""
    patches = np.repeat(np.arange(10, dtype=np.float32), 4)[:, None] * np.ones((1, CONFIG.patch_size), np.float32)
    image = lay_out(patches, (4, 10), CONFIG)
    tokens = image.patches[:, ::4, 0]
    assert tokens[0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8] + [0] * 8
    assert tokens[1].tolist() == [4, 9] + [0] * 14
    assert image.order.tolist() == [0, 1, 2, 3, 16, 4, 5, 6, 7, 17]
    assert image.real.sum(axis=1).tolist() == [32, 8]
    assert image.position[0, :4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
