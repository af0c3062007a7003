"""The readers of the user's files, each with small valid files made by the project's own writers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from bench import Reader, steers
from PIL import Image

from vlmalign.config import dump_config, load_config
from vlmalign.config_yaml import read_yaml
from vlmalign.data.films.depth import check_depth
from vlmalign.data.films.header import image_size
from vlmalign.data.films.images import load_image
from vlmalign.data.sources import chexpert, mimic, nih
from vlmalign.data.sources.examples import write_conversations, write_table
from vlmalign.data.sources.row_files import open_rows
from vlmalign.data.sources.rows import RowSource, read_row
from vlmalign.data.sources.stored_images import StoredImages
from vlmalign.data.sources.table import TableFilms
from vlmalign.data.sources.xray import CheXpertFilms, MimicFilms, NihExtractFilms, NihFilms
from vlmalign.evaluation.metrics import score
from vlmalign.evaluation.results import read_predictions
from vlmalign.log import MetricsWriter
from vlmalign.models.families import read_config
from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.reporting.html import write_report
from vlmalign.reporting.run_folder import read_run
from vlmalign.rewards.contract import Batch
from vlmalign.rewards.contract import attempt as attempt_reward
from vlmalign.rewards.json_schema import check_schema
from vlmalign.rewards.outcomes import OutcomeFile
from vlmalign.rewards.rewards import REWARDS
from vlmalign.rewards.runner import RowFault, ScoredBatch
from vlmalign.rewards.worker import Reply, reply_of
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.files import write_json, write_rows
from vlmalign.studies.engine.graph import build_graph
from vlmalign.studies.engine.record import Parent, Record, begin, differences, finish, read_record
from vlmalign.studies.engine.status import print_status
from vlmalign.studies.engine.summary import print_summary
from vlmalign.tasks.choice import ChoiceTask
from vlmalign.tasks.fields import FieldsTask
from vlmalign.tasks.free import FreeTask
from vlmalign.tasks.instructions import InstructionsTask
from vlmalign.tasks.labels import LabelsTask
from vlmalign.types import Example
from vlmalign.weights.adapter import load_adapter, save_adapter
from vlmalign.weights.checkpoint import load_config as load_model_config
from vlmalign.weights.checkpoint import load_params, save_params, stored_dtype

if TYPE_CHECKING:  # transformers takes its time: imported where it is used
    from vlmalign.data.chat.chat import Chat

REPOSITORY = Path(__file__).resolve().parents[2]
FILMS = 4


def place(text: str) -> Path:
    """Paths of the readers are absolute; only the cache of a run's images is asked for by `{run}`."""
    return Path(text)


# ---------------------------------------------------------------- rows


