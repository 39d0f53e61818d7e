"""Look components up by name: one registry for each kind, one verb to enter it.

Three ways in, then used by name alike:

* in-tree: any module of ``search_spaces``, ``strategies``, ``evaluators``, ``plugins`` and the kernel's own steps;
* a pip package with an entry point in group ``glioma_nas.plugins`` that names a module;
* a local Python file, named in the configuration (``plugins: [./sharp.py]``) or with ``--plugin``.

All of them register with the decorator, for example ``@operators.register("zoomed_conv")``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from glioma_nas.errors import DuplicateNameError, PluginError, UnknownNameError, did_you_mean

_logger = logging.getLogger(__name__)

T = TypeVar("T")

ENTRY_POINT_GROUP = "glioma_nas.plugins"

_origin: ContextVar[str] = ContextVar("glioma_nas_registry_origin", default="in-tree")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered component.

    Attributes:
        name: What configurations call it.
        component: The class or function.
        origin: ``in-tree``, ``package NAME VERSION`` or ``file PATH``.
    """

    name: str
    component: T
    origin: str

    @property
    def summary(self) -> str:
        """First line of the component's docstring, or an empty string."""
        return next(iter((self.component.__doc__ or "").strip().splitlines()), "")


class Registry(Generic[T]):
    """Components of one kind by name.

    Args:
        kind: What the components are, in the singular, for messages.
        package: The in-tree package whose modules register such components; imported at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters a class or function under ``name``.

        Raises:
            DuplicateNameError: Another component has that name; both origins are named.
        """

        def enter(component: T) -> T:
            known = self._entries.get(name)
            if known is not None and not _same_definition(known.component, component):
                raise DuplicateNameError(
                    f"{self.kind} '{name}' is registered twice: by {known.origin} ({_where(known.component)}) "
                    f"and by {_origin.get()} ({_where(component)}); rename one"
                )
            self._entries[name] = Entry(name, component, _origin.get())
            return component

        return enter

    def get(self, name: str) -> T:
        """Return the component called ``name``.

        Raises:
            UnknownNameError: No component has that name; the nearest one is suggested.
        """
        self._load()
        if name not in self._entries:
            raise UnknownNameError(f"unknown {self.kind} '{name}': {did_you_mean(name, self._entries)}")
        return self._entries[name].component

    def entries(self) -> list[Entry[T]]:
        """List what is registered, by name."""
        self._load()
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self) -> list[str]:
        """List the registered names, sorted."""
        return [entry.name for entry in self.entries()]

    def _load(self) -> None:
        if not self._loaded:
            # What a plugin file imports on its way in is still in-tree.
            with _registering_from("in-tree"):
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                    importlib.import_module(f"{self._package}.{module.name}")
            # Only now: after a module that fails to import, the next look-up must fail as well, not find half.
            self._loaded = True
            load_entry_points()


# Components are Any here because a registry holds classes of libraries that must not be imported at start-up.
operators: Registry[Any] = Registry("operator", "glioma_nas.search_spaces")
search_spaces: Registry[Any] = Registry("search space", "glioma_nas.search_spaces")
strategies: Registry[Any] = Registry("strategy", "glioma_nas.strategies")
evaluators: Registry[Any] = Registry("evaluator", "glioma_nas.evaluators")
latency_backends: Registry[Any] = Registry("latency backend", "glioma_nas.evaluators")
networks: Registry[Any] = Registry("network", "glioma_nas.plugins")
classifiers: Registry[Any] = Registry("classifier", "glioma_nas.plugins")
subtypes: Registry[Any] = Registry("subtype rules", "glioma_nas.plugins")
losses: Registry[Any] = Registry("loss", "glioma_nas.losses")
preprocess_steps: Registry[Any] = Registry("preprocess step", "glioma_nas.preprocess_steps")

REGISTRIES: dict[str, Registry[Any]] = {
    "operators": operators,
    "search_spaces": search_spaces,
    "strategies": strategies,
    "evaluators": evaluators,
    "latency_backends": latency_backends,
    "networks": networks,
    "classifiers": classifiers,
    "subtypes": subtypes,
    "losses": losses,
    "preprocess_steps": preprocess_steps,
}

broken_plugins: dict[str, str] = {}
"""Entry points that failed to import, by name, with the reason; `glioma-nas list` shows them."""

_entry_points_loaded = False


def load_entry_points() -> None:
    """Import every installed plugin package once; one that fails is warned about and listed in `broken_plugins`."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        owner = f"package {point.dist.name} {point.dist.version}" if point.dist else f"entry point {point.name}"
        try:
            with _registering_from(owner):
                point.load()
        except Exception as err:  # noqa: BLE001 - a stranger's package may raise anything, and must not stop the rest
            broken_plugins[point.name] = f"{type(err).__name__}: {err}"
            _logger.warning("plugin '%s' of %s is broken and was left out: %s", point.name, owner, err)


def load_file(path: Path) -> None:
    """Import a local plugin file as ``glioma_nas.local.<stem>``, so that its names resolve again in a child process.

    Raises:
        PluginError: The file is missing, its name is not a Python identifier, or it raises when imported.
    """
    from glioma_nas import local

    with _registering_from(f"file {path}"):
        local.import_plugin(path)


@contextmanager
def _registering_from(origin: str) -> Iterator[None]:
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def _where(component: object) -> str:
    return f"{getattr(component, '__module__', '?')}.{getattr(component, '__qualname__', component)}"


def _same_definition(first: object, second: object) -> bool:
    # A module imported again (a reload, a notebook cell run twice) brings the same definition as a new object.
    return _where(first) == _where(second)


__all__ = [
    "ENTRY_POINT_GROUP",
    "REGISTRIES",
    "Entry",
    "PluginError",
    "Registry",
    "broken_plugins",
    "classifiers",
    "evaluators",
    "latency_backends",
    "load_entry_points",
    "load_file",
    "losses",
    "networks",
    "operators",
    "preprocess_steps",
    "search_spaces",
    "strategies",
    "subtypes",
]
