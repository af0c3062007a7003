"""Resized films on disk: the same pixels as without, never another film's, bounded, and no reason for a run to stop."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import SOFT_TOKENS, chat_folder
from transformers import AutoImageProcessor, Gemma3ImageProcessorPil, Qwen2VLImageProcessorPil

from vlmalign.data.films import bounded_folder, resize
from vlmalign.data.films.bounded_folder import BoundedFolder
from vlmalign.data.films.images import BadImage
from vlmalign.data.films.pixels import FixedSquares, open_pixels
from vlmalign.data.films.resize import Recipe, entry_key, resize_film
from vlmalign.data.films.resize_cache import CacheCounts, ResizeCache

MIB = 2**20
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, int | None]]:
    """family -> checkpoint folder, soft tokens of an image."""
    qwen = tmp_path_factory.mktemp("qwen")
    text = Qwen2VLImageProcessorPil().to_dict()
    text["size"] = {"shortest_edge": 4 * 28**2, "longest_edge": 24 * 28**2}
    (qwen / "preprocessor_config.json").write_text(json.dumps(text))
    return {"gemma3": (chat_folder(), SOFT_TOKENS), "qwen2_5_vl": (qwen, None)}


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[str]:
    """Grey and colour, JPEG large enough to be decoded at half its size, 16 bits, transparency."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (301, 422, 4), dtype=np.uint8)
    images = {
        "grey.jpg": Image.fromarray(noise[..., 0]),
        "colour.jpg": Image.fromarray(noise[..., :3]),
        "grey_as_rgb.png": Image.fromarray(np.repeat(noise[..., :1], 3, 2)),
        "deep.png": Image.fromarray(rng.integers(0, 2**16, (80, 55), dtype=np.uint16)),
        "glass.png": Image.fromarray(noise),
    }
    for name, image in images.items():
        image.save(folder / name)
    return [str(folder / name) for name in images]


def opened(folders, family, **options):
    folder, tokens = folders[family]
    return open_pixels(folder, family=family, image_tokens=tokens, **options)


