"""What each step of preparing a network for inference brings, on the network of tables 4-3 and 4-4.

    python benchmarks/inference_steps.py

prints a markdown table. One process, one call of each variant a round; a variant differs from the one above it by one
step. "Unshared" runs the cells that both branches have in common twice, as two separate branches would.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import onnxruntime
import torch
from inference import TABLE_NETWORK
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array, Engine, open_backend, random_inputs
from glioma_nas.latency_timing import ratio, summarise, time_engines
from glioma_nas.onnx_export import export_onnx

SHAPE = (1, 2, 224, 224)


class Session(Engine):
    """An ONNX Runtime session with chosen optimisations."""

    def __init__(self, model: bytes, level: Any, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.graph_optimization_level = threads, level
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._feed = {"image": random_inputs([SHAPE])[0]}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        outputs: list[Array] = self._session.run(None, {"image": inputs[0]})
        return outputs

    def call(self) -> None:
        """See `Engine.call`."""
        self._session.run(None, self._feed)


def unshared(space: Any, record: Architecture) -> nn.Module:
    """Build the network with every branch computed by itself from the stem on."""
    plan = space.plan(record)
    steps, outputs = [], {}
    for scale in plan.outputs:
        source = None
        for index in plan.branch_steps(scale):
            step = plan.steps[index]
            steps.append(dataclasses.replace(step, name=f"{step.name}_of_{scale}", source=source, branches=(scale,)))
            source = len(steps) - 1
        outputs[scale] = source
    changed = dataclasses.replace(plan, steps=tuple(steps), outputs=outputs)
    network: nn.Module = type(space.derive(record))(changed, space.layout)
    return network.eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of every variant but those that name theirs")
    args = parser.parse_args()
    n, told = args.threads, f"{args.threads} thread{'s' * (args.threads > 1)}"
    record = Architecture.load(TABLE_NETWORK)
    space = registry.search_spaces.get(record.space)(**record.space_options())
    torch.manual_seed(0)
    network = space.derive(record).eval()
    levels = onnxruntime.GraphOptimizationLevel
    fixed = export_onnx(network, [SHAPE], opset=17)
    # Without the exporter's own folding, batch norms stand as operators of their own in the graph.
    plain = export_onnx(network, [SHAPE], opset=17, dynamic_batch=True, fold_batch_norm=False)
    twice = export_onnx(unshared(space, record), [SHAPE], opset=17)
    engines: dict[str, Engine] = {
        f"PyTorch eager, {told}": open_backend("torch").prepare(network, [SHAPE], threads=n),
        "ONNX Runtime, nothing optimised, open batch size": Session(plain, levels.ORT_DISABLE_ALL, n),
        "+ batch norm folded, sizes of resizes constant": Session(fixed, levels.ORT_DISABLE_ALL, n),
        "+ basic rewriting": Session(fixed, levels.ORT_ENABLE_BASIC, n),
        "+ fusion with activations": Session(fixed, levels.ORT_ENABLE_EXTENDED, n),
        "+ blocked layout: all optimisations": Session(fixed, levels.ORT_ENABLE_ALL, n),
        "the same, branches unshared": Session(twice, levels.ORT_ENABLE_ALL, n),
    }
    if n > 1:
        engines["the same, shared, 1 thread"] = Session(fixed, levels.ORT_ENABLE_ALL, 1)
    for precision in ("float32", "bfloat16", "int8"):
        try:
            backend = open_backend("openvino", precision)
        except BackendError as err:
            print(f"{err}: left out", file=sys.stderr)
            continue
        engines[f"OpenVINO, {precision}, {told}"] = backend.prepare(network, [SHAPE], threads=n)
    engines[f"ONNX Runtime, int8, {told}"] = open_backend("onnxruntime", "int8").prepare(network, [SHAPE], threads=n)
    times = time_engines(engines, warmup_runs=3, runs=args.runs)
    reference = times["+ blocked layout: all optimisations"]
    environment = open_backend("onnxruntime").environment(threads=n)
    print(f"{environment.device}; {told}; input {'×'.join(map(str, SHAPE))}, {args.runs} alternating rounds\n")
    print("| variant | median ms | p95 ms | × ONNX Runtime with all optimisations (5-95 %) |\n|---|---:|---:|---:|")
    for name in engines:
        found, relative = summarise(times[name], warmup_runs=3, input_shapes=[SHAPE]), ratio(times[name], reference)
        print(
            f"| {name} | {found.median_ms:.2f} | {found.p95_ms:.2f} "
            f"| {relative.median:.2f} ({relative.p5:.2f}-{relative.p95:.2f}) |"
        )


if __name__ == "__main__":
    main()
