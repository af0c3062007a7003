"""Training and sampling on eight devices are those on one: same gradients, parameters and samples, and known traffic."""

import pytest

pytestmark = pytest.mark.full

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def few(on_eight_devices) -> dict:
    """What the program measured; it has eight CPU devices, this process has one."""
    return on_eight_devices("training/sharded_program.py", "few")


@pytest.fixture(scope="module")
def rest(on_eight_devices) -> dict:
    return on_eight_devices("training/sharded_program.py", "rest")


@pytest.fixture(scope="module")
def rollouts(on_eight_devices) -> dict:
    return on_eight_devices("training/sharded_program.py", "rollouts")


@pytest.fixture(params=["few", "rest"])
def found(request) -> dict:
    """Of text, and of images."""
    return request.getfixturevalue(request.param)


def test_every_mesh_makes_the_same_updates(found):
    """Gradients, and parameters after one SGD or five AdamW updates; loss, metrics and gradient norm."""
    for case in found["cases"]:
        for what in ("metrics", "gradients", "parameters"):
            assert case[what] <= TOLERANCE, case
        # What is compared is neither zero nor huge, and something was learnt.
        assert 0.01 < case["gradient_size"] < 100, case
        assert case["moved"] > 30 * TOLERANCE, case


def test_every_pair_of_objective_input_parameters_and_mesh_occurs(few, rest):
    cases = [
        case["case"][:4]
        for case in few["cases"] + rest["cases"]
        if not set(case["case"]) & {"replicas 2 data 4", "sft dropout"}
    ]
    assert len(cases) == 9
    for i in range(4):
        for j in range(i):
            pairs = {(case[i], case[j]) for case in cases}
            assert len(pairs) == len({case[i] for case in cases}) * len({case[j] for case in cases})


def test_dropout_is_drawn_by_token_and_not_by_device(few, rest):
    """The same update on one and on eight devices (above), and another one than without dropout."""
    sizes = {tuple(case["case"][:3]): case["gradient_size"] for case in few["cases"] + rest["cases"]}
    dropped, plain = sizes["sft dropout", "text", "lora dropout"], sizes["sft", "text", "lora"]
    # Of gradients: a tenth of the inputs dropped may by chance leave the loss nearly as it was.
    assert abs(dropped / plain - 1) > 100 * TOLERANCE, (dropped, plain)


def test_state_is_cut_and_not_copied(found):
    """Parameters and moments of full fine-tuning on one device, as a share of all: 1/8 or 1/4 and the vectors."""
    limits = {"data 8": (1, 1), "fsdp 8": (0.125, 0.2), "data 2 fsdp 2 tensor 2": (0.25, 0.3)}
    for case in found["cases"]:
        _, _, trained, mesh, _ = case["case"]
        if trained == "all":
            low, high = limits[mesh]
            assert low <= case["share_of_state"] <= high, case


def test_an_adapter_on_copies_of_its_base_reduces_its_gradients_and_nothing_else(found):
    operations = {operation for operation, _ in found["adapter"]["collectives"]}
    shapes = [shape for _, group in found["adapter"]["collectives"] for shape in group]
    assert operations == {"all-reduce"}
    # A gradient may be summed as its transpose.
    assert sorted(sorted(shape) for shape in shapes if shape) == sorted(map(sorted, found["adapter"]["adapter"]))


def test_fsdp_gathers_weights_and_never_activations(rest):
    fsdp = rest["fsdp"]
    operations = {operation for operation, _ in fsdp["collectives"]}
    assert operations <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = [shape for operation, group in fsdp["collectives"] if operation == "all-gather" for shape in group]
    assert sorted(gathered) == sorted(fsdp["cut"]), "each weight once, and nothing but weights"
    for _, group in fsdp["collectives"]:
        assert all(shape in ([], *fsdp["parameters"]) for shape in group), group


def test_samples_do_not_depend_on_the_mesh(rollouts):
    for kind in ("whole", "tensor"):
        assert rollouts[kind]["same"] == [True, True, True]
        assert rollouts[kind]["logp"] <= TOLERANCE
        assert rollouts[kind]["different"] > 12


def test_decoding_moves_no_weights(rollouts):
    """With whole weights the devices only agree on when to stop; weights cut by tensor stay where they are."""
    assert rollouts["whole"]["cut"] == 0
    assert rollouts["whole"]["collectives"] == [["all-reduce", [[]]]]
    assert rollouts["tensor"]["cut"] > 5
    for _, group in rollouts["tensor"]["collectives"]:
        assert all(shape not in rollouts["parameters"] for shape in group), group


def test_rows_that_do_not_divide_and_parameters_elsewhere_are_refused(few):
    assert "4 rows cannot be shared out to 8 devices" in few["refusals"]["rows"]
    assert "a multiple of 8" in few["refusals"]["rows"]
    assert "does not live where its placement says" in few["refusals"]["frozen"]
    assert "mesh.reshard" in few["refusals"]["frozen"]
