"""Rollouts on eight devices: the completions of one device, no weights on the move, images shared out."""

import math

import pytest

TOLERANCE = 1e-5
MESHES = ("data 8", "data 4 tensor 2")


@pytest.fixture(scope="module")
def found(on_eight_devices) -> dict:
    """What the program measured; it has eight CPU devices, this process has one."""
    return on_eight_devices("rollout/mesh_program.py")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_completions_do_not_depend_on_the_mesh(found, mesh, sampling):
    """Through refilled rows, growing caches and moves into smaller ones."""
    own = found["rollouts"][mesh][sampling]
    assert own["same"]
    assert own["logp"] <= TOLERANCE
    assert own["completions"] == 42
    assert own["different"] >= 21
    assert own["lengths"] > 10
    assert own["moves"] >= 1


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_compiles_after_warm_up(found, mesh):
    for sampling in ("greedy", "sampled"):
        assert found["rollouts"][mesh][sampling]["compiled"] == 0
        assert 2 <= found["rollouts"][mesh][sampling]["programs"] <= 8
        # Compiled side by side, and found where they run.
        assert found["rollouts"][mesh][sampling]["decode_programs"] == found["rollouts"][mesh][sampling]["programs"]


def test_weights_are_whole_or_cut_by_tensor(found):
    assert found["rollouts"]["data 8"]["cut"] == 0
    assert found["rollouts"]["data 4 tensor 2"]["cut"] > 5


def test_decoding_on_whole_weights_sends_nothing(found):
    assert found["decode"]["data 8"]["collectives"] == []


def test_decoding_by_tensor_adds_up_activations_and_gathers_no_weights(found):
    """Sums over a completion's state, and what the sampler must agree on: never logits of the whole vocabulary."""
    own = found["decode"]["data 4 tensor 2"]
    operations = {operation for operation, _ in own["collectives"]}
    assert operations <= {"all-reduce", "all-gather"}
    gathered = [shape for operation, group in own["collectives"] if operation == "all-gather" for shape in group]
    assert all(math.prod(shape) <= own["completions"] * 8 for shape in gathered), (
        "a number for each block of 512 tokens"
    )
    for _, group in own["collectives"]:
        for shape in group:
            assert shape not in found["parameters"]
            assert math.prod(shape) <= own["completions"] * 512


def test_caches_are_cut_and_given_away(found):
    """Rows by rows, key-value heads by tensor; every byte of them is donated."""
    assert [found["decode"][mesh]["heads"] for mesh in MESHES] == [2, 1]
    for mesh in MESHES:
        assert found["decode"][mesh]["donated"] == found["decode"][mesh]["held"]


@pytest.mark.parametrize(("kind", "shapes"), [("squares", 1), ("sizes", 3)])
def test_images_are_shared_out(found, kind, shapes):
    own = found["features"][kind]
    assert own["gap"] <= TOLERANCE
    assert own["shapes"] == shapes
    assert own["encoded"] == 11


def test_rows_that_do_not_divide_are_refused(found):
    assert "12 rows cannot be shared out to 8 devices" in found["refusal"]
