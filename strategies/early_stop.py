"""Stop a one-shot search before skips take over, or once it is decided.

Reference: Liang et al., DARTS+: Improved Differentiable Architecture Search with Early Stopping, 2019; Tian et al.,
Discretization-aware Architecture Search, Pattern Recognition 2021 (entropy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from glioma_nas.strategies.architecture_parameters import ArchitectureParameters


class EarlyStop:
    """Watch an architecture from epoch to epoch; off unless a limit is given.

    Args:
        max_skip_fraction: Largest share of operator choices that may prefer a skip; none for no limit.
        min_entropy: Smallest entropy of the operator choices at which the search goes on; none for no limit.
        skips: Values of operator choices that are skip connections.
    """

    def __init__(self, max_skip_fraction: float | None, min_entropy: float | None, *, skips: Sequence[Any]) -> None:
        self._max_skip_fraction = max_skip_fraction
        self._min_entropy = min_entropy
        self._skips = frozenset(skips)
        self._accepted: dict[str, Tensor] | None = None
        self.reason: str | None = None

    def skip_fraction(self, parameters: ArchitectureParameters) -> float:
        """Return the share of operator choices whose most probable value is a skip; NaN without operator choices."""
        preferred = parameters.preferred("operator")
        return sum(value in self._skips for value in preferred) / len(preferred) if preferred else math.nan

    def should_stop(self, architectures: nn.Module, watched: ArchitectureParameters) -> bool:
        """Tell whether the search ends here; called once after every search epoch.

        When skips exceeded their limit, all parameters go back to what they were one epoch before.

        Args:
            architectures: Holds the parameters of every architecture.
            watched: The one that the limits are about.
        """
        fraction, entropy = self.skip_fraction(watched), watched.entropy("operator")
        if self._max_skip_fraction is not None and fraction > self._max_skip_fraction:
            self.reason = (
                f"the search stopped early: {100 * fraction:.0f} % of the operator choices preferred a skip, more than "
                f"max_skip_fraction {self._max_skip_fraction:g}"
            )
            if self._accepted is not None:
                architectures.load_state_dict(self._accepted)
                self.reason += "; the architecture parameters of the epoch before were kept"
        elif self._min_entropy is not None and entropy < self._min_entropy:
            self.reason = (
                f"the search stopped early: the operator choices were decided (entropy {entropy:.3f} of the uniform "
                f"one's, less than min_entropy {self._min_entropy:g})"
            )
        elif self._max_skip_fraction is not None:
            self._accepted = {name: value.detach().clone() for name, value in architectures.state_dict().items()}
        return self.reason is not None

    def state_dict(self) -> dict[str, Any]:
        """Return plain data and tensors for a checkpoint."""
        return {"accepted": self._accepted, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._accepted, self.reason = state["accepted"], state["reason"]