TURNS = [
    {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes.", "weight": 0.5}], "patient": 7},
    {"prompt": "Is it?", "completion": "No."},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
     "images": ["scans/0000.png"]},
]  # fmt: skip
PAIRS = [
    {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "patient": "a"},
    {"chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "b"}]},
]  # fmt: skip
RECORDS = [
    {"question": "Why?", "options": {"A": "so", "B": "not so"}, "answer": "A", "image": "scans/0000.png", "n": 1.5}
]


def _rows_files(folder: Path) -> Sequence[str]:
    write_conversations(folder, rows=FILMS)
    for name, rows in (("turns", TURNS), ("pairs", PAIRS), ("records", RECORDS)):
        write_rows(folder / f"{name}.jsonl", rows)
    return ["conversations.jsonl", "turns.jsonl", "pairs.jsonl", "records.jsonl"]


def _read_rows(folder: Path, name: str, on_bad: str = "error") -> int:
    if name.endswith(".jsonl"):
        lines = (folder / name).read_bytes().split(b"\n")
        first = next((number for number, line in enumerate(lines, start=1) if line.strip()), 1)
        if on_bad == "error":
            used([read_row(folder / name, first, StoredImages(folder, folder / "cache"))])
    source = RowSource(
        kind="rows", path=folder / name.split("/")[0], images=folder, cache=folder / "cache", on_bad=on_bad
    )
    rows = source.open(place)
    used(rows)
    return len(rows.skipped)


def used(examples: Any) -> None:
    """What is made of examples first: their ids stand in JSON files, their images are named."""
    for example in examples:
        json.dumps([example.id, example.patient, *example.labels], ensure_ascii=False).encode()
        assert example.id
        assert isinstance(example.patient, str)
        assert example.image is None or example.image.is_file()


def _parquet_rows(folder: Path) -> Sequence[str]:
    write_conversations(folder, rows=FILMS, form="parquet")
    return ["conversations.parquet"]


def _saved_rows(folder: Path) -> Sequence[str]:
    path = write_conversations(folder, rows=FILMS, form="saved")
    return [file.relative_to(folder).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]


# ---------------------------------------------------------------- films


def _table(form: str) -> Any:
    def prepare(folder: Path) -> Sequence[str]:
        if form == "jsonl":
            import pandas as pd

            table = pd.read_csv(write_table(folder, films=FILMS, size=16), dtype=str)
            write_rows(folder / "films.jsonl", [{**row, "age": 61.0} for row in table.to_dict("records")])
            return ["films.jsonl"]
        return [write_table(folder, films=FILMS, size=16, form=form).name]

    return prepare


def _read_table(folder: Path, name: str, on_bad: str = "error") -> int:
    common = {"kind": "table", "path": folder / name, "images": folder / "scans", "image": "file", "on_bad": on_bad}
    names = {"column": "findings", "separator": ";"}
    source = TableFilms(**common, patient="person", view="direction", split="part", splits=("train",), labels=names)
    films = source.open(place)
    used(films)
    films.label_matrix()
    return len(films.skipped)


def _label_columns(folder: Path) -> Sequence[str]:
    for number in range(3):
        (folder / f"{number}.png").touch()
    rows = ["file,Veil,Ring,age", "0.png,1,0,61", "1.png,-1,,", "2.png,true,false,7"]
    (folder / "columns.csv").write_text("\n".join(rows) + "\n")
    return ["columns.csv"]


def _read_columns(folder: Path, name: str) -> int:
    labels = ["Veil", "Ring"]
    films = TableFilms(kind="table", path=folder / name, image="file", labels=labels, on_bad="skip").open(place)
    used(films)
    return len(films.skipped)


def _mimic(folder: Path) -> Sequence[str]:
    mimic.write_synthetic(folder, films={"train": FILMS, "validate": 1, "test": 1}, seed=0, size=32)
    return [f"mimic-cxr-2.0.0-{table}.csv.gz" for table in ("metadata", "split", "chexpert")]


def _chexpert(folder: Path) -> Sequence[str]:
    chexpert.write_synthetic(folder, films={"train": FILMS, "valid": 1, "test": 2}, seed=0, size=32)
    return ["train.csv", "groundtruth.csv"]


def _nih(folder: Path) -> Sequence[str]:
    nih.write_synthetic(folder, films={"train_val": FILMS, "test": 2}, seed=0, size=32)
    return ["Data_Entry_2017_v2020.csv", "train_val_list.txt"]


def _extract(folder: Path) -> Sequence[str]:
    rows = nih.write_synthetic_extract(folder, films=FILMS, seed=0, size=32)
    write_rows(folder / "traces.jsonl", [{"id": row["id"], "trace": "The heart is wide."} for row in rows])
    return ["labels.csv", "traces.jsonl"]


def _read_archive(folder: Path, name: str) -> int:
    source = {
        "mimic": lambda: MimicFilms(kind="mimic-cxr-jpg", root=folder),
        "train": lambda: CheXpertFilms(kind="chexpert", root=folder),
        "groun": lambda: CheXpertFilms(kind="chexpert", root=folder, split="test", on_bad="skip"),
        "Data_": lambda: NihFilms(kind="nih-cxr14", root=folder, on_bad="skip"),
        "train_": lambda: NihFilms(kind="nih-cxr14", root=folder, split="train_val"),
        "label": lambda: NihExtractFilms(kind="nih-extract", root=folder, views=("AP", "PA"), on_bad="skip"),
        "trace": lambda: NihExtractFilms(kind="nih-extract", root=folder, traces=folder / "traces.jsonl"),
    }["train_" if name.startswith("train_") else name[:5]]()
    films = source.open(place)
    used(films)
    return len(films.skipped)


# ---------------------------------------------------------------- images


def _images(folder: Path) -> Sequence[str]:
    grey = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(folder / "grey.jpg", quality=90, exif=exif)
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / "colour.jpg", progressive=True)
    Image.fromarray(grey).save(folder / "grey.png", exif=exif)
    Image.fromarray(np.stack([grey] * 4, axis=-1)).save(folder / "transparent.png")
    Image.fromarray(grey).convert("P").save(folder / "palette.png", transparency=0)
    Image.fromarray(grey.astype(np.uint16) * 200).save(folder / "deep.png")
    return sorted(path.name for path in folder.iterdir())