def values(pixels) -> list[np.ndarray]:
    return [x if isinstance(x, np.ndarray) else x.values for x in pixels]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_pixels_from_the_cache_are_those_without_it(folders, films, tmp_path, family, exact):
    plain = opened(folders, family, exact=exact).read(films)
    cold = opened(folders, family, exact=exact, cache=tmp_path)
    warm = opened(folders, family, exact=exact, cache=tmp_path)
    for reader, counts in (
        (cold, CacheCounts(misses=5, stored=5)),
        (warm, CacheCounts(hits=5)),
        (cold, CacheCounts(hits=5, misses=5, stored=5)),
    ):
        found = reader.read(films)
        assert [type(x) for x in found] == [type(x) for x in plain]
        assert all(np.array_equal(a, b) for a, b in zip(values(found), values(plain), strict=True))
        assert reader.cache.counts == counts


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_the_processor_makes_the_same_pixels_of_a_cached_film(folders, films, tmp_path, family):
    """What is looked up by grey level is what the checkpoint's own processor computes of the film in the cache."""
    folder, _ = folders[family]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    reader = opened(folders, family, cache=tmp_path)
    found = values(reader.read(films))
    for path, pixels in zip(films, found, strict=True):
        film = reader.cache.get(entry_key(Path(path).read_bytes(), reader.recipe(path)))
        assert film.dtype == np.uint8
        assert film.ndim == (2 if Path(path).stem in ("grey", "grey_as_rgb", "deep") else 3)
        rgb = film if film.ndim == 3 else np.repeat(film[:, :, None], 3, axis=2)
        whole = processor(rgb, do_resize=False, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        assert np.array_equal(pixels, whole if family == "qwen2_5_vl" else whole[0])


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_grey_is_resized_as_each_channel_of_it(resample):
    rng = np.random.default_rng(resample)
    for _ in range(5):
        size = tuple(int(n) for n in rng.integers(20, 300, 2))
        grey = Image.fromarray(rng.integers(0, 256, rng.integers(20, 300, 2), dtype=np.uint8))
        rgb = np.asarray(grey.convert("RGB").resize(size, resample))
        assert np.array_equal(np.asarray(grey.resize(size, resample)), rgb[..., 0])
        assert (rgb == rgb[..., :1]).all()


def test_a_replaced_film_is_seen_whatever_its_date(folders, tmp_path):
    """Same path, size in bytes, date and inode: only the content tells."""
    path = tmp_path / "film.png"
    reader = opened(folders, "gemma3", cache=tmp_path / "cache")
    found = []
    for level in (10, 200):
        Image.fromarray(np.full((40, 40), level, np.uint8)).save(path, compress_level=0)
        os.utime(path, ns=(10**18, 10**18))
        found.append((path.stat().st_size, path.stat().st_mtime_ns, reader.read([str(path)])[0]))
    assert found[0][:2] == found[1][:2]
    assert [float(np.ptp(pixels)) for _, _, pixels in found] == [0, 0]
    assert found[0][2].mean() == pytest.approx(2 * 10 / 255 - 1)
    assert found[1][2].mean() == pytest.approx(2 * 200 / 255 - 1)
    assert reader.cache.counts == CacheCounts(misses=2, stored=2)


def test_everything_that_changes_pixels_changes_the_key(monkeypatch):
    recipe = Recipe(448, 448, 2, reduce=True)
    asked = [recipe, recipe._replace(height=449), recipe._replace(width=449), recipe._replace(resample=3)]
    asked.append(recipe._replace(reduce=False))
    keys = [entry_key(b"film", r) for r in asked] + [entry_key(b"film2", recipe)]
    monkeypatch.setattr(resize, "_decoder", lambda: ("12.0.0", "6.2", "3.1.0", "x86_64"))
    keys.append(entry_key(b"film", recipe))
    monkeypatch.setattr(resize, "RULES", resize.RULES + 1)
    keys.append(entry_key(b"film", recipe))
    assert len(set(keys)) == len(keys)
    # The size that was in the header says nothing about the pixels that the content does not say.
    assert entry_key(b"film", recipe._replace(source=(3, 4))) == keys[-1]


FILM = np.random.default_rng(3).integers(0, 256, (7, 5), dtype=np.uint8)
DAMAGES = {
    "empty": lambda b: b"",
    "header cut": lambda b: b[:20],
    "pixels cut": lambda b: b[:-9],
    "longer": lambda b: b + b"\0",
    "zeros": lambda b: bytes(len(b)),
    **{f"bit in byte {i}": lambda b, i=i: b[:i] + bytes([b[i] ^ 4]) + b[i + 1 :] for i in (0, 9, 41, 45, 49, 60, 88)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_anew(tmp_path, damage):
    cache = ResizeCache(tmp_path, limit=MIB)
    cache.put(KEY, FILM)
    (path,) = tmp_path.glob("*/" + KEY.hex())
    whole = path.read_bytes()
    assert len(whole) == 91
    path.write_bytes(DAMAGES[damage](whole))
    assert cache.get(KEY) is None
    assert cache.counts == CacheCounts(misses=1, stored=1, corrupt=1)
    cache.put(KEY, FILM)
    assert np.array_equal(cache.get(KEY), FILM)
    assert path.read_bytes() == whole


def test_an_entry_under_another_name_is_damaged(tmp_path):
    cache = ResizeCache(tmp_path, limit=MIB)
    cache.put(KEY, FILM)
    path = next(tmp_path.glob("*/" + KEY.hex()))
    (tmp_path / OTHER.hex()[:2]).mkdir(exist_ok=True)
    path.rename(tmp_path / OTHER.hex()[:2] / OTHER.hex())
    assert cache.get(OTHER) is None
    assert cache.get(KEY) is None
    assert cache.counts == CacheCounts(misses=2, stored=1, corrupt=1)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 3), (1, 1), (1, 200)])
def test_what_is_stored_comes_back(tmp_path, shape):
    cache = ResizeCache(tmp_path, limit=MIB)
    film = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)[::2][1]
    cache.put(KEY, film)
    found = cache.get(KEY)
    assert found.shape == shape
    assert np.array_equal(found, film)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("??/*")}


