"""Which library multiplies matrices on a CPU."""

import torch
from torch import Tensor
from torch.fx import Graph
from torch.library import Library

aten = torch.ops.aten
library = Library("kvpass", "FRAGMENT")
SCHEMA = "onednn_linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor"
library.define(SCHEMA, tags=(torch.Tag.flexible_layout,))  # oneDNN reads any strides: inductor need not copy


def multiply_with_onednn(graph: Graph) -> int:
    """Hand float32 products with a weight to oneDNN, as torch does with bfloat16 ones; how many were found.

    torch gives float32 to MKL, which was slower on the CPU this was measured on (two cores of an EPYC): 2.9 against 2.5
    seconds for the products of a prompt of 2,048 tokens. Weights stay as they are, no copy is packed.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0
    found = 0
    for node in graph.nodes:
        if node.target is aten.linear.default and node.meta["dtype"] is torch.float32:
            node.target = torch.ops.kvpass.onednn_linear.default
            node.args = (*node.args, None)[:3]
            found += 1
    return found


# Behind an operator of our own: inductor takes torch's for constant weights alone.
def _onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, "none", [], "")
    return product


def _fake_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty((*states.shape[:-1], weight.shape[0]))


library.impl("onednn_linear", _onednn_linear, "CPU")
torch.library.register_fake("kvpass::onednn_linear", _fake_linear, lib=library)