def _dicom(folder: Path) -> Sequence[str]:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    stored = np.random.default_rng(0).integers(0, 4096, (6, 5), dtype=np.uint16)
    for name, syntax in (
        ("explicit", ExplicitVRLittleEndian),
        ("implicit", ImplicitVRLittleEndian),
        ("rle", RLELossless),
    ):
        film = Dataset()
        film.file_meta = FileMetaDataset()
        film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if name == "rle" else syntax
        film.SOPClassUID, film.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
        film.Rows, film.Columns, film.SamplesPerPixel, film.PixelRepresentation = 6, 5, 1, 0
        film.BitsAllocated, film.BitsStored, film.HighBit = 16, 12, 11
        film.PhotometricInterpretation, film.WindowCenter, film.WindowWidth = "MONOCHROME2", 2048, 4096
        film.RescaleSlope, film.RescaleIntercept, film.PixelPaddingValue = 1, 0, 0
        film.PixelData = stored.tobytes()
        film["PixelData"].VR = "OW"
        if name == "rle":
            film.compress(RLELossless)
        film.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return sorted(path.name for path in folder.iterdir())


def _read_image(folder: Path, name: str) -> None:
    path = folder / name
    pixels = load_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*image_size(path), 3)
    check_depth([path])


# ---------------------------------------------------------------- conversations and completions


@cache
def chat_of(name: str) -> Chat:
    from vlmalign.data.chat.chat import open_chat

    folder = REPOSITORY / "configs" / "models" / name
    config = load_model_config(folder)
    tokens = None if config.vision is None else lambda key: 4
    return open_chat(folder, family=config.family, image_tokens=tokens)


