"""How fast films become pixels: decoding, resizing, normalising; with and without the cache; by worker processes.

    python scripts/bench/input.py                                # 8 invented films of 2544 x 3056 px, Gemma 3 and Qwen2.5-VL
    python scripts/bench/input.py --films 16 --repeats 7 --out scripts/bench/results/input.json

Prints one JSON object, and a table beside it (on stderr). A number is films per second: the median of rounds in each of
which every row ran once, one after the other, so that what else the machine does meets all rows alike. Rows of one core
are comparable with each other; `transformers` is the checkpoint's image processor called as its documentation says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, features
from transformers import Gemma3ImageProcessorPil, Qwen2VLImageProcessorPil

from vlmalign.data.films.images import decode_image
from vlmalign.data.films.levels import level_table, look_up
from vlmalign.data.films.pixels import open_pixels
from vlmalign.data.films.prefetch import PrefetchReader
from vlmalign.data.films.resize import Recipe, entry_key
from vlmalign.data.phantoms.cases import draw_case
from vlmalign.data.phantoms.looks import Look
from vlmalign.data.phantoms.phantom import render

#: the sizes of MedGemma-4B and of Qwen2.5-VL with a common limit (1280 soft tokens)
PROCESSORS = {
    "gemma3": Gemma3ImageProcessorPil(size={"height": 896, "width": 896}),
    "qwen2_5_vl": Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28**2, "longest_edge": 1280 * 28**2}),
}
SOFT_TOKENS = 256
PACKAGES = ("numpy", "pillow", "transformers")

#: row -> seconds that one pass over all films took; a row prepares itself outside of that time
Rows = dict[str, Callable[[], float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=8)
    parser.add_argument("--height", type=int, default=3056, help="of a film, pixels")
    parser.add_argument("--width", type=int, default=2544)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device-ms", type=float, default=200.0, help="time a film takes on the imagined device")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that is not counted")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    for row, rate in result["films_per_second"].items():
        print(f"{row:<52}{rate:9.1f} films/s{1000 / rate:9.1f} ms", file=sys.stderr)
    for row, share in result["device_waits"].items():
        print(f"{row:<52}{100 * share:9.1f} % of the time", file=sys.stderr)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Everything that is printed."""
    films = write_films(folder / "films", arguments.films, arguments.height, arguments.width)
    count, before = len(films), os.getloadavg()
    data = [Path(film).read_bytes() for film in films]
    rows = stages(films, data)
    for family in PROCESSORS:
        rows |= readers(folder / family, family, films, arguments.workers)
    seconds = in_turn(rows, arguments.repeats)
    waits = in_turn(device(folder / "gemma3", films, arguments.workers, arguments.device_ms / 1000), arguments.repeats)
    return {
        "films": {
            "count": count,
            "height": arguments.height,
            "width": arguments.width,
            "mean_megabytes": sum(map(len, data)) / count / 1e6,
        },
        "films_per_second": {row: count / statistics.median(values) for row, values in seconds.items()},
        "device_ms_per_film": arguments.device_ms,
        "device_waits": {row: statistics.median(values) for row, values in waits.items()},
        "seconds_per_pass": seconds,
        "load": {"before": before, "after": os.getloadavg()},
        "versions": {
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "libjpeg_turbo": features.version("libjpeg_turbo"),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "processor": processor_name(),
        },
    }


