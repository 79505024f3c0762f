"""Prove that tokens meet in the located attentions and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import reached_from
from kvpass.ir.written_attention import unmatched
from kvpass.pass_manager import Pass

TOKENS = 70  # together; more than what models mix outside attention reaches over: chunks, windows, kernels
ALONE = (0, 1, 33, 69)  # those that are also run alone
CHANGED = 31  # the one that is changed


@dataclass(frozen=True)
class ProveTokenLocal(Pass):
    """Run the graph with attention replaced by numbers: whole, with one token changed, and on a few tokens alone.

    With the attentions cut out, queries, keys, values and logits of a token must not change by a bit when another
    token does, and stay what they are when the others are gone and only its position is given: that is what decoding
    relies on. Convolutions over tokens, recurrent state, shifts, and positions that the module counts in a way that
    nobody saw are found by what they compute, however little it is. The graph is not changed.
    """

    name: ClassVar[str] = "prove-token-local"
    requires: ClassVar[Form] = Form.LOCATED
    produces: ClassVar[Form] = Form.LOCATED

    def run(self, program: KVProgram) -> int:
        sites = attention_sites(program)
        logits = program.output_value(Role.LOGITS)
        watched = {node: f"layer {site.layer}" for site in sites for node in (site.queries, site.keys, site.values)}
        watched[logits] = "the logits"
        tokens = min(TOKENS, program.max_tokens, *_rows(program))
        vocabulary = int(logits.meta["val"].shape[-1])
        positions = torch.arange(tokens, device=program.input_node(Role.INPUT_IDS).meta["val"].device)[None]
        ids = (positions * 7 + 1) % vocabulary
        stand_ins = {site.node: self._stand_in(site, tokens) for site in sites}
        together = _Cut(program, stand_ins, watched).values(ids, positions)
        changed = min(CHANGED, tokens - 1)
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 3) % vocabulary
        altered = _Cut(program, stand_ins, watched).values(other, positions)
        others = [token for token in range(tokens) if token != changed]
        for node, where in watched.items():
            axis = 1 if node is logits else 2
            index = torch.tensor(others, device=ids.device)
            pair = [found[node].index_select(axis, index) for found in (altered, together)]
            if not (torch.equal(*pair) or (_splits_by_data(program) and _close(*pair, exact=True))):
                raise _mixed(program, where, node, "changes with another one")
        for token in (token for token in ALONE if token < tokens):
            here = slice(token, token + 1)
            cut = {node: tensor[:, :, here] for node, tensor in stand_ins.items()}
            alone = _Cut(program, cut, watched).values(ids[:, here], positions[:, here])
            for node, where in watched.items():
                expected = together[node].narrow(1 if node is logits else 2, token, 1)
                if not _close(alone[node], expected):
                    raise _mixed(program, where, node, f"number {token} depends on others, or on its place")
        self._try_two_rows(program, stand_ins, watched, ids, positions)
        return len(sites)

    def _try_two_rows(
        self,
        program: KVProgram,
        stand_ins: Mapping[Node, Tensor],
        watched: Mapping[Node, str],
        ids: Tensor,
        positions: Tensor,
    ) -> None:
        """Rows must not meet; whether they may stand at different positions (a module can read one row's) is noted."""
        cut = {node: tensor[:, :, :3].expand(2, -1, -1, -1) for node, tensor in stand_ins.items()}
        single = {node: tensor[:1] for node, tensor in cut.items()}
        words, here, there = torch.cat([ids[:, :3], ids[:, -3:]]), positions[:, :3], positions[:, -3:]
        alike = _Cut(program, cut, watched).values(words, torch.cat([here, here]))
        alone = _Cut(program, single, watched).values(words[1:], here)
        for node, where in watched.items():
            if not _close(alike[node][1:], alone[node]):
                raise _mixed(program, where, node, "changes with another row of the batch")
        apart = _Cut(program, cut, watched).values(words, torch.cat([here, there]))
        alone = _Cut(program, single, watched).values(words[1:], there)
        program.rows_share_positions = not all(_close(apart[node][1:], alone[node]) for node in watched)

    def _stand_in(self, site: AttentionSite, tokens: int) -> Tensor:
        value: Tensor = site.node.meta["val"]
        _, heads, _, width = value.shape
        generator = torch.Generator().manual_seed(site.layer)
        numbers = torch.randn(1, int(heads), tokens, int(width), generator=generator)
        return numbers.to(value.device, value.dtype)


def _mixed(program: KVProgram, where: str, node: Node, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: {node.name} of a token {how}, although attention was taken out: something in front of it mixes "
        "tokens (a convolution, a recurrent state, a shift, positions counted from the tokens). A KV cache does not "
        f"hold that; such a model cannot be compiled{unmatched(program)}"
    )


def _splits_by_data(program: KVProgram) -> bool:
    """Whether tokens are grouped by what they say (experts), so that kernels round differently."""
    return any("grouped_mm" in str(n.target) or "nonzero" in str(n.target) for n in program.graph.nodes)


def _rows(program: KVProgram) -> list[int]:
    """The sizes of tables that positions are looked up in."""
    nodes = list(program.graph.nodes)
    positional = reached_from([program.input_node(Role.POSITION_IDS)], nodes)
    positional -= reached_from([program.input_node(Role.INPUT_IDS)], nodes)
    lookups = [n for n in nodes if n.target is torch.ops.aten.embedding.default and n in positional]
    return [int(n.args[0].meta["val"].shape[0]) for n in lookups]


class _Cut(Interpreter):
    """Runs a graph with given values for some nodes and keeps those of others."""

    def __init__(self, program: KVProgram, given: Mapping[Node, Tensor], watched: Mapping[Node, str]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._given = given
        self._watched = watched
        self._found: dict[Node, Tensor] = {}

    def values(self, *inputs: Tensor) -> dict[Node, Tensor]:
        with torch.no_grad():
            self.run(*inputs)
        return self._found

    def run_node(self, n: Node) -> Any:
        result = self._given[n] if n in self._given else super().run_node(n)
        if n in self._watched:
            self._found[n] = result
        return result


def _close(found: Tensor, expected: Tensor, *, exact: bool = False) -> bool:
    """Equal but for the rounding of another kernel for another size."""
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-6}.get(expected.dtype, 6e-2)
    scale = expected.float().abs().max().clamp(min=1e-6)
    return bool((found.float() - expected.float()).abs().max() <= tolerance * (0.01 if exact else 1) * scale)
