"""Rollouts on eight devices: the completions of one device, no weights on the move, images shared out."""

import math

import pytest

TOLERANCE = 1e-5
MESHES = ("data 8", "data 4 tensor 2")
#: (which run of the program, mesh, sampling)
RUNS = [
    ("few", "data 4 tensor 2", "sampled"),
    ("rest", "data 4 tensor 2", "greedy"),
    ("rest", "data 8", "greedy"),
    ("rest", "data 8", "sampled"),
]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def few(on_eight_devices) -> dict:
    """What the program measured; it has eight CPU devices, this process has one."""
    return on_eight_devices("rollout/mesh_program.py", "few")


@pytest.fixture(scope="module")
def rest(on_eight_devices) -> dict:
    return on_eight_devices("rollout/mesh_program.py", "rest")


@pytest.mark.parametrize(("which", "mesh", "sampling"), RUNS)
def test_completions_do_not_depend_on_the_mesh(request, which, mesh, sampling):
    """Through refilled rows, growing caches and moves into smaller ones."""
    own = request.getfixturevalue(which)["rollouts"][mesh][sampling]
    assert own["same"]
    assert own["logp"] <= TOLERANCE
    assert own["completions"] == 42
    assert own["different"] >= 21
    assert own["lengths"] > 10
    assert own["moves"] >= 1


@pytest.mark.parametrize(("which", "mesh", "sampling"), RUNS)
def test_nothing_compiles_after_warm_up(request, which, mesh, sampling):
    own = request.getfixturevalue(which)["rollouts"][mesh][sampling]
    assert own["compiled"] == 0
    assert 2 <= own["programs"] <= 8
    # Compiled side by side, and found where they run.
    assert own["decode_programs"] == own["programs"]


def test_weights_are_cut_by_tensor(few):
    assert few["rollouts"]["data 4 tensor 2"]["cut"] > 5


def test_weights_are_whole_without_it(rest):
    assert rest["rollouts"]["data 8"]["cut"] == 0


def test_decoding_on_whole_weights_sends_nothing(few):
    assert few["decode"]["data 8"]["collectives"] == []


def test_decoding_by_tensor_adds_up_activations_and_gathers_no_weights(few):
    """Sums over a completion's state, and what the sampler must agree on: never logits of the whole vocabulary."""
    own = few["decode"]["data 4 tensor 2"]
    operations = {operation for operation, _ in own["collectives"]}
    assert operations <= {"all-reduce", "all-gather"}
    gathered = [shape for operation, group in own["collectives"] if operation == "all-gather" for shape in group]
    assert all(math.prod(shape) <= own["completions"] * 8 for shape in gathered), (
        "a number for each block of 512 tokens"
    )
    for _, group in own["collectives"]:
        for shape in group:
            assert shape not in few["parameters"]
            assert math.prod(shape) <= own["completions"] * 512


def test_caches_are_cut_and_given_away(few):
    """Rows by rows, key-value heads by tensor; every byte of them is donated."""
    assert [few["decode"][mesh]["heads"] for mesh in MESHES] == [2, 1]
    for mesh in MESHES:
        assert few["decode"][mesh]["donated"] == few["decode"][mesh]["held"]


@pytest.mark.parametrize(("which", "shapes"), [("few", 1), ("rest", 3)])
def test_images_are_shared_out(request, which, shapes):
    """Of one size, and of three."""
    own = request.getfixturevalue(which)["features"]
    assert own["gap"] <= TOLERANCE
    assert own["shapes"] == shapes
    assert own["encoded"] == 11


def test_rows_that_do_not_divide_are_refused(few):
    assert "12 rows cannot be shared out to 8 devices" in few["refusal"]
