"""Configuration of the engines: latency measurements and exports."""

from __future__ import annotations

from pydantic import Field

from glioma_nas.config.section import Section


class LatencyConfig(Section):
    """How inference time is measured."""

    backend: str = Field("onnxruntime", description="registered latency backend")
    precision: str | None = Field(None, description="number format; none: the backend's first")
    threads: int = Field(2, ge=1)
    warmup_runs: int = Field(3, ge=0)
    runs: int = Field(20, ge=1, description="timed runs of a table entry at least; the median counts")
    max_runs: int = Field(60, ge=1, description="timed runs of a table entry at most, until the median stands still")
    network_runs: int = Field(50, ge=1, description="timed runs of a whole network")


class ExportConfig(Section):
    """Write the student as an ONNX file and prove that it computes the same."""

    opset: int = Field(17, ge=13, le=20, description="ONNX operator set; what the exporter can write")
    max_abs_logit_difference: float = Field(1e-3, gt=0)
    min_mask_dice: float = Field(0.999, gt=0, le=1)
    parity_slices: int = Field(16, ge=1, description="real slices the engines are compared on")