def test_the_folder_never_exceeds_its_limit_and_forgets_the_oldest(tmp_path):
    """Against a model: random writes and reads; after each, files, sum and order of use are as expected."""
    folder, limit = BoundedFolder(tmp_path, limit=1000), 1000
    rng, model, clock, total_removed = np.random.default_rng(5), {}, 0, 0
    for _ in range(250):
        name, clock = f"{rng.integers(40):02x}00", clock + 1
        if rng.random() < 0.6:
            content = bytes([rng.integers(256)]) * int(rng.integers(1, 200))
            removed = folder.write(name, [content[:1], content[1:]])
            if sum(len(c) for _, c in model.values()) - len(model.get(name, (0, b""))[1]) + len(content) > limit:
                for old in sorted(model, key=lambda n: model[n][0]):
                    held = sum(len(c) for n, (_, c) in model.items() if n != name)
                    if held + len(content) <= 900:
                        break
                    if old != name:
                        del model[old]
                        removed -= 1
                        total_removed += 1
            assert removed == 0
            model[name] = (clock, content)
        else:
            found = folder.read(name)
            assert found == model.get(name, (0, None))[1]
            if found is None:
                continue
            model[name] = (clock, found)
        # The clock of a file system is coarser than this test.
        os.utime(tmp_path / name[:2] / name, ns=(clock, clock))
        assert sizes(tmp_path) == {name: len(content) for name, (_, content) in model.items()}
        assert sum(sizes(tmp_path).values()) <= limit
        assert int((tmp_path / "usage").read_text()) == sum(sizes(tmp_path).values())
    assert total_removed > 30
    assert list((tmp_path / "partial").iterdir()) == []


def test_reading_keeps_a_file_from_being_forgotten(tmp_path):
    folder = BoundedFolder(tmp_path, limit=100)
    for i, name in enumerate(("aa", "bb", "cc")):
        folder.write(name, [b"x" * 30])
        os.utime(tmp_path / name / name, ns=(i, i))
    folder.read("aa")
    assert folder.write("dd", [b"x" * 30]) == 1
    assert set(sizes(tmp_path)) == {"aa", "cc", "dd"}


def test_sizes_at_the_limit(tmp_path):
    folder = BoundedFolder(tmp_path, limit=100)
    assert folder.write("aa", [b"x" * 101]) is None
    assert sizes(tmp_path) == {}
    assert folder.write("aa", [b"x" * 100]) == 0
    assert folder.write("aa", [b"y" * 100]) == 0  # over itself
    assert folder.write("bb", [b"z"]) == 1
    assert sizes(tmp_path) == {"bb": 1}
    with pytest.raises(ValueError, match="at least 1 byte, found 0"):
        BoundedFolder(tmp_path, limit=0)
    cache = ResizeCache(tmp_path, limit=50)
    cache.put(KEY, FILM)
    assert cache.counts == CacheCounts()


@pytest.mark.parametrize("usage", [b"", b"12", b"%020d\n" % 10**9, b"not a number of 20 \n\n"])
def test_a_lost_or_overstated_sum_is_counted_anew(tmp_path, usage):
    """As a power cut or a killed process leaves it: nothing is removed that fits."""
    folder = BoundedFolder(tmp_path, limit=100)
    folder.write("aa", [b"x" * 30])
    (tmp_path / "usage").write_bytes(usage)
    assert folder.write("bb", [b"x" * 30]) == 0
    assert int((tmp_path / "usage").read_text()) == 60
    assert sizes(tmp_path) == {"aa": 30, "bb": 30}


def test_a_smaller_limit_holds_from_the_next_write(tmp_path):
    for i in range(9):
        BoundedFolder(tmp_path, limit=100).write(f"{i}{i}", [b"x" * 10])
    assert BoundedFolder(tmp_path, limit=50).write("aa", [b"x" * 10]) == 6
    assert sum(sizes(tmp_path).values()) == 40


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path):
    folder = BoundedFolder(tmp_path, limit=50)
    folder.write("aa", [b"x" * 30])
    for name, age in (("old", bounded_folder.ABANDONED_S + 60), ("young", 60)):
        path = tmp_path / "partial" / name
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age, time.time() - age))
    folder.write("bb", [b"x" * 30])
    assert {path.name for path in (tmp_path / "partial").iterdir()} == {"young"}


