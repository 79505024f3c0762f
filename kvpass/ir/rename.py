"""Names that depend on the graph alone."""

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from kvpass.ir.printer import op_name
from kvpass.ir.program import KVProgram


def plain_name(node: Node) -> str:
    """`mul` for `mul_47`: torch's numbers depend on its version and on what was dropped."""
    return op_name(node).replace(".", "_")


def renumber(program: KVProgram) -> None:
    """Name all operator nodes by operator and order of appearance: mul, mul_1, mul_2, ..."""
    graph = Graph()
    placed: dict[Node, Node] = {}
    for node in program.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), placed.__getitem__)
        name = plain_name(node) if node.op == "call_function" else node.name
        placed[node] = graph.create_node(node.op, node.target, args, kwargs, name)
        placed[node].meta = dict(node.meta)
    program.graph_module = GraphModule(program.graph_module, graph)