def _conversations(folder: Path) -> Sequence[str]:
    (folder / "scans").mkdir()
    Image.new("L", (4, 4)).save(folder / "scans" / "0000.png")
    write_rows(folder / "turns.jsonl", TURNS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    return ["turns.jsonl", "pairs.jsonl"]


def _read_conversation(folder: Path, name: str) -> int:
    from vlmalign.data.chat.preferences import preference_group

    source = RowSource(kind="rows", path=folder / name, cache=folder / "cache", on_bad="skip")
    rows = source.open(place)
    for model in ("tiny-llama", "tiny-medgemma"):
        chat = chat_of(model)
        for number, row in enumerate(rows):
            if model == "tiny-llama" and "image" in json.dumps(row.meta, default=str):
                continue
            try:
                if rows.layout == "preferences":
                    preference_group(row.meta, chat, group_id=number)
                elif rows.layout == "conversations" and row.meta["messages"][-1]["role"] == "assistant":
                    chat.example(row.meta["messages"], group_id=number, name=row.id)
                elif rows.layout == "conversations":
                    chat.prompt(row.meta["messages"], group_id=number, name=row.id)
            except ValueError as error:  # as `Examples` names what it cannot write
                raise ValueError(f"{name}: {error}") from error
    return len(rows.skipped)


LABELS = ("No Finding", "Cardiomegaly", "Edema", "A, B")
TASKS = (
    LabelsTask(kind="labels", labels=LABELS, normal="No Finding", prompt="Which?", synonyms={"Edema": ("oedema",)}),
    ChoiceTask(),
    InstructionsTask(),
    FreeTask(),
    *(
        FieldsTask(
            prompt="?", layout=layout,
            fields={
                "plan": {"kind": "single", "options": ("ICSI", "IVF"), "synonyms": {"ICSI": ("injection",)}},
                "grade": {"kind": "ordinal", "options": ("low", "high"), "required": False},
                "dose": {"kind": "number", "unit": "mg", "units": {"g": 1000}, "high": 1e6},
                "others": {"kind": "list", "names": ("a", "b"), "required": False},
            },
        )
        for layout in ("json", "tags")
    ),
)  # fmt: skip
COLUMNS = {
    "options": {"A": "so", "B": "not so"},
    "constraints": [
        {"kind": "json"}, {"kind": "bullets", "low": 1}, {"kind": "words", "high": 5}, {"kind": "forbidden", "words": ["cure"]},
    ],
    "truth": ["Edema"], "answer": "A", "completion_tokens": 7, "completion_ids": [1, 2, 3, 1, 2, 3],
}  # fmt: skip
SCHEMA = {
    "type": "object", "required": ["plan"], "additionalProperties": False,
    "properties": {
        "plan": {"enum": ["ICSI", 1]}, "dose": {"type": ["number", "null"], "minimum": 0, "maximum": 9},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
}  # fmt: skip
ANSWERS = {
    "labels.txt": "<think>The heart is wide.</think><solution>Cardiomegaly, oedema; A, B</solution>",
    "list.txt": "Findings:\n- **Edema**\n- fracture and flu.\n1. No_Finding",
    "choice.txt": "A looks tempting, but the answer is (B).",
    "fields.json": '{"plan": "ICSI", "grade": "low", "dose": "1.5 g", "others": ["a", "c"]}',
    "tags.txt": "<plan>IVF</plan><dose>3</dose><others>a, b</others>",
}


def _answers(folder: Path) -> Sequence[str]:
    for name, text in ANSWERS.items():
        (folder / name).write_text(text)
    return list(ANSWERS)


@cache
def rewards() -> list[Any]:
    options: dict[str, dict[str, Any]] = {
        "hard": {"labels": LABELS}, "nuanced": {"labels": LABELS, "frequency": (0.25,) * len(LABELS)}, "labels": {"labels": LABELS},
        "contradiction": {"labels": LABELS, "normal": LABELS[0]}, "macro_f1": {"labels": LABELS, "frequency": (0.25,) * len(LABELS)},
        "robust": {"labels": LABELS, "conventions": {"other": {LABELS[0]: LABELS[1]}}}, "json": {"schema": SCHEMA},
        "length": {"high": 8, "high_ramp": 16}, "pattern": {"pattern": r"(a|b)+c"},
    }  # fmt: skip
    return [make(**options.get(name, {})) for name, make in REWARDS.items()]


def _read_answer(folder: Path, name: str) -> None:
    # Tokenizers may write halves of surrogate pairs.
    text = (folder / name).read_bytes().decode("utf-8", "surrogateescape")
    for task in TASKS:
        facts = task.read(text, COLUMNS)
        json.dumps([facts.values, facts.unknown, facts.reason], allow_nan=False)
    batch = Batch(["?"], [text], {column: [value] for column, value in COLUMNS.items()})
    for reward in rewards():
        values = attempt_reward(type(reward).__name__, reward, batch)
        assert isinstance(values, list), f"{type(reward).__name__}: {values}"
        assert values[0] is None or isinstance(values[0], float), f"{type(reward).__name__}: {values}"


ROW = {
    "question": "Why?", "options": ["so", "not so"], "answer": 1, "plan": "ICSI", "grade": "low", "dose": 3, "others": ["a"],
    "constraints": COLUMNS["constraints"], "messages": TURNS[0]["messages"], "trace": "So.",
}  # fmt: skip


def _task_rows(folder: Path) -> Sequence[str]:
    write_rows(folder / "rows.jsonl", [ROW])
    return ["rows.jsonl"]


def _read_task_row(folder: Path, name: str) -> None:
    file = open_rows(folder / name)
    for number in range(len(file)):
        try:
            row = file[number]
        except ValueError as error:
            raise ValueError(f"{file.name(number)}: {error}") from error
        example = Example(file.name(number), "p", None, (), row)
        for task in TASKS[1:3] + TASKS[4:]:
            if not isinstance(task, InstructionsTask):
                task.ask(example)
                task.write(example)
            columns = task.columns(example)
            task.read("The answer is B.", columns)


def _schema(folder: Path) -> Sequence[str]:
    write_json(folder / "schema.json", SCHEMA)
    return ["schema.json"]


def _read_schema(folder: Path, name: str) -> None:
    try:
        found = read_yaml((folder / name).read_text(encoding="utf-8"))
    except UnicodeDecodeError:  # said where the study is read
        raise ValueError("not UTF-8") from None
    check_schema(found)
    (REWARDS["json"](schema=found)).score('{"plan": 1, "names": ["a", 2], "dose": 1e9}')


# ---------------------------------------------------------------- studies


def _studies(folder: Path) -> Sequence[str]:
    found = [
        REPOSITORY / "configs" / name for name in ("own_films.yaml", "align/qwen_grpo.yaml", "align/medgemma_dpo.yaml")
    ]
    for file in found:
        shutil.copy(file, folder)
    return [file.name for file in found]


def _read_study(folder: Path, name: str) -> None:
    study = load_study(folder / name)
    again = folder / "again.yaml"
    again.write_text(dump_config(study), encoding="utf-8")
    assert load_config(type(study), again) == study


def _overrides(folder: Path) -> Sequence[str]:
    shutil.copy(REPOSITORY / "configs" / "own_films.yaml", folder / "study.yaml")
    (folder / "set.txt").write_text("stages.sft.optimiser.learning_rate=1e-4")
    return ["set.txt"]


def _read_override(folder: Path, name: str) -> None:
    text = (folder / name).read_bytes().decode("utf-8", "surrogateescape")  # as Python gives arguments
    load_study(folder / "study.yaml", [text])


def _run_folder(folder: Path) -> Sequence[str]:
    """A run as `vlmalign run` writes it, but for the training: study, records, metrics, answers and scores."""
    write_rows(folder / "rows.jsonl", [{"messages": TURNS[0]["messages"]}] * 4)
    model = REPOSITORY / "configs" / "models" / "tiny-llama"
    written = {
        "run": str(folder),
        "sources": {"rows": {"kind": "rows", "path": str(folder / "rows.jsonl")}},
        "sets": {"held": {"from": "rows", "role": "test"}},
        "tasks": {"exam": {"kind": "choice"}},
        "stages": {
            "base": {"kind": "model", "path": str(model), "lora": {"rank": 4, "alpha": 8}},
            "sft": {
                "kind": "sft",
                "from": "base",
                "data": {"path": str(folder / "rows.jsonl")},
                "steps": 3,
                "batch": 2,
                "shapes": {"rows": 2, "prompt_multiple": 32, "completion_multiple": 16},
                "optimiser": {"learning_rate": 1e-3},
            },
        },
        "answers": {"exam": {"stages": ["sft"], "sets": ["held"], "task": "exam", "completion": 4}},
    }
    (folder / "written.yaml").write_text(json.dumps(written))
    study = load_study(folder / "written.yaml")
    (folder / "study.yaml").write_text(dump_config(study), encoding="utf-8")
    write_json(
        folder / "environment.json", {"started": "2000-01-01T00:00:00", "python": "3.12", "packages": {"jax": "0.11.0"}}
    )
    write_rows(folder / "timing.jsonl", [{"stage": "stages/sft", "seconds": 4.5}])
    record = SFT
    begin(folder / "stages" / "sft", record, {})
    finish(folder / "stages" / "sft", record, {"last": "0" * 64}, {}, files={"left_out.jsonl": [0, "0" * 64]})
    with MetricsWriter(folder / "stages" / "sft" / "metrics.jsonl") as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1.0 / step, "objective": 1.0 / step, "validation/loss": float("nan")})
    write_rows(
        folder / "stages" / "sft" / "left_out.jsonl",
        [{"set": "train", "name": "6", "what": "skipped", "reason": "long"}],
    )
    rows = [
        {"id": str(n), "patient": "p", "valid": True, "truth": "A", "predicted": "A", "unknown": []} for n in range(3)
    ]
    results = [{"stage": "sft", "dataset": "held", "results": score(TASKS[1], rows, draws=20)}]
    scores = {
        "datasets": [{"name": "held", "role": "in-schema", "n": 3}],
        "results": results,
        "baselines": [],
        "differences": [],
    }
    (folder / "scores" / "exam").mkdir(parents=True)
    write_json(folder / "scores" / "exam" / "results.json", scores)
    names = ("study.yaml", "environment.json", "timing.jsonl", "scores/exam/results.json")
    return [*names, *(f"stages/sft/{name}" for name in ("made.json", "metrics.jsonl", "left_out.jsonl"))]


