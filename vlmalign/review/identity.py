"""What makes a protocol the same: its binding settings and the content that it shows, as one SHA-256; and how two differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmalign.config import Config
from vlmalign.review.seeded import digest


def binding(section: Any) -> Any:
    """The settings that can change a result, as JSON; those at their default are left out, so that a setting that a
    later version adds does not change the hash of a protocol that was frozen before.
    """
    if isinstance(section, Config):
        fields = type(section).model_fields
        return {
            name: binding(getattr(section, name))
            for name, field in fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"))
            and (field.is_required() or getattr(section, name) != field.get_default(call_default_factory=True))
        }
    if isinstance(section, Mapping):
        return {key: binding(value) for key, value in section.items()}
    if isinstance(section, tuple):
        return [binding(value) for value in section]
    return section


def protocol_hash(settings: Mapping[str, Any], contents: Mapping[str, Any]) -> str:
    """The SHA-256 that stands in every export: of the binding settings and of the digests of what is shown."""
    return digest(settings, contents)


def differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (before, after), for every setting in which two records differ; None where there is none.

    >>> differences({"seed": 1, "form": {"harm": False}}, {"seed": 2, "form": {}})
    {'form.harm': (False, None), 'seed': (1, 2)}
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*before, *after}):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if before == after else {path: (before, after)}
