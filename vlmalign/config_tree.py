"""A config's data walked together with its types: defaults filled in, unknown keys found with their nearest neighbour.

pydantic alone would take a section's defaults from the section's class. Here a section given in part starts from the
default that its *parent* states (`sft: Train = Train(steps=400)` keeps 400 when only the rate is set), which is what
a reader of the class expects. All data is in its JSON form: dicts, lists, text, numbers, booleans, None.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python


def nearest(name: str, known: Sequence[str]) -> str:
    """The entry of `known` that looks most like `name`; "" when nothing is known.

    >>> nearest("learning_rat", ["steps", "learning_rate"])
    'learning_rate'
    """
    return max(known, key=lambda k: difflib.SequenceMatcher(None, name.lower(), k.lower()).ratio(), default="")


def join(path: Sequence[str | int]) -> str:
    """A path as it is written in `--set`."""
    return ".".join(str(part) for part in path)


def complete(annotation: Any, data: Any, default: Any, path: tuple[str | int, ...], problems: list[str]) -> Any:
    """`data` of type `annotation` with every default filled in and unknown keys left out (each named in `problems`)."""
    branches = tuple(_branches(annotation))
    if isinstance(data, Mapping):
        models = [b for b in branches if isinstance(b, type) and issubclass(b, BaseModel)]
        if models:
            model = _choose(models, data, default)
            return _complete_section(model, data, default, path, problems) if model else data
        values = next((get_args(b)[1] for b in branches if get_origin(b) in (dict, Mapping)), Any)
        return {k: complete(values, v, PydanticUndefined, (*path, k), problems) for k, v in data.items()}
    if isinstance(data, list):
        items = next((get_args(b) for b in branches if get_origin(b) in (tuple, list, Sequence)), ())
        per_item = items if Ellipsis not in items and len(items) == len(data) else items[:1] * len(data)
        per_item = per_item or (Any,) * len(data)
        return [
            complete(item, value, PydanticUndefined, (*path, index), problems)
            for index, (item, value) in enumerate(zip(per_item, data, strict=True))
        ]
    return data


def _complete_section(
    model: type[BaseModel],
    data: Mapping[str, Any],
    default: Any,
    path: tuple[str | int, ...],
    problems: list[str],
) -> dict[str, Any]:
    keys = {field.alias or name: name for name, field in model.model_fields.items()}
    for key in data:
        if key not in keys:
            known = nearest(str(key), list(keys))
            hint = f"; the nearest known key is {join((*path, known))}" if known else "; this section has no keys"
            problems.append(f"{join((*path, key))}: unknown key{hint}")
    filled: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        stated = isinstance(default, model)
        value = getattr(default, name) if stated else field.get_default(call_default_factory=True)
        key = field.alias or name
        if key in data:
            filled[key] = complete(field.annotation, data[key], value, (*path, key), problems)
        elif value is not PydanticUndefined:
            filled[key] = to_jsonable_python(value, inf_nan_mode="constants", by_alias=True)
    return filled


def _branches(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type: unions flattened, annotations stripped, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _branches(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _branches(member)
    elif annotation is not NoneType:
        yield annotation


def _choose(models: list[type[BaseModel]], data: Mapping[str, Any], default: Any) -> type[BaseModel] | None:
    """Which model of a union `data` means: by its tags (fields of one literal), else by the keys it shares.

    None when the tags are missing or fit no model: the validator then names those that exist.
    """
    if len(models) == 1:
        return models[0]
    if type(default) in models and not any(tag in data for tag in _tags(type(default))):
        return type(default)
    fitting = [m for m in models if all(data.get(tag) in values for tag, values in _tags(m).items())]
    return max(fitting, key=lambda m: sum(key in m.model_fields for key in data), default=None)


def _tags(model: type[BaseModel]) -> dict[str, tuple[Any, ...]]:
    fields = {name: field.annotation for name, field in model.model_fields.items()}
    literals = {name: get_args(a) for name, a in fields.items() if get_origin(a) is Literal}
    return {name: values for name, values in literals.items() if len(values) == 1}