SFT = Record(
    "stages/sft",
    "sft",
    {"steps": 3, "lora": {"rank": 4}},
    {"rows": 8},
    {"from": Parent("stages/base", "1" * 64)},
    {"rows": "2" * 64},
)


def _read_status(folder: Path, name: str) -> None:
    with redirect_stdout(io.StringIO()) as said:
        print_status(folder)
        study = load_study(folder / "study.yaml")
        print_summary(study, build_graph(study))
    assert not steers(said.getvalue()), "characters that steer the terminal"
    found, whole = read_record(folder / "stages" / "sft")
    if found is not None:
        differences(SFT, found, under_way=True, before={"a": 1})
    MetricsWriter(folder / "stages" / "sft" / "metrics.jsonl").close()
    del whole


@cache
def _scored_files() -> dict[str, bytes]:
    """A finished fork of a study with its scores: bootstraps take their time, so it is made once."""
    from run_folders import write_study

    with TemporaryDirectory() as made:
        write_study(Path(made) / "run", films=3, steps=3)
        files = [file for file in sorted((Path(made) / "run").rglob("*")) if file.is_file()]
        return {file.relative_to(Path(made) / "run").as_posix(): file.read_bytes() for file in files}


def _scored_run(folder: Path) -> Sequence[str]:
    for name, content in _scored_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    names = [name for name in _scored_files() if name.endswith((".json", ".jsonl", ".yaml"))]
    return [name for name in names if "grpo-nuanced" not in name and "dpo" not in name]


