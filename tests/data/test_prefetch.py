"""Films read ahead by worker processes: the reader's own pixels, errors where a film is used, and nothing left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import SOFT_TOKENS as VLM_TOKENS
from tiny_checkpoints import pictures, vlm
from tiny_tokenizer import SOFT_TOKENS, chat_folder
from transformers import Qwen2VLImageProcessorPil

from vlmalign.data.films import pool as film_pool
from vlmalign.data.films import prefetch
from vlmalign.data.films.images import BadImage
from vlmalign.data.films.pixels import open_pixels
from vlmalign.data.films.prefetch import Announced, PrefetchReader
from vlmalign.data.films.reading import TwoStepReader
from vlmalign.data.films.resize import Recipe, load_film
from vlmalign.data.films.resize_cache import CacheCounts, ResizeCache
from vlmalign.data.pipeline import shuffled_batches
from vlmalign.progress import Progress
from vlmalign.rollout.features import FeatureStore
from vlmalign.studies.engine.base import base_devices, open_base, open_front
from vlmalign.studies.engine.sections import Reading
from vlmalign.studies.engine.stage_config import ModelStage
from vlmalign.types import Grid

FILMS = 12


class Plain:
    """A reader that gives the small film itself, and remembers what it finished."""

    def __init__(self, cache: ResizeCache | None = None):
        self.cache = cache
        self.finished = 0
        self.delay_s = 0.0

    def grid(self, key: str) -> Grid:
        return Grid(1, 4)

    def recipe(self, key: str) -> Recipe:
        return Recipe(8, 8, 2, reduce=False)

    def finish(self, film):
        time.sleep(self.delay_s)
        self.finished += 1
        return film.astype(np.float32)

    def read(self, keys):
        return [self.finish(load_film(key, self.recipe(key), self.cache)) for key in keys]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for i in range(FILMS):
        shape = (60 + i, 90, 3) if i % 2 else (90, 70 + i)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:02d}.jpg")
    return [str(path) for path in sorted(folder.iterdir())]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(x, "values", x), getattr(y, "values", y)) and type(x) is type(y)
        for x, y in zip(a, b, strict=True)
    )


def processes(reader: PrefetchReader) -> list[int]:
    return [worker._process.pid for worker in reader._pool._workers]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_pixels_and_grids_are_the_readers_own(films, tmp_path, family):
    """Announced or not, in any order, twice, cold and warm; what the workers' caches met is added up."""
    folder, tokens = chat_folder(), SOFT_TOKENS
    if family == "qwen2_5_vl":
        folder, tokens = tmp_path, None
        text = Qwen2VLImageProcessorPil().to_dict() | {"size": {"shortest_edge": 4 * 28**2, "longest_edge": 24 * 28**2}}
        (folder / "preprocessor_config.json").write_text(json.dumps(text))
    reader = open_pixels(folder, family=family, image_tokens=tokens, cache=tmp_path / "cache")
    assert isinstance(reader, TwoStepReader)
    expected = open_pixels(folder, family=family, image_tokens=tokens).read(films)
    with PrefetchReader(reader, workers=2, ahead=3) as ahead:
        assert [ahead.grid(film) for film in films] == [reader.grid(film) for film in films]
        assert same(ahead.read(films), expected)
        ahead.expect(films)
        assert same(ahead.read(films[::-1]), expected[::-1])
        assert same(ahead.read([films[3], films[3]]), [expected[3]] * 2)
        assert ahead.read([]) == []
        until(lambda: ahead.statistics().cache.hits + ahead.statistics().cache.misses >= 2 * FILMS + 2)
        found = ahead.statistics()
    assert found.films == 2 * FILMS + 2
    assert (found.cache.misses, found.cache.stored, found.cache.corrupt, found.cache.failed) == (FILMS, FILMS, 0, 0)
    assert found.restarts == 0
    assert 0 < found.waited_s < found.elapsed_s
    assert found.work_s > 0
    assert reader.cache.counts == CacheCounts()