WORKER = """
import sys
from pathlib import Path
import numpy as np
from vlmalign.data.films.resize_cache import ResizeCache
folder, seed, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, cache = np.random.default_rng(seed), ResizeCache(folder, limit=limit)
for _ in range(300):
    number = int(rng.integers(40))
    key, film = bytes([number] * 32), np.full((10 + number, 50), number, np.uint8)
    found = cache.get(key)
    if found is None:
        cache.put(key, film)
    else:
        assert np.array_equal(found, film), number
    if _ % 20 == 0:
        with cache._files._locked():  # else files come and go while they are added up
            held = sum(p.stat().st_size for p in folder.glob("??/*"))
        assert held <= limit, held
print(cache.counts.hits, cache.counts.removed, cache.counts.corrupt + cache.counts.failed)
"""


def test_several_processes_share_a_folder(tmp_path):
    """Writers of the same and of other entries, readers and removals at once; nobody ever sees half a file."""
    limit = 25_000
    command = [sys.executable, "-W", "error", "-c", WORKER, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(seed), str(limit)], stdout=subprocess.PIPE, text=True) for seed in range(4)
    ]
    found = np.array([[int(n) for n in process.communicate()[0].split()] for process in running])
    assert [process.returncode for process in running] == [0] * 4
    hits, removed, wrong = found.sum(0)
    assert hits > 100
    assert removed > 20
    assert wrong == 0
    assert sum(sizes(tmp_path).values()) == int((tmp_path / "usage").read_text()) <= limit
    assert list((tmp_path / "partial").iterdir()) == []


@contextlib.contextmanager
def disk_full():
    """No file may grow: the file system refuses writes for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_time_only(folders, films, tmp_path):
    plain = values(opened(folders, "gemma3").read(films))
    reader = opened(folders, "gemma3", cache=tmp_path)
    with pytest.warns(RuntimeWarning, match="cache of resized films in .* cannot be used") as said, disk_full():
        found = values(reader.read(films))
    assert len(said) == 1
    assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))
    assert reader.cache.counts == CacheCounts(misses=5, failed=5)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader.read(films)  # there is space again
    assert reader.cache.counts == CacheCounts(misses=10, failed=5, stored=5)


def test_a_folder_that_is_none_costs_time_only(folders, films, tmp_path):
    plain = values(opened(folders, "qwen2_5_vl").read(films))
    (tmp_path / "file").write_text("here first")
    reader = opened(folders, "qwen2_5_vl", cache=tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="Not a directory") as said:
        found = values(reader.read(films))
    assert len(said) == 1
    assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))
    assert reader.cache.counts == CacheCounts(misses=5, failed=10)


def test_films_deleted_or_replaced_after_their_grid_was_read(folders, films, tmp_path):
    """The soft tokens are laid out by then: other pixels must not take their place, from the cache or not."""
    path = tmp_path / "film.jpg"
    reader = opened(folders, "qwen2_5_vl", cache=tmp_path / "cache")
    path.write_bytes(Path(films[0]).read_bytes())
    reader.grid(str(path))
    reader.read([str(path)])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*film\.jpg"):
        reader.read([str(path)])
    Image.fromarray(np.zeros((50, 60), np.uint8)).save(path)
    with pytest.raises(BadImage, match=r"film\.jpg: 60 x 50 pixels, but 422 x 301 .* replaced in between"):
        reader.read([str(path)])
    with pytest.raises(BadImage, match=r"film\.jpg.*unreadable"):
        resize_film(b"text", "film.jpg", reader.recipe(str(path)))


def test_a_processor_that_does_more_is_refused():
    class Brighter(Gemma3ImageProcessorPil):
        def _preprocess(self, images, **settings):
            return super()._preprocess([image // 2 for image in images], **settings)

    size = {"height": 28, "width": 28}
    FixedSquares(Gemma3ImageProcessorPil(size=size), image_tokens=4)
    with pytest.raises(ValueError, match="Brighter does more than resize, rescale and normalise"):
        FixedSquares(Brighter(size=size), image_tokens=4)
