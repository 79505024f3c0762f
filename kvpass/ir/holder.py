"""A module tree that holds tensors under their names."""

from collections.abc import Mapping

from torch import Tensor, nn


def holder(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A bare module tree that holds the model's own tensors (not copies) under their own names."""
    root = nn.Module()
    for path, tensor in tensors.items():
        *parents, leaf = path.split(".")
        owner = root
        for atom in parents:
            if not hasattr(owner, atom):
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    return root