def test_workers_are_light():
    """No JAX: it would start a device; no torch, no transformers: seconds and half a gigabyte for every worker."""
    heavy = "{'jax', 'jaxlib', 'torch', 'transformers', 'flax', 'grain'} & set(sys.modules)"
    code = f"import sys, vlmalign.data.films.worker; print({heavy} or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "none"
    with PrefetchReader(Plain(), workers=1, ahead=1) as reader:
        (pid,) = processes(reader)
        with contextlib.suppress(FileNotFoundError):
            reader.read(["no such film"])
        maps = Path(f"/proc/{pid}/maps").read_text()
    assert "_imaging" in maps
    assert "jaxlib" not in maps


def test_no_more_than_asked_for_is_held(films):
    plain = Plain()
    with PrefetchReader(plain, workers=2, ahead=3) as reader:
        reader.expect(films)
        for taken in range(4):
            assert until(lambda taken=taken: plain.finished == taken + 3)
            time.sleep(0.2)
            assert plain.finished == taken + 3
            reader.read([films[taken]])


def test_what_is_announced_and_never_taken_does_not_stay(films):
    """After PATIENCE x ahead other films its place is free again."""
    plain = Plain()
    with PrefetchReader(plain, workers=1, ahead=2) as reader:
        reader.expect(films[:2])
        assert until(lambda: plain.finished == 2)
        for _ in range(prefetch.PATIENCE * 2 + 1):
            reader.read([films[5]])
        assert reader.statistics().unused == 2
        before = plain.finished
        reader.expect(films[2:4])
        assert until(lambda: plain.finished == before + 2)


def test_films_asked_for_come_before_films_announced(films):
    order = []

    class Slow(Plain):
        def recipe(self, key):
            order.append(Path(key).stem)
            return super().recipe(key)

    with PrefetchReader(Slow(), workers=1, ahead=2) as reader:
        reader.expect(films[:6])
        reader.read([films[8], films[7]])
    # Two were begun; then what is asked for, in its order, and only then the rest.
    assert order[:4] == ["00", "01", "08", "07"]


def test_waiting_is_measured(films):
    plain = Plain()
    with PrefetchReader(plain, workers=1, ahead=4) as reader:
        assert reader.statistics().waited_share == 0
        reader.expect(films[:4])
        assert until(lambda: plain.finished == 4)
        reader.read(films[:4])
        ready = reader.statistics()
        plain.delay_s = 0.4
        reader.read(films[4:6])
        late = reader.statistics()
    assert ready.waited_s < 0.1
    assert 0.8 <= late.waited_s - ready.waited_s <= late.elapsed_s - ready.elapsed_s
    assert 0 < late.waited_share <= 1
    assert str(late).startswith("6 films, waited ")


def test_what_is_wrong_with_a_film_is_raised_where_it_is_used(films, tmp_path):
    cut, deleted = tmp_path / "cut.jpg", tmp_path / "deleted.jpg"
    cut.write_bytes(Path(films[0]).read_bytes()[:500])
    deleted.write_bytes(Path(films[0]).read_bytes())
    plain = Plain()
    with PrefetchReader(plain, workers=2, ahead=8) as reader:
        reader.grid(str(deleted))
        deleted.unlink()
        reader.expect([str(cut), films[0], str(deleted), films[1]])
        assert until(lambda: plain.finished == 2)
        assert same(reader.read(films[:2]), Plain().read(films[:2]))
        with pytest.raises(BadImage, match=r"cut\.jpg: unreadable"):
            reader.read([films[2], str(cut), films[3]])
        with pytest.raises(FileNotFoundError, match=r"no image .*deleted\.jpg"):
            reader.read([str(deleted)])
        assert same(reader.read(films[2:4]), Plain().read(films[2:4]))
        assert reader.statistics().restarts == 0


