"""The rules that a graph of each form keeps; the pass manager checks them behind every pass."""

from collections.abc import Iterator

from torch import SymInt, Tensor

from kvpass.errors import VerificationError
from kvpass.ir.attention_site import attention_sites, is_attention
from kvpass.ir.form import Form, Phase
from kvpass.ir.program import KVProgram, Origin, Role
from kvpass.ir.propagate import propagate


def verify(program: KVProgram, *, recompute: bool = False) -> None:
    """Raise `VerificationError` with the first broken rule, the node, the last pass and what to do about it.

    `recompute` also runs the whole graph on fake tensors and compares every value; tests do, compiles do not.
    """
    program.graph.lint()
    for rule in (_structure, _ports, _values, _sizes, _sites, _cache):
        _raise_first(program, rule(program))
    if recompute:
        _raise_first(program, _recomputed(program))


def _raise_first(program: KVProgram, problems: Iterator[str]) -> None:
    for problem in problems:
        last = program.history[-1] if program.history else "capture"
        raise VerificationError(f"after {last!r} ({program.form.name}): {problem}")


def _structure(program: KVProgram) -> Iterator[str]:
    body_begun = False
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield f"node {node.name} is a {node.op!r}; only calls of operators and attributes are allowed"
        if node.op == "placeholder" and body_begun:
            yield f"input {node.name} stands behind other nodes; create inputs with GraphBuilder.placeholder"
        body_begun |= node.op == "call_function"


def _ports(program: KVProgram) -> Iterator[str]:
    found, declared = [str(n.target) for n in program.placeholders()], [port.name for port in program.inputs]
    if found != declared:
        yield f"the graph's inputs {found} are not the declared ones {declared}"
    returned = program.output_node().args[0]
    if not isinstance(returned, tuple | list) or len(returned) != len(program.outputs):
        yield f"the graph returns {returned}, declared are {[p.name for p in program.outputs]}"


def _values(program: KVProgram) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"node {node.name} has no fake value; create nodes with GraphBuilder.inline"
        origin = node.meta.get("kvpass")
        if origin is not None and not (isinstance(origin, Origin) and origin.made_by):
            yield f"node {node.name} does not say which pass made it"


def _sizes(program: KVProgram) -> Iterator[str]:
    frozen = program.shapes.specialized()
    if frozen:
        yield f"symbolic sizes became constant: {frozen}; the graph would be right for the example only"


def _sites(program: KVProgram) -> Iterator[str]:
    if not Form.LOCATED <= program.form < Form.LOWERED:
        return
    if program.phase not in (None, Phase.PREFILL) and program.form >= Form.CACHED:
        return
    sites = attention_sites(program)
    if [site.layer for site in sites] != list(range(program.layer_count)):
        yield f"expected one attention in each of {program.layer_count} layers, found {[s.layer for s in sites]}"
    for site in sites:
        if not is_attention(site.node):
            yield f"layer {site.layer}: node {site.node.name} is marked as attention but calls {site.node.target}"
        queries, keys, values = (_texts(program, tap.meta["val"]) for tap in (site.queries, site.keys, site.values))
        if keys[:3] != values[:3] or int(queries[1]) % int(keys[1]):
            yield f"layer {site.layer}: queries {queries}, keys {keys} and values {values} do not fit together"


def _cache(program: KVProgram) -> Iterator[str]:
    if program.form < Form.CACHED:
        return
    stored = {p.name: p for p in program.inputs if p.role in (Role.KEYS, Role.VALUES, Role.POSITIONS)}
    updated = [p.updates for p in program.outputs if p.updates]
    in_place = program.form >= Form.LOWERED and not updated
    if not in_place and sorted(updated) != sorted(stored):
        yield f"cache inputs {sorted(stored)} and updates {sorted(updated)} differ"
    for port in program.outputs:
        if port.updates in stored:
            old = program.input_node(port.role, port.layer).meta["val"]
            new = program.output_value(port.role, port.layer).meta["val"]
            if old.dtype != new.dtype or tuple(old.shape) != tuple(new.shape):
                yield f"{port.updates} enters as {old.dtype} {tuple(old.shape)}, leaves as {new.dtype} {new.shape}"


def _recomputed(program: KVProgram) -> Iterator[str]:
    inputs = {str(node.target): node.meta["val"] for node in program.placeholders()}
    for node, value in propagate(program, inputs).items():
        claimed = node.meta["val"]
        if isinstance(value, Tensor):
            same = value.dtype == claimed.dtype and _texts(program, value) == _texts(program, claimed)
        else:
            same = not isinstance(value, SymInt) or program.shapes.text(value) == program.shapes.text(claimed)
        if not same:
            yield f"node {node.name} claims {claimed}, computes {value}"


def _texts(program: KVProgram, value: Tensor) -> list[str]:
    return [program.shapes.text(size) for size in value.shape]
