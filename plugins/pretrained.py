"""Load published weights from a local file into backbones whose inputs have other channels.

The file holds a state dict in the layout of torchvision or timm (both name ResNet alike; ResNeSt is timm's), as
``.safetensors`` or as a PyTorch file of tensors only; a wrapping ``state_dict`` or ``model`` entry and the prefix
``module.`` are taken off, the classification layer ``fc`` is ignored.

Rule for other channels: a weight for k input channels becomes one for n by the mean over its k inputs, repeated n times
and scaled by k/n. Inputs that are equal in all channels are then answered as before. It is applied to the first
convolution, and, where streams meet before the residual stages, to the first block of stage 1. There a shortcut that
the file does not hold (ResNet-18 needs none for one stream) stays at its random values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glioma_nas.errors import ConfigError

_WRAPPERS = ("state_dict", "model")
_IGNORED = ("fc.", "num_batches_tracked")
_MAY_BE_WIDENED = ("conv1.", "layer1.0.conv1.", "layer1.0.downsample.")


def adapt_inputs(weight: Tensor, in_channels: int) -> Tensor:
    """Return a weight (O, n, h, w) made of (O, k, h, w): mean over k, repeated n times, times k/n."""
    given = weight.shape[1]
    if given == in_channels:
        return weight
    return weight.mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1) * (given / in_channels)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict.

    Raises:
        ConfigError: The file is missing or no state dict of tensors.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file; correct 'pretrained' or leave it out to train from scratch")
    try:
        found: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        for wrapper in _WRAPPERS:
            if isinstance(found.get(wrapper), Mapping):
                found = found[wrapper]
        weights = {str(key).removeprefix("module."): value for key, value in found.items()}
    except Exception as err:
        raise ConfigError(
            f"{path}: not a state dict of tensors ({type(err).__name__}); save model.state_dict()"
        ) from err
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"{path}: not a state dict of tensors; save model.state_dict()")
    return {key: value for key, value in weights.items() if not any(part in key for part in _IGNORED)}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, source: Path, name: str) -> None:
    """Put the entries of ``weights`` that ``module`` has into it, with other channels by the rule of this module.

    Args:
        module: A `ShallowStem` or the `Stages` of a backbone.
        weights: What `read_weights` returned.
        source: The file, for messages.
        name: The backbone, for messages.

    Raises:
        ConfigError: An entry is missing or of another shape.
    """
    own = module.state_dict()
    ready: dict[str, Tensor] = {}
    for key, value in own.items():
        if "num_batches_tracked" in key:
            continue
        widened = value.ndim == 4 and key.startswith(_MAY_BE_WIDENED)
        if key not in weights:
            if key.startswith("layer1.0.downsample."):
                continue
            raise ConfigError(f"{source}: not weights of '{name}': '{key}' is missing, needs {tuple(value.shape)}")
        given = adapt_inputs(weights[key], value.shape[1]) if widened and weights[key].ndim == 4 else weights[key]
        if given.shape != value.shape:
            raise ConfigError(
                f"{source}: not weights of '{name}': '{key}' has shape {tuple(weights[key].shape)}, needs "
                f"{tuple(value.shape)}"
            )
        ready[key] = given
    module.load_state_dict(ready, strict=False)
