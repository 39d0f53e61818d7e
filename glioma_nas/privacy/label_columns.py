"""Tell which columns of a sheet of labels would carry something about a person into what is made of it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence

from glioma_nas.privacy.text_patterns import KnownIdentifiers, Span, find_identifiers

_HEADINGS = frozenset(
    [
        "name", "surname", "firstname", "lastname", "birth", "birthday", "birthdate", "dob", "mrn", "ssn", "accession",
        "address", "street", "phone", "telephone", "email", "insurance", "physician", "date", "datum", "geburtsdatum",
        "vorname", "nachname",
    ]
)  # fmt: skip
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# Labels are words and numbers. What is longer has been typed about somebody, and no pattern finds a name in it.
_MAX_LABEL = 40
_NEVER = Span(datetime.date.max, datetime.date.min)


def telling_columns(columns: Mapping[str, Sequence[str]], known: KnownIdentifiers) -> dict[str, str]:
    """Return column → why it must not be copied, only for those that must not.

    Args:
        columns: Heading → cells.
        known: Identifiers of the patients.
    """
    found = {}
    for heading, cells in columns.items():
        hits = (hit.kind for cell in cells for hit in find_identifiers(cell, known, _NEVER))
        if words := {word.lower() for word in _WORDS.findall(heading)} & _HEADINGS:
            found[heading] = f"'{min(words)}' in its heading"
        elif kind := next(hits, None):
            found[heading] = kind
        elif any(len(cell) > _MAX_LABEL for cell in cells):
            found[heading] = f"text of over {_MAX_LABEL} characters"
    return found
