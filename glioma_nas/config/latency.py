"""Configuration of the engines: latency measurements and exports."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from glioma_nas.config.section import Section


class LatencyConfig(Section):
    """How inference time is measured."""

    backend: str = Field("onnxruntime", description="registered latency backend")
    precision: str | None = Field(None, description="number format; none: the backend's first")
    threads: int = Field(2, ge=1)
    warmup_runs: int = Field(3, ge=0)
    runs: int = Field(20, ge=1, description="timed runs of a table entry at least; the median counts")
    max_runs: int = Field(60, ge=1, description="timed runs at most, of anything, until the median stands still")
    network_runs: int = Field(50, ge=1, description="timed runs of a whole network at least")
    shared_table: Path | None = Field(None, description="latency table (JSON) that several runs share; made if missing")


class ExportConfig(Section):
    """Write the networks as files and prove that they compute the same."""

    opset: int = Field(17, ge=13, le=20, description="ONNX operator set; what the exporter can write")
    formats: tuple[str, ...] = Field(
        ("safetensors", "torch_export"),
        description="of the student, beside onnx: onnx_int8, openvino, tensorrt_rtx_float16, … (docs/latency.md)",
    )
    bundle: bool = Field(True, description="write the student as a MONAI bundle")
    gpus: tuple[str, ...] = Field(
        ("SM75", "SM80", "SM86", "SM89", "SM120"), description="GPU generations of a tensorrt_rtx engine"
    )
    max_abs_logit_difference: float = Field(1e-3, gt=0)
    min_mask_dice: float = Field(0.999, gt=0, le=1)
    min_reduced_mask_dice: float = Field(
        0.95, gt=0, le=1, description="of 8-bit integers and 16-bit floats, whose logits have no limit"
    )
    calibration_slices: int = Field(32, ge=1, description="training slices that decide the scales of 8-bit integers")
    parity_slices: int = Field(16, ge=1, description="real slices the engines are compared on")
