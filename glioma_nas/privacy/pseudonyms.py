"""Replace identifiers by keyed hashes, so that only who holds the project's salt can link them back.

A plain hash of a hospital number is no protection: all numbers can be tried in seconds. HMAC-SHA256 with a secret salt
of 32 random bytes gives the same pseudonym for the same person in one project, and an unrelated one in another.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from glioma_nas.cohort.records import Case, Cohort
from glioma_nas.errors import CohortError, StorageError

_SALT_BYTES = 32
_DIGITS = 10


class Pseudonyms:
    """Pseudonyms of one project.

    Args:
        salt: Secret bytes, at least 16.
    """

    def __init__(self, salt: bytes) -> None:
        assert len(salt) >= 16
        self._salt = salt

    def patient(self, patient_id: str) -> str:
        """Return the pseudonym of a patient: ``P-`` and ten hexadecimal digits."""
        return f"P-{self.digest('patient', patient_id)}"

    def case(self, case_id: str) -> str:
        """Return the pseudonym of a case: ``C-`` and ten hexadecimal digits."""
        return f"C-{self.digest('case', case_id)}"

    def digest(self, kind: str, *texts: str, digits: int = _DIGITS) -> str:
        """Return the first hexadecimal digits of the keyed hash of some texts; kinds never share values."""
        message = "\0".join([kind, *texts]).encode("utf-8")
        return hmac.new(self._salt, message, hashlib.sha256).hexdigest()[:digits]


def load_salt(path: Path, *, create: bool) -> bytes:
    """Read the project's salt, or make it with access for its owner alone.

    Raises:
        StorageError: The file is missing and ``create`` is false, is not a salt, or cannot be written.
    """
    if not path.is_file() and create:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened with the mode it keeps: a file that is readable for a moment can be read in that moment.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(_SALT_BYTES) + "\n")
        except OSError as err:
            raise StorageError(f"{path}: cannot be written ({err.strerror or err}); choose another file") from err
    try:
        salt = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as err:
        raise StorageError(f"{path}: {err.strerror or err}; give the file that holds the project's salt") from err
    except ValueError as err:
        raise StorageError(f"{path}: not a salt of hexadecimal digits; restore the project's salt file") from err
    if len(salt) < 16:
        raise StorageError(f"{path}: a salt of {len(salt)} bytes is too short; at least 16 are needed")
    return salt


def pseudonymous(cohort: Cohort, pseudonyms: Pseudonyms) -> Cohort:
    """Return the cohort with hashed case and patient ids; labels are kept.

    Raises:
        CohortError: Two ids got one pseudonym, which chance does once in 10⁶ cohorts of 1000 patients.
    """
    cases = tuple(
        replace(case, case_id=pseudonyms.case(case.case_id), patient_id=pseudonyms.patient(case.patient_id))
        for case in cohort.cases
    )
    _require_distinct(cohort.cases, cases)
    return replace(cohort, cases=cases)


def _require_distinct(before: Iterable[Case], after: Iterable[Case]) -> None:
    for name in ("case_id", "patient_id"):
        if len({getattr(case, name) for case in before}) != len({getattr(case, name) for case in after}):
            raise CohortError(f"two {name}s have one pseudonym; use another salt file")
