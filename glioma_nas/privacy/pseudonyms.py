"""Replace identifiers by keyed hashes, so that only who holds the project's salt can link them back.

A plain hash of a hospital number is no protection: all numbers can be tried in seconds. HMAC-SHA256 with a secret salt
of 32 random bytes gives the same pseudonym for the same person in one project, and an unrelated one in another.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from glioma_nas.errors import StorageError

_SALT_BYTES = 32
_DIGITS = 10
_FORM = re.compile(r"^[PC]-[0-9a-f]{10}(-[0-9a-f]{4})?$")


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


def is_pseudonym(text: str) -> bool:
    """Tell whether a text has the form of a pseudonym of a patient, a case or an imported examination."""
    return bool(_FORM.match(text))


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
