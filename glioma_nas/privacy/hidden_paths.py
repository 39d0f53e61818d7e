"""Take the paths of a case's files out of what is said of it: folders and files are apt to bear patients' names."""

from __future__ import annotations

import re

from glioma_nas.cohort.records import Case


def without_paths(text: str, case: Case) -> str:
    """Return a text in which the files of a case are named by case and sequence, and their folders not at all.

    Give it the whole text and shorten afterwards: half a path would not be recognised.
    """
    files = [(name, path) for name, path in (*case.images.items(), ("mask", case.mask)) if path is not None]
    whole = {str(path): f"{name} of case {case.case_id}" for name, path in files}
    folders = {str(folder): "…" for _, path in files for folder in path.parents if folder.name and path.is_absolute()}
    bare: dict[str, str] = {}
    for name, path in files:
        # Many cohorts give the files of all sequences one name, in a folder for each.
        bare[path.name] = "scan" if path.name in bare else name
    # One pass, so that no replacement breaks up what another one looks for; of those that begin at one place the first
    # of the list is taken.
    said: dict[str, str] = {}
    for group in (whole, folders, bare):
        for found in sorted(group, key=len, reverse=True):
            said.setdefault(found, group[found])
            said.setdefault(repr(found)[1:-1], group[found])  # as the system's errors quote it
    return re.sub("|".join(map(re.escape, said)), lambda match: said[match.group()], text) if said else text


def one_line(err: Exception, case: Case, *, hidden: bool) -> str:
    """Return the end of an error's text as one line, where ``hidden`` without paths of the case."""
    text = without_paths(str(err), case) if hidden else str(err)
    return " ".join(text.split())[-300:]
