"""Errors a user can meet, each saying what was given, what is allowed and what to do.

Every class here stands for a mistake the user can mend: the command line prints its message as one line and exits with
status 2. Anything else that escapes is our own fault and exits with status 1 and a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GliomaNasError(Exception):
    """Base of every error the user can mend."""


class ConfigError(GliomaNasError):
    """Report a configuration file that cannot be used."""


class CohortError(GliomaNasError):
    """Report a cohort sheet with missing, duplicate or unusable rows."""


class ImageError(GliomaNasError):
    """Report a scan or mask that is truncated, misshapen or holds impossible values."""


class LeakageError(GliomaNasError):
    """Report a patient that stands on both sides of a split."""


class LabelError(GliomaNasError):
    """Report marker labels that are absent, unknown or of one class only."""


class UnknownNameError(GliomaNasError):
    """Report a component name that no registry holds."""


class DuplicateNameError(GliomaNasError):
    """Report two components registered under one name."""


class PluginError(GliomaNasError):
    """Report a plugin that cannot be loaded."""


class ArchitectureError(GliomaNasError):
    """Report an architecture record or sample that the search space cannot build."""


class BackendError(GliomaNasError):
    """Report a latency or inference engine that is missing or refuses the network."""


class StorageError(GliomaNasError):
    """Report a folder that cannot be written or a disk that is nearly full."""


class ResourceError(GliomaNasError):
    """Report that memory or disk space will not suffice for what was asked."""


class SearchError(GliomaNasError):
    """Report a search that ended without a network that keeps the user's limits."""


class ExperimentError(GliomaNasError):
    """Report an NNI experiment that is missing, cannot be started safely, or failed."""


class DivergedError(GliomaNasError):
    """Report a training run whose loss stopped being a finite number."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Suggest the nearest allowed name and list them all.

    Returns:
        A sentence such as ``did you mean 'flair'? Allowed: flair, t1, t1ce.``
    """
    names = sorted(str(name) for name in allowed)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Allowed: {', '.join(names) or '(none)'}."
