"""One name under the many ways of writing it: case, spacing, underscores, width, list marks, emphasis and quotes.

Everything here takes time linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata

# Characters that leave no mark: control characters but for white space, zero-width and direction marks, soft hyphens,
# variation selectors, the byte-order mark.
_INVISIBLE = [
    *range(0x00, 0x09),
    *range(0x0E, 0x1C),
    0x7F,
    0xAD,
    0x180E,
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
]
_INVISIBLE += [*range(0x2060, 0x2070), *range(0xFE00, 0xFE10), 0xFEFF]
_DASHES = [*range(0x2010, 0x2016), 0x2043, 0x2212, 0xFE58, 0xFE63, 0xFF0D]
_TABLE = dict.fromkeys(_INVISIBLE) | dict.fromkeys(_DASHES, "-")

#: what may stand before a name (it matches at every place, so `sub` takes it off the beginning), once or several times: emphasis, quotes and opening brackets, bullets, a ticked box,
#: a number or a letter as lists have them, "and". An empty box `[ ]` is none of it: it says that the name does not hold.
_BEFORE = re.compile(
    r"(?: |[*_`\"'“”„‘’«»「」『』<({【《#>•·◦▪▫●○■►▶➤∙✓✔✅☑◆◇①-⑳]|-|\+ |\[[xX✓✔]\]|\[(?! ?\])"
    r"|\(?\d{1,3}[.):、]|\(?[A-Za-z][.)] |(?i:and|&) )*"
)
_AFTER = " .。．!！,，:：;；*_`\"'“”‘’«»「」『』)]}>】》…"


def visible(text: str) -> str:
    """`text` without characters that leave no mark, and with one kind of dash."""
    return text.translate(_TABLE)


def fold(name: str) -> str:
    """What two spellings of a name have in common: no case, single spaces, spaces for underscores, one width.

    Give it short texts: Unicode's normal form takes quadratic time on a long run of combining marks.

    >>> fold("Pleural_Thickening"), fold("Ｅｄｅｍａ ")
    ('pleural thickening', 'edema')
    """
    if not name.isascii():
        name = unicodedata.normalize("NFKC", name)
    return " ".join(name.replace("_", " ").casefold().split())


def bare(name: str) -> str:
    """A name without the list marks, quotes, emphasis and full stops around it; "" where nothing else is left.

    >>> bare("2. **Edema**."), bare('"Edema",'), bare("(Edema)"), bare("Edema (mild)."), bare("- [ ] Edema"), bare("***")
    ('Edema', 'Edema', 'Edema', 'Edema (mild)', '[ ] Edema', '')
    """
    name = _BEFORE.sub("", _BEFORE.sub("", name, 1).rstrip(_AFTER), 1)
    return name + ")" if name.count("(") > name.count(")") else name  # "Fracture (acute)" keeps what it is about