def _read_run(folder: Path, name: str) -> None:
    read_run(folder)


def _read_report(folder: Path, name: str) -> None:
    write_report(folder)


def _predictions(folder: Path) -> Sequence[str]:
    row = {
        "id": "a",
        "patient": "p",
        "truth": ["Edema"],
        "predicted": ["Edema"],
        "valid": True,
        "unknown": [],
        "completion": "Edema",
    }
    write_rows(folder / "predictions.jsonl", [row, {**row, "id": "b", "predicted": []}])
    return ["predictions.jsonl"]


def _read_predictions(folder: Path, name: str) -> None:
    read_predictions(folder / name)


# ---------------------------------------------------------------- rewards on disk and between processes


def _outcomes(folder: Path) -> Sequence[str]:
    file = OutcomeFile(folder / "outcomes.jsonl")
    for step in (1, 2):
        parts = {"form": [1.0, None], "judge": [0.5, 0.25]}
        scored = ScoredBatch([0.5, None], parts, (RowFault("form", 1, "timeout", "slow"),))
        file.write(step, [(0, 0), (0, 1)], ["a" * 16, "b" * 16], scored, {"seen": [1]})
    file.close()
    return ["outcomes.jsonl"]


def _read_outcomes(folder: Path, name: str) -> None:
    file = OutcomeFile(folder / name)
    try:
        for step in file.steps:
            file.read(step)
    finally:
        file.close()


