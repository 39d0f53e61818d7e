"""What every latency backend must do. Subclass, return your backend, and pytest runs the rest.

class TestMyEngine(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return MyEngine()
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import LatencyBackend, random_inputs

_SHAPE = (1, 2, 16, 16)


class _Phantom(nn.Module):
    """A convolution, batch normalisation with its own statistics, and a resize: what derived networks consist of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.linspace(-1, 1, self.conv.weight.numel()).view_as(self.conv.weight))
            assert self.norm.running_mean is not None and self.norm.running_var is not None
            self.norm.running_mean.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
            self.norm.running_var.copy_(torch.tensor([2.0, 0.5, 1.0, 3.0]))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return (N, 4, H, W), float32."""
        half = nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear", align_corners=False)
        features = torch.relu(self.norm(self.conv(half)))
        return nn.functional.interpolate(features, size=image.shape[-2:], mode="bilinear", align_corners=False)


class LatencyBackendSuite:
    """Conformance tests of a `LatencyBackend`; they skip, with the reason, where the engine is not installed."""

    tolerance: float = 1e-4

    def backend(self) -> LatencyBackend:
        """Return the backend under test."""
        raise NotImplementedError

    def usable(self) -> LatencyBackend:
        """Return the backend, or skip the test with the reason."""
        backend = self.backend()
        reason = backend.available()
        if reason is not None:
            pytest.skip(reason)
        return backend

    def test_backend_is_registered_under_its_own_name(self) -> None:
        backend = self.backend()
        assert registry.latency_backends.get(backend.name) is type(backend)

    def test_reason_names_the_pip_line_when_not_available(self) -> None:
        reason = self.backend().available()
        assert reason is None or "pip install" in reason

    def test_engine_computes_what_pytorch_computes(self) -> None:
        module = _Phantom().eval()
        (image,) = random_inputs([_SHAPE])
        engine = self.usable().prepare(module, [_SHAPE], threads=1)
        with torch.inference_mode():
            expected = module(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(engine.run([image])[0], expected, atol=self.tolerance)

    def test_engine_evaluates_when_module_is_in_training_mode_and_leaves_it_so(self) -> None:
        module = _Phantom().train()
        state = {key: value.clone() for key, value in module.state_dict().items()}
        (image,) = random_inputs([_SHAPE])
        given = self.usable().prepare(module, [_SHAPE], threads=1).run([image])[0]
        assert module.training and module.norm.training
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        with torch.inference_mode():
            np.testing.assert_allclose(given, module.eval()(torch.from_numpy(image)).numpy(), atol=self.tolerance)

    def test_record_holds_counts_and_shape(self) -> None:
        record = self.usable().measure(_Phantom(), [_SHAPE], warmup_runs=2, runs=7, threads=1)
        assert (record.n, record.warmup_runs, record.input_shapes) == (7, 2, (_SHAPE,))
        assert 0 < record.median_ms <= record.p95_ms

    def test_larger_network_takes_longer(self) -> None:
        backend = self.usable()
        small = backend.measure(nn.Conv2d(1, 1, 1), [(1, 1, 4, 4)], warmup_runs=2, runs=5, threads=1)
        # About 150 million multiplications against 16: no noise of the machine turns this order round.
        large = backend.measure(nn.Conv2d(64, 64, 3), [(1, 64, 64, 64)], warmup_runs=2, runs=5, threads=1)
        assert large.median_ms > small.median_ms

    def test_environment_names_backend_threads_and_device(self) -> None:
        environment = self.usable().environment(threads=3)
        assert (environment.backend, environment.threads) == (self.backend().name, 3)
        assert environment.device and environment.backend_version and environment.precision and environment.platform

    @pytest.mark.parametrize("runs", [0, -1])
    def test_zero_repeats_are_refused(self, runs: int) -> None:
        with pytest.raises(BackendError, match="1 or more timed runs"):
            self.usable().measure(_Phantom(), [_SHAPE], warmup_runs=0, runs=runs, threads=1)

    def test_negative_warmup_is_refused(self) -> None:
        with pytest.raises(BackendError, match="warmup_runs is -1"):
            self.usable().measure(_Phantom(), [_SHAPE], warmup_runs=-1, runs=1, threads=1)

    def test_zero_threads_are_refused(self) -> None:
        with pytest.raises(BackendError, match="threads is 0"):
            self.usable().measure(_Phantom(), [_SHAPE], warmup_runs=0, runs=1, threads=0)

    @pytest.mark.parametrize("shapes", [[], [(1, 2, 0, 16)], [(1, 2, -16, 16)], [()]])
    def test_shape_that_is_not_positive_is_refused(self, shapes: list[tuple[int, ...]]) -> None:
        with pytest.raises(BackendError, match="must be a positive integer"):
            self.usable().measure(_Phantom(), shapes, warmup_runs=0, runs=1, threads=1)
