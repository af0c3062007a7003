"""Numbers as a reader wants them: scores with three decimals, shares in per cent, durations in words, undefined in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNDEFINED = "undefined"
_MINUS = "\u2212"
_LONGEST = 30  # characters of a label in a figure


def number(value: float | None, digits: int = 3) -> str:
    """A score; "undefined" for None, never 0.

    >>> number(0.5), number(None), number(-0.25, 2)
    ('0.500', 'undefined', '−0.25')
    """
    if value is None:
        return UNDEFINED
    text = f"{value:.{digits}f}"
    return text.replace("-", _MINUS) if float(text) else text.lstrip("-")


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign.

    >>> signed(0.1234), signed(-0.0001), signed(None)
    ('+0.123', '0.000', 'undefined')
    """
    text = number(value, digits)
    return f"+{text}" if value is not None and float(f"{value:.{digits}f}") > 0 else text


def bounds(interval: Mapping[str, Any], *, sign: bool = False) -> str:
    """Both ends of an interval, or that it has none; empty where the score itself is undefined.

    >>> bounds({"value": 0.5, "low": 0.41, "high": 0.6})
    '0.410 to 0.600'
    """
    if interval["value"] is None:
        return ""
    if interval["low"] is None or interval["high"] is None:
        return "no interval"
    write = signed if sign else number
    return f"{write(interval['low'])} to {write(interval['high'])}"


def p_value(p: float | None) -> str:
    """A p-value with three decimals, or that it is smaller.

    >>> p_value(0.0462), p_value(0.0004), p_value(None)
    ('0.046', '< 0.001', '')
    """
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def share(value: float, digits: int = 1) -> str:
    """A share in [0, 1] as per cent.

    >>> share(0.056)
    '5.6 %'
    """
    return f"{100 * value:.{digits}f} %"


def count(value: int) -> str:
    """A whole number with its thousands set apart.

    >>> count(112120)
    '112,120'
    """
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them.

    >>> duration(7.25), duration(95), duration(7384)
    ('7.2 s', '1 min 35 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def measured(value: float | None) -> str:
    """A number of any size, with four significant digits (of a large whole number all); a dash for None.

    What is left of a zero after rounding errors (below 1e-9) is written as 0.

    >>> measured(0.000051234), measured(341.26), measured(12040.0), measured(None)
    ('5.123e−05', '341.3', '12,040', '–')
    """
    if value is None:
        return "–"
    if abs(value) < 1e-9:
        return "0"
    large = abs(value) >= 10_000 and value == int(value)
    return (f"{value:,.0f}" if large else f"{value:.4g}").replace("-", _MINUS)


def in_words(value: Any) -> str:
    """A JSON value for a reader.

    >>> in_words(["Edema", "Fracture"]), in_words([]), in_words({"grade": 2}), in_words(None)
    ('Edema, Fracture', 'none', 'grade: 2', '')
    """
    if isinstance(value, dict):
        return "; ".join(f"{key}: {in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(in_words(item) for item in value) or "none"
    return "" if value is None else str(value)


def shorten(text: str, longest: int = _LONGEST) -> str:
    """At most `longest` characters of a text.

    >>> shorten("Enlarged Cardiomediastinum", 12)
    'Enlarged Ca…'
    """
    return text if len(text) <= longest else text[: longest - 1] + "…"


def listed(items: list[str]) -> str:
    """A list in a sentence; at least one item.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