def _replies(folder: Path) -> Sequence[str]:
    from vlmalign.rewards.contract import Fault

    (folder / "scored.json").write_bytes(Reply(3, "scored", [0.5, None, Fault("crash", "why")]).line())
    (folder / "fault.json").write_bytes(Reply(4, "scored", Fault("timeout", "slow")).line())
    return ["scored.json", "fault.json"]


def _read_reply(folder: Path, name: str) -> None:
    reply_of((folder / name).read_bytes())


# ---------------------------------------------------------------- models


TEXT_MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "torch_dtype": "float32",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64}, "rope_theta": 500000.0,
}  # fmt: skip


def _configs(folder: Path) -> Sequence[str]:
    names = []
    for path in sorted((REPOSITORY / "configs" / "models").iterdir()):
        (folder / path.name).mkdir()
        shutil.copy(path / "config.json", folder / path.name)
        names.append(f"{path.name}/config.json")
    return names


def _read_config(folder: Path, name: str) -> None:
    load_model_config((folder / name).parent)
    stored_dtype((folder / name).parent)


def _checkpoint(folder: Path) -> Sequence[str]:
    model = Model(read_config(TEXT_MODEL))
    params = {name: jnp.zeros(shape.shape, jnp.float32) for name, shape in model.shapes.items()}
    save_params(folder, params, model, TEXT_MODEL)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)
    return ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]


def _read_checkpoint(folder: Path, name: str) -> None:
    config = load_model_config(folder)
    if name == "config.json":  # sizes of a model that is not there would be made first
        return
    load_params(folder, Model(config))


def _inspect(folder: Path, name: str) -> None:
    from vlmalign.inspection.inspect import inspect
    from vlmalign.inspection.report import describe

    assert describe(inspect(folder / "adapter" if name.startswith("adapter") else folder))


def _adapter(folder: Path) -> Sequence[str]:
    model = Model(read_config(TEXT_MODEL), lora=LoraSpec(2, 4.0, ("q_proj", "down_proj")))
    save_adapter(
        folder / "adapter",
        {name: jnp.ones(shape.shape, jnp.float32) for name, shape in model.shapes.items() if is_adapter(name)},
        model,
        base="base",
    )
    return ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def _read_adapter(folder: Path, name: str) -> None:
    load_adapter(folder / "adapter", read_config(TEXT_MODEL))


def _stage(folder: Path) -> Sequence[str]:
    """What a stage of training leaves, for `vlmalign export`."""
    model = Model(read_config(TEXT_MODEL), lora=LoraSpec(2, 4.0, ("q_proj",)))
    params = {name: np.ones(shape.shape, np.float32) for name, shape in model.shapes.items() if is_adapter(name)}
    (folder / "stage" / "states").mkdir(parents=True)
    safetensors.numpy.save_file(params, folder / "stage" / "states" / "last.safetensors", metadata={"step": "3"})
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj"]}
    write_json(folder / "stage" / "made.json", {"kind": "sft", "free": {"base": "base"}, "settings": {"lora": lora}})
    return ["stage/made.json", "stage/states/last.safetensors"]


def _read_stage(folder: Path, name: str) -> None:
    from vlmalign.exporting.sources import open_adapter

    open_adapter(folder / "stage", read_config(TEXT_MODEL))


def _templates(folder: Path) -> Sequence[str]:
    names = []
    for path in sorted((REPOSITORY / "configs" / "models").iterdir()):
        shutil.copy(path / "chat_template.jinja", folder / f"{path.name}.jinja")
        names.append(f"{path.name}.jinja")
    return names


