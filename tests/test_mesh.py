"""The table from logical dims to mesh axes: what is cut by what, what stays whole, and what is refused by name."""

import json
import logging
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vlmalign.mesh import (
    AXES,
    AXES_OF,
    DATA,
    EXCEPTIONS,
    FSDP,
    TENSOR,
    MeshSettings,
    Placement,
    build_mesh,
    constrain,
    default_mesh,
    on_mesh,
    per_shard,
    placement,
    put_rows,
    require_placed,
    reshard,
    sharding_of,
)
from vlmalign.models.families import read_config
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.planning.inputs import KNOWN_MODELS


def mesh(replica: int = 1, data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Axes without devices: what shardings are made of."""
    return AbstractMesh((replica, data, fsdp, tensor), AXES)


LORA = LoraSpec(rank=16, alpha=32.0)
MIXED = mesh(data=2, fsdp=2, tensor=2)


def spec(name: str, shape: tuple[int, ...], dims: tuple[str, ...], where: AbstractMesh = MIXED, **options) -> tuple:
    """One entry per dim: None, an axis or several."""
    return tuple(sharding_of(name, shape, dims, where, **options)[0].spec)


@cache
def full_size(name: str) -> Model:
    """A published model, of which nothing but shapes is made; the text-only one with an adapter."""
    config = json.loads(KNOWN_MODELS[name].read_text())
    return Model(read_config(config), dtype="bfloat16", lora=LORA if name == "openbiollm-8b" else None)


def place(model: Model, where: AbstractMesh, **options) -> Placement:
    config = model.config.decoder
    return placement(
        where, model.shapes, model.dims, pieces={"heads": config.heads, "kv_heads": config.kv_heads}, **options
    )


def share(model: Model, where: Placement) -> float:
    """Bytes of parameters on one device, of all."""
    sizes = {name: math.prod(x.shape) for name, x in model.shapes.items()}
    held = sum(math.prod(where(name).shard_shape(x.shape)) for name, x in model.shapes.items())
    return held / sum(sizes.values())


# ------------------------------------------------------------------------------------------------- the mesh


@pytest.mark.parametrize(
    "sizes",
    [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}, {"data": -1, "replicas": -1}],
    ids=str,
)
def test_settings_out_of_range_are_refused(sizes):
    with pytest.raises(ValueError, match="one of them -1"):
        MeshSettings(**sizes)


def test_minus_one_takes_the_rest():
    device = jax.devices()[:1]
    built = build_mesh(MeshSettings(), device)
    assert dict(built.shape) == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in built.axis_types)
    for settings in (MeshSettings(data=2), MeshSettings(data=-1, fsdp=3)):
        with pytest.raises(ValueError, match="does not fit 1 devices"):
            build_mesh(settings, device)


def test_adapters_want_copies_and_full_training_wants_cuts():
    assert default_mesh(lora=True) == MeshSettings(data=-1, fsdp=1, tensor=1, replicas=1)
    assert default_mesh(lora=False) == MeshSettings(data=1, fsdp=-1, tensor=1, replicas=1)


# ------------------------------------------------------------------------------------------------- one tensor


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [
        ((64, 32), ("heads", "embed"), (TENSOR, FSDP)),
        ((32, 64), ("embed", "heads"), (FSDP, TENSOR)),
        ((48, 32), ("ffn", "embed"), (TENSOR, FSDP)),
        ((32,), ("embed",), (None,)),  # a vector is not worth gathering
        ((64,), ("heads",), (TENSOR,)),  # but a bias goes with its matrix
        ((4, 32), ("rank", "embed"), (None, FSDP)),
        ((96, 32), ("vocab", "embed"), ((FSDP, TENSOR), None)),  # not by width, which all activations would inherit
        ((24, 32), ("tower_embed", "embed"), (TENSOR, FSDP)),
        ((96, 96), ("merged", "merged"), (TENSOR, FSDP)),
        ((72, 24), ("heads", "tower_embed"), (None, FSDP)),
        ((24, 3, 4, 4), ("embed", "channel", "patch", "patch"), (None,) * 4),
    ],
    ids=str,
)
def test_cuts(shape, dims, expected):
    assert spec("x", shape, dims) == expected
    assert spec("x", shape, dims, over=()) == (None,) * len(shape)
    assert spec("x", shape, dims, mesh(data=8)) == (None,) * len(shape)
    for axis in (FSDP, TENSOR):
        only = tuple(axis if cut == axis or (isinstance(cut, tuple) and axis in cut) else None for cut in expected)
        assert spec("x", shape, dims, over=(axis,)) == only


def test_what_does_not_divide_stays_whole_and_is_told():
    found, kept = sharding_of("k_proj", (3, 32), ("kv_heads", "embed"), MIXED)
    assert found.spec == PartitionSpec(None, FSDP)
    assert kept == ["k_proj: kv_heads of 3 by tensor of 2"]
    # A vocabulary that divides by one axis only gives up the other.
    assert spec("embed", (98, 32), ("vocab", "embed")) == (FSDP, None)


def test_heads_are_not_cut_in_pieces():
    """Four heads of 16 columns divide by 8 as numbers, not as heads."""
    eight = mesh(tensor=8)
    assert spec("k_proj", (64, 32), ("kv_heads", "embed"), eight) == (TENSOR, None)
    assert spec("k_proj", (64, 32), ("kv_heads", "embed"), eight, pieces={"kv_heads": 4}) == (None, None)
    assert spec("k_proj", (64, 32), ("kv_heads", "embed"), mesh(tensor=4), pieces={"kv_heads": 4}) == (TENSOR, None)


def test_wrong_dims_are_refused_by_name():
    with pytest.raises(ValueError, match=r"lm_head\.weight.*AXES_OF must have a line"):
        sharding_of("lm_head.weight", (96, 32), ("words", "embed"), MIXED)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        sharding_of("lm_head.weight", (96, 32), ("vocab",), MIXED)
    with pytest.raises(ValueError, match=r"q_proj.*cut twice"):
        sharding_of("q_proj", (64, 48), ("heads", "ffn"), MIXED)


def test_the_exceptions_use_each_axis_once():
    for dims, axes in EXCEPTIONS.items():
        flat = [axis for cut in axes for axis in cut]
        assert len(dims) == len(axes)
        assert set(dims) <= set(AXES_OF)
        assert len(set(flat)) == len(flat)
        assert DATA not in flat


# ------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["medgemma-4b", "openbiollm-8b", "qwen2.5-vl-3b"])
@pytest.mark.parametrize(
    ("where", "pieces"),
    [(mesh(fsdp=8), 8), (mesh(tensor=2), 2), (mesh(data=2, fsdp=4, tensor=2), 8)],
    ids=["f 8", "t 2", "f 4 t 2"],
)
def test_published_models_are_cut_evenly(name, where, pieces):
    """Every device holds its share and at most a few hundredths of the whole besides: vectors, the tower's first layer."""
    model = full_size(name)
    held = share(model, place(model, where))
    assert 1 / pieces <= held < 1 / pieces + 0.1, held
    assert share(model, place(model, where, over=())) == 1.0


def test_an_adapter_goes_with_its_matrix():
    found = place(full_size("openbiollm-8b"), mesh(tensor=2))
    path = "language_model.layers.0.mlp.gate_proj"
    assert found(f"{path}.weight").spec[0] == found(f"{path}.lora_B.weight").spec[0] == TENSOR
    assert found(f"{path}.lora_A.weight").spec == PartitionSpec(None, None)
    assert found("value_head.weight").spec == PartitionSpec(), "what the model does not have is whole"


def test_an_axis_that_cuts_no_projection_is_refused(caplog):
    model = full_size("medgemma-4b")
    with caplog.at_level(logging.INFO, logger="vlmalign.mesh"):
        found = place(model, mesh(tensor=8))
    assert "kv_heads of 4 by tensor of 8" in caplog.text
    assert found("language_model.layers.0.self_attn.k_proj.weight").spec[0] is None
    assert found("language_model.layers.0.self_attn.q_proj.weight").spec[0] == TENSOR
    with pytest.raises(ValueError, match=r"tensor 7, which divides no projection.*_proj"):
        place(model, mesh(tensor=7))


# ------------------------------------------------------------------------------------------------- without a mesh


def test_without_a_mesh_nothing_changes():
    x = jnp.zeros((3, 2))
    assert put_rows(x, None) is x
    assert on_mesh(jnp.sum, None) is jnp.sum
    assert constrain(x, "data") is x
    assert per_shard(jnp.sum, cut=(True,)) is jnp.sum


def test_on_a_mesh_of_one_device_all_is_the_same():
    one = build_mesh(MeshSettings(), jax.devices()[:1])

    def chunked(x, w):
        return per_shard(lambda x, w: x @ w, cut=(True, False))(constrain(x, ("replica", "data", "fsdp")), w)

    x, w = np.arange(6.0, dtype=np.float32).reshape(3, 2), np.ones((2, 2), np.float32)
    assert np.array_equal(on_mesh(jax.jit(chunked), one)(put_rows(x, one), w), x @ w)
    model = full_size("qwen2.5-vl-3b")
    where = placement(one, model.shapes, model.dims)
    name = "language_model.norm.weight"
    params = {name: jnp.ones((2048,))}
    require_placed(reshard(params, where), where)
