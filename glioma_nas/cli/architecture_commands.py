"""Look at one network that a search found: ``architecture``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import JsonOption, PluginOption, app, load_plugins
from glioma_nas.errors import ArchitectureError


@app.command("architecture")
def show_architecture(
    record: Annotated[Path, typer.Argument(help="record, such as RUN/search/student.json", show_default=False)],
    svg: Annotated[Path | None, typer.Option("--svg", help="draw here as SVG", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option("--png", help="draw here as PNG", show_default=False)] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a network as a tree of its cells, with what it costs; draw it as SVG or PNG."""
    import sys

    from rich.console import Console

    from glioma_nas.architecture import Architecture
    from glioma_nas.console import print_table, say
    from glioma_nas.files import write_bytes, write_text
    from glioma_nas.registry import search_spaces

    load_plugins(plugin or [])
    found = Architecture.load(record)
    space = search_spaces.get(found.space)(**found.space_options())
    if not hasattr(space, "figures"):
        raise ArchitectureError(f"search space '{found.space}' cannot show its networks; nasbranet can")
    figures = space.figures(found)
    if svg is not None:
        write_text(svg, space.draw(found))
    if png is not None:
        write_bytes(png, space.draw_png(found))
    if not as_json:
        Console(file=sys.stdout, highlight=False).print(space.tree(found))
    fields = ", ".join(f"1/{scale}: {field}" for scale, field in figures.receptive_field_px.items())
    rows = [
        ["MACs, 10⁹", round(figures.macs_g, 4)],
        ["parameters, 10⁶", round(figures.params_m, 4)],
        ["kept by a training pass, MB for a slice", round(figures.activation_mb, 1)],
        ["receptive field before the head, px", fields],
    ]
    side = figures.image_size_px
    print_table(f"{found.id}, {side}x{side} px, batch 1, float32", ["figure", "value"], rows, as_json=as_json)
    if not as_json:
        for path in (svg, png):
            if path is not None:
                say(str(path))
