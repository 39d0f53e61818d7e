"""Measure every operator a search space can hold and keep the times in a table that survives an interruption."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from glioma_nas import registry
from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import BackendError, did_you_mean
from glioma_nas.files import canonical_json, sha256_text
from glioma_nas.latency_backend import LatencyBackend
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable, Shape
from glioma_nas.progress import Progress, Silent
from glioma_nas.seeding import isolated_torch_rng

_logger = logging.getLogger(__name__)

SAVE_EVERY = 20

_OTHERS = ("torch", "nni", "builtins", "typing", "abc")
"""Packages whose code counts by their versions, which are conditions of the table."""


def build_table(
    specs: Iterable[OperatorSpec],
    backend: LatencyBackend,
    *,
    path: Path,
    warmup_runs: int,
    runs: int,
    threads: int,
    max_runs: int | None = None,
    space: Any = None,  # an NNI model space; NNI's classes are untyped
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure each of ``specs`` at batch size 1 and write the table to ``path``.

    Entries that ``path`` already holds are kept, so an interrupted call continues where it stopped and a second search
    space adds only what is new. An operator whose code has changed since is measured again.

    Args:
        specs: What to measure; duplicates are measured once.
        backend: The engine.
        path: JSON file; written every few entries and at the end, also when the call is interrupted.
        warmup_runs: Untimed calls of each operator.
        runs: Timed calls of each operator at least.
        threads: Threads inside one operator.
        max_runs: Timed calls at most, until the median stands still; none: exactly ``runs``.
        space: Search space to ask for components that are no registered operators (stems, heads).
        progress: Where to report.

    Raises:
        BackendError: The file holds times of another device or engine, or an operator cannot be built or run.
    """
    environment = backend.environment(threads=threads)
    table = LatencyTable(environment)
    if path.exists():
        table = LatencyTable.load(path)
        table.require_same_environment(environment)
    missing = [spec for spec in sorted(set(specs)) if spec not in table or not _is_of(table.record(spec), spec, space)]
    unsaved = 0
    try:
        with (progress or Silent()).task("measuring operators", len(missing)) as task:
            for spec in missing:
                module, shapes = build_operator(spec, space)
                record = backend.measure(
                    module, shapes, warmup_runs=warmup_runs, runs=runs, max_runs=max_runs, threads=threads
                )
                _logger.debug("%s: %.3f ms", spec.key(), record.median_ms)
                table.add(spec, dataclasses.replace(record, component=component_hash(module)))
                unsaved += 1
                if unsaved == SAVE_EVERY:
                    table.save(path)
                    unsaved = 0
                task.advance(latency_ms=record.median_ms)
    finally:
        if unsaved or not path.exists():
            table.save(path)
    table.source = str(path)
    return table


def take_known(
    specs: Iterable[OperatorSpec], known: LatencyTable, path: Path, environment: Environment, space: Any = None
) -> None:
    """Write those of ``specs`` that another table knows to the table at ``path``, beside what it holds.

    Left out is what is not worth keeping: times most of whose calls were disturbed, and those of an operator whose code
    has changed since.

    Raises:
        BackendError: One of the tables was measured elsewhere.
    """
    known.require_same_environment(environment)
    table = LatencyTable.load(path) if path.exists() else LatencyTable(environment)
    worth = {
        spec: known.record(spec)
        for spec in specs
        if spec in known and not known.record(spec).much_disturbed and _is_of(known.record(spec), spec, space)
    }
    table.merge(LatencyTable(known.environment, worth)).save(path)


def build_operator(spec: OperatorSpec, space: Any = None) -> tuple[nn.Module, list[Shape]]:
    """Make the module that ``spec`` describes, as it stands in a derived network, and the shapes of its inputs.

    Its weights are drawn from a generator of its own: the same in every process, so that an engine that was built of it
    once is found in the cache again.

    A registered operator is built from its class. Anything else is asked of ``space.build_component(spec)``, whose
    answer may hold several inputs: their shapes then come from ``space.component_input_shapes(spec)``.

    Raises:
        BackendError: Neither knows the operator.
    """
    with isolated_torch_rng(0, "operator", spec.key()):
        return _built(spec, space)


def _built(spec: OperatorSpec, space: Any) -> tuple[nn.Module, list[Shape]]:
    shapes: list[Shape] = [(1, spec.in_channels, spec.height, spec.width)]
    if spec.operator in registry.operators.names():
        return registry.operators.get(spec.operator)(spec.in_channels, spec.out_channels, spec.stride).eval(), shapes
    component = space.build_component(spec) if hasattr(space, "build_component") else None
    if component is None:
        raise BackendError(
            f"operator '{spec.operator}' of {spec.key()} is neither registered nor built by the search space: "
            f"{did_you_mean(spec.operator, registry.operators.names())}"
        )
    if hasattr(space, "component_input_shapes"):
        shapes = [tuple(shape) for shape in space.component_input_shapes(spec)]
    module: nn.Module = component.eval()
    return module, shapes


def component_hash(module: nn.Module) -> str:
    """Return a hash of what a module computes, 16 hexadecimal digits: its layers, and the code of its classes.

    Comments and docstrings do not count, nor do functions that the classes call.
    """
    classes = {
        kind
        for part in module.modules()
        for kind in type(part).__mro__
        if kind.__module__.partition(".")[0] not in _OTHERS
    }
    code = sorted(f"{kind.__qualname__}: {_code_of(kind)}" for kind in classes)
    return sha256_text(canonical_json({"layers": repr(module), "code": code}))[:16]


@cache
def _code_of(kind: type) -> str:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time, as in a notebook or by a factory
        return ""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a text of several lines that starts left of the class' own margin
        return source
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)  # not ast.dump, which differs from one Python version to the next


def _is_of(record: LatencyRecord, spec: OperatorSpec, space: Any) -> bool:
    """Tell whether a time is one of the operator as it is now; of one that does not say so, a plugin's is not."""
    if record.component:
        return record.component == component_hash(build_operator(spec, space)[0])
    origins = {entry.name: entry.origin for entry in registry.operators.entries()}
    return origins.get(spec.operator, "in-tree") == "in-tree"
