"""Let torch.compile take over what a network computes in training: the whole of it, or the parts whose shapes stay.

What is compiled is compiled in one piece (``fullgraph``): where PyTorch cannot, it says so, instead of leaving half of
the network as it was. Compiled code belongs to a process; it is not saved, copied or exported with the network.

Reference: Ansel et al., PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
Compilation, ASPLOS 2024.
"""

from __future__ import annotations

import shutil

import torch
from torch import nn

from glioma_nas.errors import ConfigError


def compile_for_training(network: nn.Module, backend: str = "inductor") -> list[nn.Module]:
    """Compile a network in place, at its first call.

    A network whose shapes differ from pass to pass names the parts that keep theirs by a method ``parts_to_compile() ->
    list[nn.Module]``; any other is compiled as a whole.

    Args:
        network: The network.
        backend: What torch.compile compiles with; ``eager`` captures the network and runs it as it was.

    Returns:
        The modules that are compiled from now on.

    Raises:
        ConfigError: There is no compiler, or the network has no part that can be compiled.
    """
    reason = why_not() if backend == "inductor" else None
    if reason is not None:
        raise ConfigError(f"compile: true cannot be used here: {reason}; or set compile: false")
    named = getattr(network, "parts_to_compile", None)
    parts: list[nn.Module] = [network] if named is None else list(named())
    if not parts:
        raise ConfigError(
            f"compile: true: {type(network).__name__} has no part whose shapes stay the same with this strategy; set "
            "compile: false"
        )
    # Versions are counted by function, not by module: those of networks trained before in this process would fill the
    # count, and another network of the same class would be refused.
    torch.compiler.reset()
    for part in parts:
        part.compile(fullgraph=True, backend=backend)
    return parts


def why_not() -> str | None:
    """Return None if networks can be compiled here, else why not and what to install."""
    if shutil.which("g++") or shutil.which("clang++"):
        return None
    return "no C++ compiler for torch.compile; install g++ (it is not one of the packages of pip install)"