def write_films(folder: Path, count: int, height: int, width: int) -> list[str]:
    """Grey JPEGs: an invented chest, enlarged, with a detector's grain, so that a file has about the size of a real one."""
    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng(i)
        chest = Image.fromarray(render(draw_case(rng), Look(), rng, 768))
        film = np.asarray(chest.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        film = (film + 2.5 * rng.standard_normal(film.shape, dtype=np.float32)).clip(0, 255).astype(np.uint8)
        Image.fromarray(film).save(folder / f"{i}.jpg", quality=92)
    return [str(folder / f"{i}.jpg") for i in range(count)]


def stages(films: list[str], data: list[bytes]) -> Rows:
    """Each step alone, on one core, on what the step before gives it."""
    processor = PROCESSORS["gemma3"]
    side = (processor.size["height"], processor.size["width"])
    table = level_table(processor)
    full = [decode_image(d, f) for d, f in zip(data, films, strict=True)]
    reduced = [decode_image(d, f, side) for d, f in zip(data, films, strict=True)]
    small = [np.asarray(film.resize(side, processor.resample)) for film in reduced]
    rgb = [np.repeat(film[:, :, None], 3, 2) for film in small]
    recipe = Recipe(*side, int(processor.resample), reduce=True)
    alike = {"do_resize": False, "input_data_format": "channels_last", "return_tensors": "np"}
    steps: dict[str, Callable[[int], object]] = {
        "decode, full scale": lambda i: decode_image(data[i], films[i]),
        "decode, reduced scale": lambda i: decode_image(data[i], films[i], side),
        "resize of full scale, RGB": lambda i: full[i].convert("RGB").resize(side, processor.resample),
        "resize of full scale, grey": lambda i: full[i].resize(side, processor.resample),
        "resize of reduced scale, grey": lambda i: reduced[i].resize(side, processor.resample),
        "normalise, transformers": lambda i: processor(rgb[i], **alike),
        "normalise, table, RGB": lambda i: look_up(table, rgb[i]),
        "normalise, table, grey": lambda i: look_up(table, small[i]),
        "hash of the file (key of the cache)": lambda i: entry_key(data[i], recipe),
    }
    return {name: timed(lambda step=step: [step(i) for i in range(len(films))]) for name, step in steps.items()}


def readers(folder: Path, family: str, films: list[str], workers: list[int]) -> Rows:
    """Whole readers, from path to pixels."""
    folder.mkdir()
    processor = PROCESSORS[family]
    processor.save_pretrained(folder)
    warm = folder / "warm"

    def opened(**options):
        return open_pixels(folder, family=family, image_tokens=SOFT_TOKENS, **options)

    def transformers() -> None:
        for film in films:
            with Image.open(film) as image:
                processor(image, return_tensors="np")

    def cold() -> float:
        reader = opened(cache=folder / "cold")
        seconds = timed(lambda: reader.read(films))()
        assert reader.cache.counts.stored == len(films)
        shutil.rmtree(folder / "cold")
        return seconds

    def ahead(count: int, cache: Path | None) -> float:
        with PrefetchReader(opened(cache=cache), workers=count, ahead=len(films)) as reader:
            reader.read(films[:1] * count)  # the workers have started
            return timed(lambda: reader.read(films))()

    plain, exact, cached = opened(), opened(exact=True), opened(cache=warm)
    cached.read(films)
    rows: Rows = {
        "transformers": timed(transformers),
        "exact": timed(lambda: exact.read(films)),
        "reduced scale": timed(lambda: plain.read(films)),
        "cache, cold": cold,
        "cache, warm": timed(lambda: cached.read(films)),
    }
    for count in workers:
        rows[f"reduced scale, {count} workers"] = lambda count=count: ahead(count, None)
        rows[f"cache, warm, {count} workers"] = lambda count=count: ahead(count, warm)
    return {f"{family}: {name}": row for name, row in rows.items()}


def device(folder: Path, films: list[str], workers: list[int], seconds: float) -> Rows:
    """Share of the time that a device which takes `seconds` per film waits for films; by way of reading."""

    def opened(cache: Path | None):
        return open_pixels(folder, family="gemma3", image_tokens=SOFT_TOKENS, cache=cache)

    def alone(cache: Path | None) -> float:
        reader, waited, began = opened(cache), 0.0, time.perf_counter()
        for film in films:
            waited += timed(lambda film=film: reader.read([film]))()
            time.sleep(seconds)
        return waited / (time.perf_counter() - began)

    def ahead(count: int, cache: Path | None) -> float:
        with PrefetchReader(opened(cache), workers=count, ahead=4) as reader:
            reader.read(films[:1] * count)  # the workers have started
            before = reader.statistics()
            reader.expect(films)
            time.sleep(seconds)  # the step before
            for film in films:
                reader.read([film])
                time.sleep(seconds)
            after = reader.statistics()
            return (after.waited_s - before.waited_s) / (after.elapsed_s - before.elapsed_s)

    rows: Rows = {}
    for name, cache in (("no cache", None), ("cache, warm", folder / "warm")):
        rows[f"device waits: {name}, no workers"] = lambda cache=cache: alone(cache)
        for count in workers:
            rows[f"device waits: {name}, {count} workers"] = lambda count=count, cache=cache: ahead(count, cache)
    return rows


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """The seconds that `run` takes."""

    def seconds() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return seconds


def in_turn(rows: Rows, repeats: int) -> dict[str, list[float]]:
    """What each row gives, row after row and round after round; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, row in rows.items():
            value = row()
            if turn:
                found[name].append(value)
    return found


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines: Iterator[str] = iter(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
