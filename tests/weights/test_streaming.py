"""Weights stream from the files to their places: little memory beside the parameters, and every device its own slice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import text, vlm

from vlmalign.models.model import Model
from vlmalign.weights import checkpoint
from vlmalign.weights.checkpoint import load_params


def run(repository: Path, *arguments: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=repository,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def large(repository, tmp_path_factory) -> Path:
    """155 MB in bfloat16, of which embedding and output head are 66 MB each."""
    folder = tmp_path_factory.mktemp("large")
    sizes = ("--vocab", "128256", "--embed", "256", "--ffn", "2048", "--layers", "6", "--file-bytes", "40000000")
    run(repository, "scripts/make_large_checkpoint.py", "--out", folder, *sizes)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("dtype", "devices"), [("bfloat16", 1), ("float32", 1), ("float32", 8)])
def test_memory_beside_the_parameters_stays_below_two_of_the_largest(repository, large, dtype, devices):
    asked = ("--dtype", dtype, "--devices", str(devices))
    found = json.loads(run(repository, "scripts/measure_loading.py", large, *asked))
    assert found["devices"] == devices
    assert found["largest_tensor_bytes"] == 128256 * 256 * jnp.dtype(dtype).itemsize
    assert found["model_bytes"] > 2 * found["largest_tensor_bytes"]
    # The reading sees what is there: with the parameters in it, the peak cannot be below them.
    assert found["excess_bytes"] > 0
    assert found["excess_in_largest_tensors"] < 2, found


ON_EIGHT_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from vlmalign.models.model import Model
from vlmalign.weights import checkpoint

folder = Path(sys.argv[1])
model = Model(checkpoint.load_config(folder), dtype=sys.argv[2])
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
reads, read = [], checkpoint._read
checkpoint._read = lambda opened, stored, dtype, index: (
    reads.append((stored.name, [[s.start, s.stop] for s in index])), read(opened, stored, dtype, index))[1]

def sharding(name, parameter):
    axis = next((i for i, n in reversed(list(enumerate(parameter.shape))) if n % 4 == 0), None)
    return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(len(parameter.shape)))))

whole = checkpoint.load_params(folder, model)
assert len(reads) == len(whole)
reads.clear()
params = checkpoint.load_params(folder, model, sharding=sharding)
divided = 0
for name, value in params.items():
    assert value.sharding == sharding(name, value), name
    assert value.dtype == whole[name].dtype == model.shapes[name].dtype
    np.testing.assert_array_equal(np.asarray(value), np.asarray(whole[name]), err_msg=name)
    own = {shard.data.size for shard in value.addressable_shards}
    assert len(value.addressable_shards) == 8
    assert own == {value.size if value.is_fully_replicated else value.size // 4}, name
    divided += not value.is_fully_replicated
print(json.dumps({"reads": reads, "tensors": len(params), "divided": divided}))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_device_holds_its_slice_and_each_slice_is_read_once(repository, dtype):
    """On a mesh of 2 x 4, divided over the 4: two devices hold each slice."""
    flags = "--xla_force_host_platform_device_count=8"
    found = json.loads(run(repository, "-c", ON_EIGHT_DEVICES, vlm().folder, dtype, XLA_FLAGS=flags))
    assert found["tensors"] == len(vlm().params)
    assert found["divided"] > 10
    reads = [json.dumps(read) for read in found["reads"]]
    assert len(reads) == len(set(reads)) == 4 * found["divided"] + (found["tensors"] - found["divided"])


@pytest.mark.parametrize("chunk", [1, 1000, checkpoint.CHUNK])
@pytest.mark.parametrize("kept", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casts_are_those_of_one_array(tmp_path, monkeypatch, kept, dtype, chunk):
    """However a tensor is divided while it is cast, the values are those of the whole tensor, cast at once."""
    monkeypatch.setattr(checkpoint, "CHUNK", chunk)
    source = load_file(text().folder / "model.safetensors")
    tensors = {name: value.astype(jnp.dtype(kept)) for name, value in source.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = Model(text().model.config, dtype=dtype)
    found = load_params(tmp_path, model)
    assert list(found) == list(model.shapes)
    for name, value in found.items():
        expected = tensors["model." + name.removeprefix("language_model.")].astype(jnp.dtype(dtype))
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(value), expected)


def test_parameters_do_not_lean_on_the_files(tmp_path):
    """Files may be overwritten or removed once they are loaded."""
    tensors = load_file(text().folder / "model.safetensors")
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    found = load_params(tmp_path, text().model)
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    file.unlink()
    assert all(np.array_equal(found[name], value) for name, value in text().params.items())


def test_nothing_is_read_before_everything_fits(tmp_path, monkeypatch):
    tensors = load_file(text().folder / "model.safetensors")
    tensors["zzz"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(checkpoint, "_read", lambda *arguments: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"unknown.*zzz"):
        load_params(tmp_path, text().model)


def test_progress_counts_the_bytes_of_the_files():
    seen = []
    load_params(text().folder, text().model, advance=lambda done, total: seen.append((done, total)))
    with safe_open(text().folder / "model.safetensors", framework="numpy") as opened:
        whole = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - not a mapping
    assert {total for _, total in seen} == {whole}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) == len(text().params)
    assert seen[-1] == (whole, whole)


def test_without_a_sharding_arrays_follow_the_default_device():
    """They are not tied to a device: a computation may bring them where its other arguments are."""
    assert not any(value.committed for value in load_params(text().folder, text().model).values())
    assert jax.devices()[0] in text().params["language_model.norm.weight"].devices()
