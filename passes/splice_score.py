"""Write the press's scores behind the KV projection of every pressed layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import MissingTapError, PressError
from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.ir.rotary import GraphRope
from kvpass.ir.taps import TAP_NAMES, Rotation, Taps
from kvpass.pass_manager import Pass
from kvpass.press import Press, PressInputs, Rope

BUDGET_HINT = 29


@dataclass(frozen=True)
class SpliceScore(Pass):
    """Trace the press on the taps it reads and inline it; sliding-window layers are left alone.

    added:   scores_0: f32[B, 2, S] = neg(linalg_vector_norm(add_2, 2, [-1], False, dtype=f32))      # knorm
    """

    name: ClassVar[str] = "splice-score"
    requires: ClassVar[Form] = Form.CACHED
    produces: ClassVar[Form] = Form.SCORED

    press: Press

    def run(self, program: KVProgram) -> int:
        if any(port.role is Role.BUDGET for port in program.inputs):
            return 0
        builder = GraphBuilder(program, self.name)
        sites = [site for site in attention_sites(program) if site.pressable]
        if not sites:
            raise PressError(
                f"{self.press.name}: every layer of this model has a sliding window and keeps that alone, nothing is "
                "left to press; use press=None, or set sliding_window=None in the config if your texts fit into it"
            )
        device = program.input_node(Role.INPUT_IDS).meta["val"].device
        size = program.shapes.dim("N", hint=BUDGET_HINT)
        budget = builder.placeholder(Port("budget", Role.BUDGET), program.shapes.empty((size,), torch.float32, device))
        taps = Taps(program)
        for site in sites:
            self._splice(program, builder, taps, site, budget)
        return len(sites)

    def _splice(self, program: KVProgram, builder: GraphBuilder, taps: Taps, site: AttentionSite, budget: Node) -> None:
        nodes, missing = self._available(taps, site)
        rotation: Rotation | MissingTapError
        try:
            rotation = taps.rotation(site, site.queries)
        except MissingTapError as error:
            rotation = error
        constants = [] if isinstance(rotation, MissingTapError) else rotation.constants
        layer_was_read = False

        def score(budget: Tensor, *tensors: Tensor) -> Tensor:
            nonlocal layer_was_read
            given: dict[str, Tensor | MissingTapError] = dict(zip(nodes, tensors, strict=False))
            rope: Rope | MissingTapError
            if isinstance(rotation, MissingTapError):
                rope = rotation
            else:
                values = tensors[len(nodes) :]
                rope = GraphRope(program, rotation, dict(zip(constants, values, strict=True)))
            x = PressInputs(
                {**given, **missing},
                rope=rope,
                budget=budget,
                scale=site.scale,
                layer=site.layer,
                layers=program.layer_count,
            )
            scores = self.press.score(x)
            layer_was_read = x.layer_was_read
            return scores

        rope_form = str(rotation) if isinstance(rotation, MissingTapError) else rotation.fingerprint()
        key = (tuple(nodes), site.scale, rope_form, tuple(str(node.target) for node in constants))
        (scores,) = builder.inline(
            score,
            [budget, *nodes.values(), *constants],
            names=["scores"],
            layer=site.layer,
            like=site.node,
            key=key,
            reuse=lambda: not layer_was_read,
        )
        self._check(program, site, scores)

    def _available(self, taps: Taps, site: AttentionSite) -> tuple[dict[str, Node], dict[str, MissingTapError]]:
        """The nodes of all taps that the layer has, and why it lacks the others."""
        nodes: dict[str, Node] = {}
        missing: dict[str, MissingTapError] = {}
        for name in TAP_NAMES:
            try:
                nodes[name] = taps.node(site, name)
            except MissingTapError as error:
                missing[name] = error
        return nodes, missing

    def _check(self, program: KVProgram, site: AttentionSite, scores: Node) -> None:
        found = [program.shapes.text(n) for n in scores.meta["val"].shape]
        wanted = [program.shapes.text(n) for n in site.shape(site.keys)[:3]]
        if found != wanted:
            raise PressError(
                f"{self.press.name}: layer {site.layer}: score() returned {found}, expected [B, Hkv, S] = {wanted}"
            )