def _read_template(folder: Path, name: str) -> None:
    from vlmalign.data.chat.chat import Chat

    model = chat_of(name.removesuffix(".jinja"))
    tokenizer = model.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = (folder / name).read_bytes().decode("utf-8", "replace")
    try:
        chat = Chat(tokenizer, model.image_text, model.stop_ids, model.image_tokens)
        chat.example(TURNS[0]["messages"])
    finally:
        tokenizer.chat_template = before


def _chat_folder(folder: Path) -> Sequence[str]:
    model = REPOSITORY / "configs" / "models" / "tiny-llama"
    for name in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        shutil.copy(model / name, folder / name)
    write_json(folder / "chat_template.json", {"chat_template": (model / "chat_template.jinja").read_text()})
    return ["tokenizer_config.json", "generation_config.json", "chat_template.json"]


def _read_chat(folder: Path, name: str) -> None:
    from vlmalign.data.chat.chat import open_chat

    open_chat(folder, family="", image_tokens=None).example(TURNS[0]["messages"], name=str(folder))


READERS = (
    Reader("rows of JSON Lines", _rows_files, _read_rows),
    Reader("rows of JSON Lines, bad ones skipped", _rows_files, lambda folder, name: _read_rows(folder, name, "skip")),
    Reader("rows of Parquet", _parquet_rows, lambda folder, name: _read_rows(folder, name, "skip")),
    Reader("rows of a saved folder", _saved_rows, lambda folder, name: _read_rows(folder, name, "skip"), most=2_000),
    Reader("table in CSV", _table("csv"), _read_table),
    Reader("table in CSV, bad films skipped", _table("csv"), lambda folder, name: _read_table(folder, name, "skip")),
    Reader("table in Parquet", _table("parquet"), lambda folder, name: _read_table(folder, name, "skip")),
    Reader("table in JSON Lines", _table("jsonl"), lambda folder, name: _read_table(folder, name, "skip")),
    Reader("table with a column a label", _label_columns, _read_columns),
    Reader("MIMIC-CXR-JPG tables", _mimic, _read_archive, most=2_000),
    Reader("CheXpert tables", _chexpert, _read_archive, most=2_000),
    Reader("NIH ChestX-ray14 table and split list", _nih, _read_archive, most=2_000),
    Reader("NIH extract and traces", _extract, _read_archive),
    Reader("JPEG and PNG films", _images, _read_image),
    Reader("DICOM films", _dicom, _read_image),
    Reader("conversations and preferences as tokens", _conversations, _read_conversation, most=2_000),
    Reader("answers: tasks and rewards", _answers, _read_answer, names_file=False),
    Reader("rows of tasks", _task_rows, _read_task_row),
    Reader("JSON schemas of rewards", _schema, _read_schema, names_file=False),
    Reader("studies in YAML", _studies, _read_study, most=2_000),
    Reader("settings by --set", _overrides, _read_override, most=2_000),
    Reader("run folder: status", _run_folder, _read_status, most=2_000),
    Reader("run folder: record of a report", _scored_run, _read_run, most=2_000),
    Reader("run folder: report", _scored_run, _read_report, most=200),
    Reader("predictions", _predictions, _read_predictions),
    Reader("outcomes of rewards", _outcomes, _read_outcomes),
    Reader("replies of reward workers", _replies, _read_reply, names_file=False),
    Reader("config.json of models", _configs, _read_config),
    Reader("checkpoint folder", _checkpoint, _read_checkpoint, most=2_000),
    Reader("checkpoint folder, inspected", _checkpoint, _inspect, most=2_000),
    Reader("adapter folder", _adapter, _read_adapter),
    Reader("adapter folder, inspected", _adapter, _inspect),
    Reader("stage of a run, to be exported", _stage, _read_stage),
    Reader("chat templates", _templates, _read_template, most=200, names_file=False),
    Reader("chat side of a checkpoint", _chat_folder, _read_chat, most=2_000),
)
