"""What baseline networks ask of their images and options, said before a convolution fails on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from glioma_nas.errors import ConfigError, ImageError


class MultipleOf(nn.Module):
    """A network that needs image sides divisible by ``multiple`` and says so, instead of failing deep inside.

    Args:
        network: Takes images (N, C, H, W).
        multiple: What both sides must be divisible by.
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network = network
        self.multiple = multiple

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the network's logits (N, K, H, W), float32, or while training several such maps by name.

        Raises:
            ImageError: A side is not divisible by ``multiple``.
        """
        height, width = image.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ImageError(
                f"image of {height}×{width} pixels: this network needs sides divisible by {self.multiple}; "
                f"set preprocess.image_size_px to a multiple of {self.multiple}"
            )
        logits: Tensor | dict[str, Tensor] = self.network(image)
        return logits


def require_channels(
    network: str, option: str, value: Any, *, at_least: int, at_most: int | None = None
) -> None:  # value comes from a YAML file
    """Check an option that gives numbers of channels.

    Raises:
        ConfigError: Not a list of positive whole numbers, or not as many as the network takes.
    """
    count = f"{at_least}" if at_least == at_most else f"at least {at_least}"
    good = isinstance(value, list | tuple) and all(isinstance(number, int) and number > 0 for number in value)
    if not good or len(value) < at_least or (at_most is not None and len(value) > at_most):
        raise ConfigError(f"{network}: {option} is {value!r}; give {count} positive whole number(s)")
