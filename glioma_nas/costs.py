"""Name one priced piece of a network: an operator with its channels, stride and input size.

Latency tables, MAC counts and any other additive cost are keyed by `OperatorSpec`, so a search space can say what it is
made of without knowing how the price is found, and a table can be measured without knowing any search space.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class OperatorSpec:
    """One operator at one place of a network, batch 1.

    Attributes:
        operator: Registered operator name.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1 or 2.
        height: Height of the input in pixels.
        width: Width of the input in pixels.
    """

    operator: str
    in_channels: int
    out_channels: int
    stride: int
    height: int
    width: int

    def key(self) -> str:
        """Return a text that is unique to the spec.

        >>> OperatorSpec("conv3x3", 32, 64, 2, 112, 112).key()
        'conv3x3 32->64 stride 2 112x112'
        """
        return (
            f"{self.operator} {self.in_channels}->{self.out_channels} stride {self.stride} {self.height}x{self.width}"
        )
