"""The searched parameters α, β and γ of one architecture, and the passes they define.

α weighs operators, β weighs a node's inputs, γ gives the probability of each width. All are unnormalised logits; the
softmax of METHOD eq. 4-6…4-8 is applied here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nni.mutable import Categorical, CategoricalMultiple
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.relaxation import Relaxation, RelaxedInput, RelaxedLayer

INITIAL_SCALE = 1e-3

GROUPS = ("operator", "scale", "width")


def choices_of(space: Any) -> dict[str, list[Any]]:
    """Return every mutable of a model space: label → values in order.

    Raises:
        ArchitectureError: A mutable is not categorical, so it cannot be relaxed.
    """
    choices = {}
    for label, mutable in space.simplify().items():
        if not isinstance(mutable, Categorical | CategoricalMultiple):
            raise ArchitectureError(
                f"mutable '{label}' is a {type(mutable).__name__}; only categorical choices can be relaxed"
            )
        choices[label] = list(mutable.values)
    return choices


def groups_of(space: Any) -> dict[str, list[str]]:
    """Return the searched labels by kind of variable: ``operator``, ``scale`` (input choices) and ``width``.

    A space may say so itself (``variable_groups``); of any other, layer choices are operators, input choices are scales
    and the remaining numeric choices are widths. Call it after the space was turned into a supernet.
    """
    if hasattr(space, "variable_groups"):
        return {group: list(labels) for group, labels in space.variable_groups().items()}
    choices = choices_of(space)
    layers = {module.label for module in space.modules() if isinstance(module, RelaxedLayer)}
    inputs = {module.label for module in space.modules() if isinstance(module, RelaxedInput)}
    searched = [label for label, values in choices.items() if len(values) > 1]
    return {
        "operator": [label for label in searched if label in layers],
        "scale": [label for label in searched if label in inputs],
        "width": [label for label in searched if label not in layers and label not in inputs],
    }


def skips_of(supernet: nn.Module) -> list[str]:
    """Return the names of operator candidates that are skip connections.

    Such a candidate's class says ``is_skip = True``, as registered operators do, or it is PyTorch's ``Identity``.
    """
    found = {
        name
        for module in supernet.modules()
        if isinstance(module, RelaxedLayer)
        for name in module.names
        if isinstance(module[name], nn.Identity) or getattr(module[name], "is_skip", False)
    }
    return sorted(found)


class ArchitectureParameters(nn.Module):
    """α, β and γ of one architecture.

    Args:
        name: The architecture, for example ``student``.
        choices: Label → values, see `choices_of`.
        groups: Kind → labels, see `groups_of`.
        fixed: Label → value for choices that this architecture does not search.
        search_widths: Whether γ is searched; otherwise every pass uses the widest value (the teacher).
    """

    def __init__(
        self,
        name: str,
        *,
        choices: Mapping[str, Sequence[Any]],
        groups: Mapping[str, Sequence[str]],
        fixed: Mapping[str, Any],
        search_widths: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self._choices = {label: list(values) for label, values in choices.items()}
        self._fixed = dict(fixed)
        kinds = GROUPS if search_widths else GROUPS[:2]
        self.groups: dict[str, list[str]] = {
            kind: [label for label in groups[kind] if label not in self._fixed] if kind in kinds else []
            for kind in GROUPS
        }
        self._width_labels = [label for label in groups["width"] if label not in self._fixed]
        self.logits = nn.ParameterDict(
            {
                label: nn.Parameter(INITIAL_SCALE * torch.randn(len(self._choices[label])))
                for kind in GROUPS
                for label in self.groups[kind]
            }
        )

    def probabilities(self) -> dict[str, Tensor]:
        """Return softmax(logits) for every searched label, shape (n,), differentiable."""
        return {label: logits.softmax(-1) for label, logits in self.logits.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return weights for *every* label.

        Searched labels are differentiable; fixed ones and unsearched widths are one-hot; what is chosen after the
        search (the branches) is uniform, so that every branch counts in an expectation.
        """
        weights = self.probabilities()
        for label, values in self._choices.items():
            if label in self._fixed or label in self._width_labels:
                weights.setdefault(label, one_hot(len(values), values.index(self._constant(label))))
            else:
                weights.setdefault(label, torch.full((len(values),), 1 / len(values)))
        return weights

    def decoded(self) -> dict[str, np.ndarray]:
        """Return the weights of every label as float64 arrays, for the decoder and for files."""
        return {label: weight.detach().double().cpu().numpy() for label, weight in self.weights().items()}

    def relaxation(
        self,
        width: str,
        *,
        differentiable: bool,
        temperature: float = 1.0,
        gumbel: bool = False,
        auxiliary_skip: float = 0.0,
    ) -> Relaxation:
        """Define one pass.

        Args:
            width: ``max``, ``min``, ``random`` (uniform) or ``sampled`` (Gumbel-softmax with γ) for every node's width.
            differentiable: Whether gradient flows to α, β and, for ``sampled``, γ.
            temperature: τ > 0 of every Gumbel-softmax.
            gumbel: Mix operators and inputs by a Gumbel-softmax sample of α and β instead of their softmax.
            auxiliary_skip: See `Relaxation`.

        Reference:
            Jang et al., Categorical Reparameterization with Gumbel-Softmax, ICLR 2017 (straight-through for widths).
        """
        weights = self.probabilities()
        if gumbel:
            mixed = [label for kind in GROUPS[:2] for label in self.groups[kind]]
            weights |= {label: nn.functional.gumbel_softmax(self.logits[label], tau=temperature) for label in mixed}
        if not differentiable:
            weights = {label: weight.detach() for label, weight in weights.items()}
        values: dict[str, Any] = {label: self._constant(label) for label in self._choices}
        gates: dict[str, Tensor] = {}
        for label in self._width_labels:
            options = self._choices[label]
            if width == "max":
                index = len(options) - 1
            elif width == "min":
                index = 0
            elif width == "random":
                index = int(torch.randint(len(options), ()))
            elif width == "sampled" and label in self.logits:
                logits = self.logits[label]
                soft = logits if differentiable else logits.detach()
                hard = nn.functional.gumbel_softmax(soft, tau=temperature, hard=True)
                index = int(hard.argmax())
                if differentiable:
                    gates[label] = hard
            elif width == "sampled":
                index = len(options) - 1
            else:
                raise ValueError(f"unknown width rule '{width}'; allowed: max, min, random, sampled")
            values[label] = options[index]
        return Relaxation(self.name, weights, values, gates, auxiliary_skip)

    def random_path(self) -> Relaxation:
        """Define one pass through a uniformly drawn operator, input and width everywhere, without gradient to them.

        Reference:
            Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, sec. 3.2.
        """
        widths = self.relaxation("random", differentiable=False)
        drawn = {
            label: one_hot(len(self._choices[label]), int(torch.randint(len(self._choices[label]), ())))
            for kind in GROUPS[:2]
            for label in self.groups[kind]
        }
        return replace(widths, weights={**widths.weights, **drawn})

    def concentration(self) -> Tensor:
        """Return mean(log Σ exp α) over the operator choices, the penalty of β-decay; a scalar with gradient.

        Reference:
            Ye et al., β-DARTS, CVPR 2022.
        """
        labels = self.groups["operator"]
        if not labels:
            return torch.zeros(())
        return torch.stack([torch.logsumexp(self.logits[label], 0) for label in labels]).mean()

    def preferred(self, kind: str) -> list[Any]:
        """Return the most probable value of every choice of one kind."""
        return [self._choices[label][int(self.logits[label].detach().argmax())] for label in self.groups[kind]]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for every value of every searched choice: what the history of α, β and γ is made of."""
        return [
            {
                "architecture": self.name,
                "kind": kind,
                "label": label,
                "value": str(value),
                "logit": float(logit),
                "probability": float(probability),
            }
            for kind in GROUPS
            for label in self.groups[kind]
            for value, logit, probability in zip(
                self._choices[label],
                self.logits[label].detach().cpu(),
                self.logits[label].detach().softmax(-1).cpu(),
                strict=True,
            )
        ]

    def entropy(self, kind: str) -> float:
        """Return the mean entropy of one kind of choice, as a share of the uniform one's: 1 undecided, 0 decided."""
        shares = []
        for label in self.groups[kind]:
            probability = self.logits[label].detach().softmax(-1)
            shares.append(
                float(-(probability * probability.clamp_min(1e-12).log()).sum()) / float(np.log(len(probability)))
            )
        return sum(shares) / len(shares) if shares else float("nan")

    def _constant(self, label: str) -> Any:
        # Values of widths ascend, so the last is the widest; for other unsearched labels any legal value will do.
        return self._fixed.get(label, self._choices[label][-1])


def one_hot(length: int, index: int) -> Tensor:
    """Return a float32 vector of zeros with a one at ``index``."""
    vector = torch.zeros(length)
    vector[index] = 1.0
    return vector
