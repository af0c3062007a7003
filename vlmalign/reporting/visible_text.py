"""Text of a model for a page: escaped, and with every character that hides or reorders others shown by its number.

A completion can hold a right-to-left override that makes its letters read in another order than a reward parsed them
in, or zero-width characters that no reader sees. Both become boxes such as U+202E. Tabs and line breaks stay.
"""

from __future__ import annotations

import re
import unicodedata

from markupsafe import Markup, escape

#: First and last of each range. Control characters; what Unicode calls Default_Ignorable_Code_Point
#: (DerivedCoreProperties.txt, 16.0): bidirectional controls, joiners, fillers, variation selectors, tags; line and
#: paragraph separators; interlinear annotation; halves of surrogate pairs, which UTF-8 has not; noncharacters.
INVISIBLE = (
    (0x0000, 0x0008), (0x000B, 0x001F), (0x007F, 0x009F), (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C),
    (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F),
    (0x3164, 0x3164), (0xD800, 0xDFFF), (0xFDD0, 0xFDEF), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFFB), (0xFFFE, 0xFFFF), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip

# The same character many times over is one box: a model that repeats itself would fill the page with them.
_RUN = re.compile("([" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in INVISIBLE) + r"])\1*")


def visible(text: str) -> Markup:
    """`text` as HTML: no markup of its own, every invisible character a box.

    >>> visible("<b>\\u202e")
    Markup('&lt;b&gt;<span class="code" title="RIGHT-TO-LEFT OVERRIDE">U+202E</span>')
    """
    return Markup(_RUN.sub(_box, str(escape(text))))


def plain(text: str) -> str:
    """`text` for places that take no elements (a title, an attribute), still to be escaped.

    >>> plain("a\\u200b\\u200bb")
    'a[U+200B ×2]b'
    """
    return _RUN.sub(lambda found: f"[{_number(found)}]", text)


def _box(found: re.Match[str]) -> str:
    name = unicodedata.name(found[1], "")
    title = f' title="{name}"' if name else ""
    return f'<span class="code"{title}>{_number(found)}</span>'


def _number(found: re.Match[str]) -> str:
    times = len(found[0])
    return f"U+{ord(found[1]):04X}" + (f" ×{times}" if times > 1 else "")
