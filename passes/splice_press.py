"""Write the press behind the KV projection of every pressed layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from kvpass.budget import Budget, Prompt
from kvpass.errors import PressError
from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.counted_inputs import counted_inputs
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.taps import LayerTaps, Taps
from kvpass.pass_manager import Pass
from kvpass.press import ModelFacts, Press
from kvpass.press_inputs import PressInputs


@dataclass(frozen=True)
class SplicePress(Pass):
    """Trace the press on the taps it reads and inline it; sliding-window layers are left alone.

    added:   scores_0: f32[B, 2, S] = neg(linalg_vector_norm(add_2, 2, [-1], False, dtype=f32))      # knorm
             kept_0: i64[B, 2, N] = ...                                  # the best of them, ascending
             keys_kept_0: f32[B, 2, N, 16] = gather(add_2, 2, kept_0)
    """

    name: ClassVar[str] = "splice-press"
    requires: ClassVar[Form] = Form.CACHED
    produces: ClassVar[Form] = Form.PRESSED

    press: Press
    layers: frozenset[int] | None = None  # those to press, None: all that have no window

    def run(self, program: KVProgram) -> int:
        if any("press" in node.meta for node in program.graph.nodes):
            return 0
        builder = GraphBuilder(program, self.name)
        everywhere = attention_sites(program)
        sites = [site for site in everywhere if self._pressed(site)]
        if not sites:
            raise PressError(
                f"{self.press.name}: every layer of this model has a sliding window and keeps that alone, nothing is "
                "left to press; use press=None, or set sliding_window=None in the config if your texts fit into it"
            )
        if self.press.rerotates and any(site.slopes is not None for site in everywhere):
            raise PressError(
                f"{self.press.name} moves keys, which this model weighs by distance (ALiBi); use the press inside it"
            )
        taps = Taps(program)
        facts = _facts(program, sites[0], taps)
        assets = self.press.assets(facts)
        for name, tensor in assets.items():
            if tensor.shape[0] != facts.layers:
                raise PressError(f"{self.press.name}: {name!r} has {tensor.shape[0]} layers, the model {facts.layers}")
        for site in sites:
            found = taps.of_layer(site)
            for name, tensor in assets.items():
                found.nodes[f"asset.{name}"] = builder.attribute(f"press_{name}_{site.layer}", tensor[site.layer], site)
            self._splice(program, builder, site, found)
        for site in everywhere:
            if site.holds_cache and not self._pressed(site) and self.press.rerotates:
                self._splice(program, builder, site, taps.of_layer(site))
        return len(sites)

    def _pressed(self, site: AttentionSite) -> bool:
        return site.pressable and (self.layers is None or site.layer in self.layers)

    def _splice(self, program: KVProgram, builder: GraphBuilder, site: AttentionSite, found: LayerTaps) -> None:
        hint = int(program.input_node(Role.INPUT_IDS).meta["val"].shape[1].node.hint)
        prompt = Prompt(hint, Budget(0.5), site.layer, program.layer_count, question=min(7, hint - 1))
        layer = site.layer if self.press.per_layer else None
        sizes = counted_inputs(builder, Role.SIZE, self.press.sizes(prompt), self.press.smallest(), layer)
        scalars = counted_inputs(builder, Role.SCALAR, self.press.scalars(prompt), {}, layer)
        groups = (sizes, scalars, found.nodes, found.constants)
        nodes = [node for group in groups for node in group.values()]
        reads: frozenset[str] = frozenset()

        def compress(*tensors: Tensor) -> dict[str, Tensor]:
            nonlocal reads
            rest = iter(tensors)
            lengths, fractions, taps, constants = ({name: next(rest) for name in group} for group in groups)
            ropes = found.ropes(program, constants)
            x = PressInputs(
                found.values(taps),
                rope=ropes["rope"],
                key_rope=ropes["key_rope"],
                sizes={name: tensor.shape[0] for name, tensor in lengths.items()},
                scalars=fractions,
                scale=site.scale,
                layer=site.layer,
                layers=program.layer_count,
            )
            left = self.press.compress(x) if self._pressed(site) else self.press.accompany(x)
            assert left is not None
            reads = x.reads
            named = {"scores": left.scores, "kept": left.kept, "count": left.count}
            named |= {"keys_kept": left.keys, "values_kept": left.values}
            return {name: tensor for name, tensor in named.items() if tensor is not None}

        results = builder.inline_named(
            compress,
            nodes,
            layer=site.layer,
            like=site.node,
            key=(self._pressed(site), tuple(map(tuple, groups[:3])), site.scale, found.fingerprint()),
            reuse=lambda: "layer" not in reads,
        )
        self._check(program, site, results)
        site.node.meta["press"] = {role: node.name for role, node in results.items()}

    def _check(self, program: KVProgram, site: AttentionSite, results: Mapping[str, Node]) -> None:
        """A press must return what the cache can hold."""

        def shape(node: Node) -> list[str]:
            return [program.shapes.text(size) for size in node.meta["val"].shape]

        batch, heads, tokens, width = shape(site.keys)
        slots = shape(results["kept"])[2] if "kept" in results else tokens
        expected = {
            "scores": ("[B, Hkv, S]", [batch, heads, tokens]),
            "kept": ("[B, Hkv, N]", [batch, heads, slots]),
            "keys_kept": ("[B, Hkv, N, D]", [batch, heads, slots, width]),
            "values_kept": ("[B, Hkv, N, D]", [batch, heads, slots, shape(site.values)[3]]),
        }
        for role, (legend, wanted) in expected.items():
            if role in results and shape(results[role]) != wanted:
                what = "score()" if role == "scores" else role
                raise PressError(
                    f"{self.press.name}: layer {site.layer}: {what} returned {shape(results[role])}, expected "
                    f"{legend} = {wanted}"
                )


def _facts(program: KVProgram, site: AttentionSite, taps: Taps) -> ModelFacts:
    hidden = taps.of_layer(site).nodes.get("hidden_states")
    return ModelFacts(
        name=program.model_name,
        layers=program.layer_count,
        heads=int(site.shape(site.queries)[1]),
        kv_heads=int(site.shape(site.keys)[1]),
        key_size=int(site.shape(site.keys)[3]),
        hidden_size=int(hidden.meta["val"].shape[-1]) if hidden is not None else None,
    )
