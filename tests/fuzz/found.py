"""The smallest case of each kind of file that fuzzing found unhandled: reader, file, content, and what becomes of it now."""

from __future__ import annotations

DIGITS = b"9" * 400
DEEP = b"[" * 100_000

FOUND = (
    ("stage of a run, to be exported", "stage/made.json", b'{"free": 1}', "refused"),
    ("stage of a run, to be exported", "stage/states/last.safetensors", b"", "refused"),
    # A check of a row outside what names the row; a prompt of null before a completion.
    ("rows of JSON Lines", "conversations.jsonl", b'{"patient": true}', "refused"),
    ("rows of JSON Lines, bad ones skipped", "turns.jsonl", b'{"prompt": null, "completion": "No."}', "refused"),
    # Libraries that take files for what they have written.
    ("rows of a saved folder", "conversations/data-00000-of-00001.arrow", b"", "refused"),
    ("rows of a saved folder", "conversations/dataset_info.json", b"null", "refused"),
    ("chat side of a checkpoint", "tokenizer_config.json", b"null", "refused"),
    ("chat side of a checkpoint", "generation_config.json", b"[", "refused"),
    ("chat side of a checkpoint", "generation_config.json", b'{"eos_token_id": "x"}', "refused"),
    ("rows of a saved folder", "conversations/state.json", b"{}", "refused"),
    ("chat side of a checkpoint", "tokenizer_config.json", b'{"model_max_length": "x"}', "refused"),
    # Cells and names that messages quoted whole, or raw.
    ("table in CSV", "films.csv", b"9" * 5000 + b"\n1\n", "refused"),
    ("table in CSV", "films.csv", b"file,person,direction,findings,part\n\x01.png,P0,AP,plain,train\n", "refused"),
    ("CheXpert tables", "groundtruth.csv", b"\0N" * 3000 + b"\n", "refused"),
    ("NIH ChestX-ray14 table and split list", "train_val_list.txt", b"9" * 5000, "refused"),
    ("NIH ChestX-ray14 table and split list", "train_val_list.txt", b"\x80", "refused"),
    ("studies in YAML", "own_films.yaml", b'{"\\0": 1}', "refused"),
    ("settings by --set", "set.txt", b"\0=1", "refused"),
    ("settings by --set", "set.txt", b"9" * 5000 + b"=1", "refused"),
    ("rows of tasks", "rows.jsonl", b'{"\\ufeffquestion": "?"}', "refused"),
    ("checkpoint folder", "model.safetensors.index.json", b'{"weight_map": {"a": "\\u0016"}}', "refused"),
    # YAML beyond what JSON has, and aliases that stand for billions of values or for themselves.
    ("studies in YAML", "own_films.yaml", b"run: !!bool x", "refused"),
    ("studies in YAML", "own_films.yaml", b"run: !!int ''", "refused"),
    ("studies in YAML", "own_films.yaml", b"run: !!timestamp x", "refused"),
    ("studies in YAML", "own_films.yaml", b"run: !!map 1", "refused"),
    ("studies in YAML", "own_films.yaml", b"sources: &a {mine: *a}", "refused"),
    ("studies in YAML", "own_films.yaml", b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
     + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 10)) for n in b"bcdefghij") + b"sets: *j", "refused"),
    ("run folder: record of a report", "study.yaml", b"run: 2001-99-99\nsets: !!timestamp 2001-99-99", "refused"),
    # Records of a run that are JSON, and not what was written.
    ("run folder: status", "timing.jsonl", b"{}", "refused"),
    ("run folder: status", "timing.jsonl", b"{", "refused"),
    ("run folder: status", "timing.jsonl", b'{"stage": "sft", "seconds": ' + DIGITS + b"}", "refused"),
    ("run folder: status", "stages/sft/made.json", b'{"kind": "sft"}', "refused"),
    ("run folder: status", "stages/sft/made.json", b'{"kind": "sft", "parents": {"from": 1}}', "refused"),
    ("run folder: status", "stages/sft/metrics.jsonl", b'{"step": 1, "objective": "x"}', "refused"),
    ("run folder: status", "scores/exam/results.json", b'{"datasets": [], "results": [{}], "baselines": []}', "refused"),
    ("run folder: status", "scores/exam/results.json", b'{"datasets": [], "results": [{"stage": "s", "dataset": "d", '
     b'"results": {"kind": "choice", "n": 1}}], "baselines": []}', "refused"),
    ("run folder: status", "scores/exam/results.json", b'{"datasets": [{"name": "[/b]\\u001b[2J", "role": "x"}], "results": '
     b'[{"stage": "[/b]\\u001b[2J", "dataset": "[/b]\\u001b[2J", "results": {"kind": "choice", "n": 1, "accuracy": '
     b'{"value": 1, "low": null, "high": null}}}], "baselines": []}', "read"),
    ("run folder: record of a report", "timing.jsonl", b'{"stage": "sft", "seconds": 1e999}', "refused"),
    ("predictions", "predictions.jsonl", b"\x80", "refused"),
    ("predictions", "predictions.jsonl", DEEP, "refused"),
    ("outcomes of rewards", "outcomes.jsonl", b'{"step": 1}\n{"step": 1, "end": 1, "rewards": [], "memory": {}}\n', "refused"),
    ("outcomes of rewards", "outcomes.jsonl", b'{"step": [], "end": 0, "rewards": [], "memory": {}}\n', "refused"),
    ("outcomes of rewards", "outcomes.jsonl", DEEP + b"\n", "refused"),
    ("replies of reward workers", "scored.json", b'[1e999, "scored", null, ""]', "refused"),
    # Settings of another kind, or so large that what is made of them fills the memory.
    ("rows of tasks", "rows.jsonl", b'{"constraints": [{"kind": {}}], "question": "?", "options": ["a", "b"]}', "refused"),
    ("JSON schemas of rewards", "schema.json", b"null", "refused"),
    ("JSON schemas of rewards", "schema.json", b'{"type": 2}', "refused"),
    ("JSON schemas of rewards", "schema.json", b'{"type": [[]]}', "refused"),
    ("JSON schemas of rewards", "schema.json", b'{"properties": {"a": ""}}', "refused"),
    ("config.json of models", "tiny-llama/config.json", b'{"model_type": "llama", "architectures": 1}', "refused"),
    ("config.json of models", "tiny-llama/config.json", b'{"model_type": "llama", "torch_dtype": 1}', "refused"),
    ("config.json of models", "tiny-llama/config.json", b'{"model_type": "gemma3", "text_config": 1}', "refused"),
    ("config.json of models", "tiny-llama/config.json", b'{"model_type": "llama", "num_hidden_layers": 4294967296}', "refused"),
    ("config.json of models", "tiny-llama/config.json", b'{"model_type": "llama", "rope_theta": ' + DIGITS + b"}", "refused"),
    ("adapter folder", "adapter/adapter_config.json", b'{"peft_type": "LORA", "r": 2, "lora_alpha": ' + DIGITS + b"}", "refused"),
    ("adapter folder", "adapter/adapter_config.json", b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [1]}',
     "refused"),
    ("adapter folder", "adapter/adapter_config.json",
     b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": {}}', "refused"),
    # Rows that were read, and lost their patient.
    ("NIH extract and traces", "labels.csv", b"path,image_index,finding_labels,patient_id\nfilms/x.png,,Mass,1\n", "refused"),
    ("NIH extract and traces", "traces.jsonl", b"[" , "refused"),
)  # fmt: skip
