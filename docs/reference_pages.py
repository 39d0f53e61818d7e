"""Pages of the site that are made from the code: commands, configuration keys, registered components."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site; mkdocs calls it once for each build."""
    for name, content in (
        ("commands", commands_page()),
        ("configuration", configuration_page()),
        ("components", components_page()),
    ):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def commands_page() -> str:
    """Describe every command with its arguments and options."""
    import typer

    from glioma_nas.cli import app

    lines = ["# Commands", "", "Made from the code; `glioma-nas COMMAND --help` shows the same.", ""]
    for name, command in _commands(typer.main.get_command(app), "glioma-nas"):
        described = inspect.cleandoc(command.help or "")
        lines += [f"## {name}", "", described, "", "| argument or option | meaning | default |", "|---|---|---|"]
        for parameter in command.params:
            shown = ", ".join(f"`{item}`" for item in parameter.opts)
            if parameter.param_type_name == "argument":
                shown = f"`{parameter.name.upper()}`"
            default = "required" if parameter.required else _cell(parameter.default)
            lines.append(f"| {shown} | {_escape(getattr(parameter, 'help', '') or '')} | {default} |")
        lines.append("")
    return "\n".join(lines)


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word, child in sorted(inner.items()):
        yield from _commands(child, f"{name} {word}")


def configuration_page() -> str:
    """List every key of the YAML with type, default and meaning."""
    from glioma_nas.config import RunConfig

    lines = [
        "# Configuration",
        "",
        "Made from the code. One YAML file; every key but `cohort.sheet` has a default.",
        "",
    ]
    lines += ["## Top level", "", *_keys(RunConfig)]
    for name, field in RunConfig.model_fields.items():
        model = _model(field.annotation)
        if model is not None:
            lines += [f"## {name}", "", inspect.cleandoc(model.__doc__ or ""), "", *_keys(model)]
            for key, inner in model.model_fields.items():
                below = _model(inner.annotation)
                if below is not None:
                    title = f"{name}.{key}" + (".NAME" if "dict" in str(inner.annotation) else "")
                    lines += [f"### {title}", "", inspect.cleandoc(below.__doc__ or ""), "", *_keys(below)]
    return "\n".join(lines)


def _keys(model: Any) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        # A section that is always there has a heading of its own; one that may be left out is a key as well.
        if isinstance(field.annotation, type) and _model(field.annotation) is not None:
            continue
        default = "required" if field.is_required() else _cell(field.get_default(call_default_factory=True))
        kind = _escape(_type_name(field.annotation))
        lines.append(f"| `{name}` | {kind} | {default} | {_escape(field.description or '')} |")
    return [*lines, ""]


def _model(annotation: Any) -> Any:
    from pydantic import BaseModel

    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return "null" if annotation is type(None) else annotation.__name__
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{item}`" for item in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(item) for item in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    return str(annotation).replace("typing.", "")


def components_page() -> str:
    """List what every registry holds."""
    from glioma_nas.registry import REGISTRIES

    lines = ["# Components", "", "Made from the code; `glioma-nas list` shows the same, your plugins included.", ""]
    for kind, registry in REGISTRIES.items():
        lines += [f"## {kind.replace('_', ' ')}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{entry.name}` | {_escape(entry.summary)} |" for entry in registry.entries()]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return _escape(", ".join(f"`{item}`" for item in value))
    return f"`{value}`"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