def test_an_unknown_failure_is_raised_with_the_films_name(films):
    class Odd(Plain):
        def recipe(self, key):
            return super().recipe(key)._replace(resample=99)  # of which Pillow knows nothing

    with PrefetchReader(Odd(), workers=1, ahead=1) as reader:
        with pytest.raises(RuntimeError, match=r"(?s)00\.jpg: reading it failed in a worker process:.*Traceback"):
            reader.read(films[:1])


def test_a_worker_that_dies_is_replaced_and_its_film_read_again(films):
    with PrefetchReader(Plain(), workers=2, ahead=4) as reader:
        reader.read(films[:4])
        for pid in processes(reader):
            os.kill(pid, signal.SIGKILL)
        assert same(reader.read(films), Plain().read(films))
        assert 1 <= reader.statistics().restarts <= 2
        assert reader.statistics().films == FILMS + 4


def test_workers_that_cannot_live_are_an_error_that_names_the_film(films, monkeypatch):
    monkeypatch.setattr(film_pool, "_BOOT", "import sys; sys.exit(3)  # {path} {descriptor}")
    with PrefetchReader(Plain(), workers=1, ahead=1) as reader:
        with pytest.raises(RuntimeError, match=r"00\.jpg: .* ended with exit code 3, and the next .* exit code 3"):
            reader.read(films[:1])


def test_a_cache_that_fails_is_said_once_by_all_workers(films, tmp_path):
    (tmp_path / "file").write_text("here first")
    cache = ResizeCache(tmp_path / "file", limit=2**20)
    with PrefetchReader(Plain(cache), workers=2, ahead=4) as reader:
        with pytest.warns(RuntimeWarning, match="cache of resized films .* cannot be used") as said:
            found = reader.read(films)
        assert reader.statistics().cache.failed == 2 * FILMS
    assert len(said) == 1
    assert same(found, Plain().read(films))


def test_closing_ends_everything_at_once(films):
    plain = Plain()
    plain.delay_s = 0.05
    reader = PrefetchReader(plain, workers=2, ahead=8)
    pids = processes(reader)
    reader.expect(films)
    errors = []

    def wait_for_all():
        try:
            for _ in range(100):
                reader.read(films)
        except (CancelledError, RuntimeError) as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_for_all)
    waiting.start()
    assert until(lambda: plain.finished > 2)
    reader.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert len(errors) == 1
    assert all(until(lambda pid=pid: gone(pid)) for pid in pids)
    reader.close()
    with pytest.raises(RuntimeError, match="after their reader was closed"):
        reader.read(films[:1])


def test_a_reader_that_is_dropped_closes_itself(films):
    reader = PrefetchReader(Plain(), workers=1, ahead=2)
    reader.expect(films)
    pids = processes(reader)
    del reader
    assert all(until(lambda pid=pid: gone(pid)) for pid in pids)


