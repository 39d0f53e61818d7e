"""Draw predicted against measured latencies of a calibration, and write them down."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from glioma_nas.files import write_bytes, write_text
from glioma_nas.latency_calibration import Calibration, Vector
from glioma_nas.latency_records import LatencyRecord
from glioma_nas.report.figures import BLUE, GREY, MUTED, chart


def write_calibration(
    folder: Path, calibration: Calibration, predicted_ms: Vector, measured: Sequence[LatencyRecord]
) -> None:
    """Write ``calibration.csv`` and ``calibration.png``.

    Args:
        folder: Where.
        calibration: What the predictions are of.
        predicted_ms: Prediction of each network, (n,), those fitted on first.
        measured: Measurement of each, in the same order.
    """
    n_fit = calibration.fitted.n
    measured_ms = [record.median_ms for record in measured]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("p95_ms", "n", "warmup_runs", "median_low_ms", "median_high_ms", "disturbed", "clock_mhz")
    environment = dataclasses.asdict(calibration.environment)
    writer.writerow(["network", "used", "measured_ms", "predicted_ms", *columns, *environment])
    for index, (record, predicted) in enumerate(zip(measured, predicted_ms, strict=True)):
        writer.writerow(
            [
                index,
                "fit" if index < n_fit else "held out",
                round(record.median_ms, 4),
                round(float(predicted), 4),
                *(getattr(record, column) for column in columns),
                *environment.values(),
            ]
        )
    write_text(folder / "calibration.csv", text.getvalue())
    held = calibration.held_out
    tau = "" if held.kendall_tau is None else f", Kendall τ {held.kendall_tau:.3f}"
    words = f"held out, n = {held.n}: MAPE {100 * held.mape:.1f} %{tau}"
    with chart("calibration", f"Predicted against measured latency; {words}", width_in=4.8, height_in=4.2) as drawing:
        axes = drawing.axes
        ends = [min([*predicted_ms, *measured_ms]), max([*predicted_ms, *measured_ms])]
        axes.plot(ends, ends, color=MUTED, lw=0.8, label="equal")
        fit, rest = slice(0, n_fit), slice(n_fit, None)
        axes.scatter(measured_ms[fit], predicted_ms[fit], s=14, color=GREY, label=f"fitted on, n = {n_fit}")
        axes.scatter(measured_ms[rest], predicted_ms[rest], s=18, color=BLUE, label=words)
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("predicted, ms")
        axes.set_title(f"{calibration.environment.backend}, {calibration.environment.threads} thread(s)")
        axes.legend(loc="upper left")
    write_bytes(folder / "calibration.png", drawing.figure.png)
