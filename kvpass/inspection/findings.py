"""Look at a captured model and say what is there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import MissingTapError
from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.program import KVProgram
from kvpass.ir.rotary import GraphRope, Rotation
from kvpass.ir.taps import TAP_NAMES, LayerTaps, Taps
from kvpass.press_facts import facts_of
from kvpass.registry import registered_presses

POSITION = 3  # at which a rotation is looked at; any but 0, where nothing turns


@dataclass(frozen=True)
class LayerFindings:
    """One located attention, in words."""

    layer: int
    path: str  # of its module
    mask: str
    heads: str  # query heads / KV heads, key size (and value size if that differs)
    rope: str
    extras: tuple[str, ...]  # what plain attention does not have
    missing: Mapping[str, str]  # taps that it lacks, and why
    pressable: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for layers that differ in their number alone."""
        return (self.mask, self.heads, self.rope, self.extras, tuple(self.missing), self.pressable)


@dataclass(frozen=True)
class Findings:
    """All attentions of a model, and for each press why it cannot run, or None."""

    layers: tuple[LayerFindings, ...]
    presses: Mapping[str, str | None]
    notes: tuple[str, ...]


def findings_of(program: KVProgram) -> Findings:
    """What was located in a captured model."""
    taps = Taps(program)
    layers = tuple(_layer(program, site, taps.of_layer(site)) for site in attention_sites(program))
    pressed = [layer for layer in layers if layer.pressable]
    return Findings(layers, {name: _obstacle(name, pressed) for name in registered_presses()}, program.notes)


def _layer(program: KVProgram, site: AttentionSite, found: LayerTaps) -> LayerFindings:
    _, heads, _, key_size = site.shape(site.queries)
    value_size = site.shape(site.values)[3]
    sizes = f"{heads} / {site.shape(site.keys)[1]} x {key_size}"
    extras = {
        f"soft-cap {site.softcap}": site.softcap is not None,
        "sinks": site.sinks is not None,
        "ALiBi": site.slopes is not None,
        f"keys of layer {site.holder}": not site.holds_cache,
        f"scale {site.scale:g}": abs(site.scale - float(key_size) ** -0.5) > 1e-6,
    }
    missing = {name: str(found.missing[name]) for name in TAP_NAMES if name in found.missing}
    if isinstance(rotation := found.rotations["rope"], MissingTapError):
        missing["rope"] = str(rotation)
    return LayerFindings(
        site.layer,
        site.path,
        str(site.mask),
        sizes if value_size == key_size else f"{sizes}, values {value_size}",
        "unknown" if isinstance(rotation, MissingTapError) else _rope(program, rotation),
        tuple(name for name, is_there in extras.items() if is_there),
        missing,
        site.pressable,
    )


def _rope(program: KVProgram, rotation: Rotation) -> str:
    """How a rotation pairs channels, found by rotating each of them alone."""
    if not rotation.table.outputs:
        return "none"
    value: Tensor = rotation.pre.meta["val"]
    width = int(value.shape[3])
    constants = {node: program.attribute(node) for node in rotation.constants}
    rope = GraphRope(program, rotation, constants)
    positions = torch.full((1, width), POSITION, device=value.device)
    basis = torch.eye(width, dtype=value.dtype, device=value.device)[None, None]
    with torch.no_grad():
        turned = rope.rotate(basis, rope.frequencies(positions))[0, 0].float()
    partners = (turned - torch.diag(turned.diagonal())).abs()
    paired = (partners.amax(dim=1) > 1e-4).nonzero().flatten().tolist()
    if not paired:
        return "none"
    distance = abs(int(partners[paired[0]].argmax()) - paired[0])
    turning = int((turned - torch.eye(width, device=turned.device)).abs().amax(dim=1).gt(0).sum())
    form = "interleaved" if distance == 1 else "rotate-half"
    return form if turning > 0.75 * width else f"{form}, {turning} of {width} channels"


def _obstacle(name: str, pressed: list[LayerFindings]) -> str | None:
    """Why a press cannot run with its default options, or None."""
    if not pressed:
        return "every layer keeps a window or a chunk alone, nothing is left to press"
    for need in facts_of(registered_presses()[name]).needs or ():
        for layer in pressed:
            if need in layer.missing:
                return layer.missing[need]
    return None