@pytest.mark.parametrize("name", ["workers", "ahead"])
def test_numbers_that_make_no_sense(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        PrefetchReader(Plain(), **{"workers": 1, "ahead": 1, name: 0})


PROGRAM = """
import signal, sys
# Jobs that a shell starts in the background are born with SIGINT ignored, and would pass that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {path!r}
from test_prefetch_program import Plain
from vlmalign.data.films.prefetch import PrefetchReader
reader = PrefetchReader(Plain(), workers=2, ahead=4)
films = {films!r}
reader.expect(films)
reader.read(films[:1])
print(*[worker._process.pid for worker in reader._pool._workers], flush=True)
{end}
"""
ENDS = {
    "killed": ("import time; time.sleep(600)", signal.SIGKILL, -signal.SIGKILL),
    "terminated": ("import time; time.sleep(600)", signal.SIGTERM, -signal.SIGTERM),
    "interrupted": ("while True: reader.read(films)", signal.SIGINT, -signal.SIGINT),
    "raised": ("raise ValueError('of something else')", None, 1),
    "ended": ("", None, 0),
}


@pytest.mark.parametrize("ending", ENDS)
def test_workers_end_with_the_main_process(films, tmp_path, ending):
    """However that ends, and without a script that closes anything; the script is not run again by its workers."""
    last, by, code = ENDS[ending]
    source = Path(__file__).read_text(encoding="utf-8")
    start, stop = source.index("class Plain:"), source.index('@pytest.fixture(scope="module")')
    imports = "import time\nimport numpy as np\nfrom vlmalign.data.films.resize import Recipe, load_film\n"
    imports += "from vlmalign.data.films.resize_cache import ResizeCache\nfrom vlmalign.types import Grid\n"
    (tmp_path / "test_prefetch_program.py").write_text(imports + source[start:stop])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(path=[str(tmp_path)], films=films, end=last))
    running = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        pids = [int(pid) for pid in running.stdout.readline().split()]
        assert len(pids) == 2
        if by is not None:
            assert not any(gone(pid) for pid in pids)
            running.send_signal(by)
        _, said = running.communicate(timeout=60)
        assert running.returncode == code, said
        assert all(until(lambda pid=pid: gone(pid), 20) for pid in pids)
        assert ("Traceback" in said) == (ending in ("interrupted", "raised")), said
    finally:
        running.kill()


def test_a_pipeline_that_takes_early_has_films_read_early(films):
    """grain takes batches ahead of the consumer: their films are announced in the order in which they are used."""
    heard: list[str] = []
    items = [(i, film) for i, film in enumerate(films)]
    announced = Announced(items, films=lambda item: [item[1]], expect=heard.extend)
    assert len(announced) == FILMS
    batches = shuffled_batches(announced, batch=3, seed=1, ahead=2)
    plain = shuffled_batches(items, batch=3, seed=1)
    used: list[str] = []
    for _ in range(6):
        batch = next(batches)
        assert batch == next(plain)
        used += [film for _, film in batch]
        assert until(lambda count=len(used) + 6: len(heard) >= count)
    assert heard[: len(used)] == used


def test_the_feature_store_announces_what_it_will_read():
    """All that a call misses, before its first chunk; and, of what is expected, what it does not hold."""
    heard: list[list[str]] = []

    class Reader:
        def grid(self, key):
            return Grid(1, VLM_TOKENS)

        def read(self, keys):
            heard.append(["read", *keys])
            return list(pictures(keys))

    store = FeatureStore(
        vlm().model, vlm().params, Reader(), chunk=2, announce=lambda keys: heard.append(["soon", *keys])
    )
    store.features(["a", "b", "c", "a"])
    store.expect(["b", "d", "a"])
    store.features(["b"])
    assert heard == [["soon", "a", "b", "c"], ["read", "a", "b"], ["read", "c"], ["soon", "d"], ["soon"]]


def test_a_study_reads_as_its_config_says(repository, films, tmp_path):
    """Workers, and a cache of the right folder and size, behind the features."""
    reading = Reading(workers=1, ahead=4, resize_cache="{run}/resized", resize_cache_gib=0.5)
    section = ModelStage(path=repository / "configs" / "models" / "tiny-medgemma")
    front = open_front(section.path, reading, tmp_path, "stages.base.path")
    with Progress() as progress:
        ahead = open_base(front, base_devices(section, front, None, whole=False), reading, progress)
    try:
        assert len(processes(ahead.reader)) == 1
        cache = ahead.reader._reader.cache
        assert (cache.folder, cache.limit) == (tmp_path / "resized", 2**29)
        ahead.features.expect(films[:3])
        assert until(lambda: len(list(cache.folder.glob("??/*"))) == 3)
        assert same(ahead.features._pictures.read(films), ahead.reader._reader.read(films))
        assert ahead.reader.statistics().films == FILMS
    finally:
        ahead.close()
    assert all(until(lambda pid=pid: gone(pid)) for pid in processes(ahead.reader))
