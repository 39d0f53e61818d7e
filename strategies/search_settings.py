"""What a one-shot search of ours can be told, checked once, and how what changes during a search changes.

Every option that makes a search more robust is off by default and switched on by one key; its paper stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glioma_nas.errors import ConfigError, did_you_mean

WIDTH_RULES = ("max", "min", "random", "sampled")
RELAXATIONS = ("softmax", "gumbel")


@dataclass(frozen=True)
class SearchSettings:
    """How the supernet is trained and how its architecture parameters move.

    Attributes:
        latency_weight: λ of eq. 4-11, per ms; where the control begins when ``latency_window_ms`` is given.
        latency_window_ms: (lowest, highest) latency in ms that the network decoded after each epoch should have; λ is
            raised above and lowered below it. Chen et al., FasterSeg, ICLR 2020 steer λ by a window likewise.
        pretrain_epochs: Epochs that train W only.
        pretrain_widths: Width rules of the passes of one step while pretraining.
        search_widths: Likewise while searching.
        architecture_learning_rate: Adam's learning rate for α, β, γ.
        gradient_clip: Largest norm of the gradient of W; 0 for no limit.
        auxiliary_skip: First weight of a skip connection without parameters beside every operator choice; it falls
            linearly to 0 over the search, so that operators need not win as shortcuts. Chu et al., DARTS-: Robustly
            Stepping out of Performance Collapse without Indicators, ICLR 2021 (first weight 1).
        beta_decay: Last weight of the penalty mean(log Σ exp α) over operator choices; it rises linearly from 0.
            Ye et al., β-DARTS: Beta-Decay Regularization for Differentiable Architecture Search, CVPR 2022 (last 50).
        max_skip_fraction: Share of operator choices, in [0, 1], that may prefer a skip; the search stops at the first
            epoch that exceeds it and returns to the epoch before. Liang et al., DARTS+: Improved Differentiable
            Architecture Search with Early Stopping, 2019.
        min_entropy: Mean entropy of the operator choices as a share of the uniform one's, in [0, 1]; below it the
            search is decided and stops. Entropy as the measure of the discretisation gap: Tian et al., Discretization-
            aware Architecture Search, Pattern Recognition 2021.
        gumbel_temperature: (first, last) temperature τ of every Gumbel-softmax; it falls geometrically over the search.
            Jang et al., Categorical Reparameterization with Gumbel-Softmax, ICLR 2017; Xie et al., SNAS, ICLR 2019.
        operator_relaxation: ``softmax`` mixes by α and β themselves (DARTS); ``gumbel`` by a Gumbel-softmax sample of
            them, which nears one path as τ falls (SNAS).
    """

    latency_weight: float = 0.01
    latency_window_ms: Any = None
    pretrain_epochs: int = 20
    pretrain_widths: Sequence[str] = ("max", "min", "random", "random")
    search_widths: Sequence[str] = ("max", "min", "sampled")
    architecture_learning_rate: float = 3e-4
    gradient_clip: float = 5.0
    auxiliary_skip: float = 0.0
    beta_decay: float = 0.0
    max_skip_fraction: float | None = None
    min_entropy: float | None = None
    gumbel_temperature: Any = 1.0
    operator_relaxation: str = "softmax"

    def __post_init__(self) -> None:
        for name in (
            "latency_weight",
            "architecture_learning_rate",
            "gradient_clip",
            "pretrain_epochs",
            "auxiliary_skip",
            "beta_decay",
        ):
            require_number(name, getattr(self, name))
        for name in ("max_skip_fraction", "min_entropy"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, highest=1)
        for rule in (*self.pretrain_widths, *self.search_widths):
            if rule not in WIDTH_RULES:
                raise ConfigError(f"unknown width rule '{rule}'; allowed: {', '.join(WIDTH_RULES)}")
        if self.operator_relaxation not in RELAXATIONS:
            hint = did_you_mean(str(self.operator_relaxation), RELAXATIONS)
            raise ConfigError(f"unknown operator_relaxation '{self.operator_relaxation}': {hint}")
        given = self.gumbel_temperature
        pair = two_numbers("gumbel_temperature", given if isinstance(given, list | tuple) else (given, given))
        if min(pair) <= 0 or pair[1] > pair[0]:
            raise ConfigError(f"gumbel_temperature is {given!r}; give (first, last), positive and not rising")
        object.__setattr__(self, "gumbel_temperature", pair)
        if self.latency_window_ms is not None:
            low, high = two_numbers("latency_window_ms", self.latency_window_ms)
            if not 0 <= low < high:
                raise ConfigError(f"latency_window_ms is {self.latency_window_ms!r}; give (lowest, highest) in ms")
            if self.latency_weight <= 0:
                raise ConfigError("latency_window_ms steers latency_weight, which must start above 0; set it to 0.01")
            object.__setattr__(self, "latency_window_ms", (low, high))

    def auxiliary_skip_at(self, fraction: float) -> float:
        """Return the weight of the auxiliary skip at a ``fraction`` of the search, in [0, 1]."""
        return self.auxiliary_skip * (1 - fraction)

    def beta_decay_at(self, fraction: float) -> float:
        """Return the weight of the β-decay penalty at a ``fraction`` of the search, in [0, 1]."""
        return self.beta_decay * fraction

    def temperature_at(self, fraction: float) -> float:
        """Return τ at a ``fraction`` of the search, in [0, 1].

        >>> SearchSettings(gumbel_temperature=(4, 1)).temperature_at(0.5)
        2.0
        """
        first, last = self.gumbel_temperature
        return float(first * (last / first) ** fraction)

    def next_latency_weight(self, latency_weight: float, latency_ms: float) -> float:
        """Return λ for the next epoch.

        λ changes by the square of the relative excess, by a quarter at least and fourfold at most, and stays within
        four orders of magnitude of where it began.

        Args:
            latency_weight: λ of this epoch.
            latency_ms: Latency of the network decoded after it, in ms.

        >>> settings = SearchSettings(latency_weight=0.1, latency_window_ms=(5, 8))
        >>> settings.next_latency_weight(0.1, 16.0), settings.next_latency_weight(0.1, 6.0)
        (0.4, 0.1)
        """
        if self.latency_window_ms is None:
            return latency_weight
        low, high = self.latency_window_ms
        if latency_ms > high:
            factor = min(max((latency_ms / high) ** 2, 1.25), 4.0) if high > 0 else 4.0
        elif latency_ms < low:
            factor = 1 / min(max((low / max(latency_ms, 1e-9)) ** 2, 1.25), 4.0)
        else:
            return latency_weight
        return min(max(latency_weight * factor, 1e-4 * self.latency_weight), 1e4 * self.latency_weight)


def require_number(name: str, value: Any, *, highest: float | None = None) -> None:
    """Check a non-negative number.

    Raises:
        ConfigError: It is no number, negative, or above ``highest``.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value >= 0 or (highest is not None and value > highest):
        most = "" if highest is None else f" and at most {highest:g}"
        raise ConfigError(f"{name} is {value!r}; give a number of at least 0{most}")


def two_numbers(name: str, value: Any) -> tuple[float, float]:
    """Return two numbers as floats.

    Raises:
        ConfigError: They are something else.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} is {value!r}; give two numbers")
    first, second = value
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        raise ConfigError(f"{name} is {value!r}; give two numbers")
    return float(first), float(second)
