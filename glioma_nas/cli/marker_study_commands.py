"""Commands that reproduce the published tables about markers: ``study table-3-2``, ``3-3``, ``5-2``, ``5-3``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    JsonOption,
    OutOption,
    PluginOption,
    SetOption,
    load_plugins,
    load_run_config,
    run_folder,
    shown_progress,
)
from glioma_nas.cli.study_app import study_app

_HELP = {
    "table-3-2": "IDH: two backbones by three input modes, beside baselines and the source's figures.",
    "table-3-3": "IDH: early, late and two middle fusions of the sequences.",
    "table-5-2": "Ki67: ResNet, ResNeSt, CentralNet (with its weights) and KiNet.",
    "table-5-3": "Ki67: the eight ablations of KiNet.",
}
_SHEET_MASKS = ("expert", "given")
_SHOWN = (
    *("model", "n", "n_positive", "auc", "auc_low", "auc_high", "auc_in_source", "accuracy", "accuracy_in_source"),
    *("sensitivity", "sensitivity_in_source", "specificity", "specificity_in_source", "kappa", "kappa_in_source"),
)
MarkerOption = Annotated[
    str | None, typer.Option("--marker", help="marker of the configuration [default: the table's]", show_default=False)
]
PresetOption = Annotated[str, typer.Option("--preset", help="small (CPU) or full (the published sizes, for a GPU)")]
PretrainedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pretrained",
        metavar="BACKBONE=FILE",
        help="local weights a backbone's rows start from, such as resnet50=w.pth",
    ),
]


def _backbone_and_file(text: str) -> tuple[str, Path]:
    from glioma_nas.errors import ConfigError

    backbone, equals, file = text.partition("=")
    if not (backbone and equals and file):
        raise ConfigError(f"--pretrained {text}: give a backbone and its weights file, such as resnet50=weights.pth")
    return backbone, Path(file).resolve()


def _study_command(name: str) -> None:
    def command(
        config: ConfigArgument,
        out: OutOption = None,
        marker: MarkerOption = None,
        preset: PresetOption = "small",
        pretrained: PretrainedOption = None,
        override: SetOption = None,
        plugin: PluginOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from glioma_nas.console import print_table
        from glioma_nas.marker_studies.page import write_page
        from glioma_nas.marker_studies.runner import run_study
        from glioma_nas.marker_studies.tables import TABLES
        from glioma_nas.pipeline import Pipeline

        loaded = load_run_config(config, override, plugin)
        load_plugins(loaded.plugins)
        folder = run_folder(config, out)
        weights_files = dict(_backbone_and_file(text) for text in pretrained or [])
        # Masks of the sheet need no network; a network's need everything up to the segment stage.
        stages = ("preprocess", "latency", "search", "train", "segment")
        with shown_progress() as progress:
            Pipeline(loaded, folder, progress).run(stages[:1] if loaded.classify.masks in _SHEET_MASKS else stages)
            result = run_study(
                loaded,
                TABLES[name],
                run_folder=folder.resolve(),
                progress=progress,
                marker=marker,
                preset=preset,
                pretrained=weights_files,
            )
            write_page(result, loaded)
        rows = [[row[key] for key in _SHOWN] for row in result.rows()]
        rounded = [[round(cell, 4) if isinstance(cell, float) else cell for cell in row] for row in rows]
        print_table(result.table.title, _SHOWN, rounded, as_json=as_json)
        if not as_json:
            typer.echo(result.folder / "report.html")

    study_app.command(name, help=_HELP[name])(command)


for _name in _HELP:
    _study_command(_name)
