"""A ratio for every layer."""

from dataclasses import dataclass, replace

import torch

from kvpass.budget import Budget, Prompt
from kvpass.errors import NestingError, PressError
from kvpass.press import Compressed, Press, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_press
from kvpass.registry import register_press


@register_press("per_layer")
@dataclass(frozen=True)
class PerLayer(Wrapper):
    """Keeps what the inner press keeps, of each layer as much as its entry in `compression_ratios` leaves.

    One fraction removed for every layer, from 0 to 1; a layer with 1 keeps nothing. It takes no other ratio.
    """

    changes = "drops pairs, layers differ in length"

    compression_ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        expect_press(self.name, self.press)
        if not self.press.needs_budget or self.press.per_layer:
            raise NestingError(f"per_layer: {self.press.name} says itself what each layer keeps")
        ratios = tuple(float(ratio) for ratio in self.compression_ratios)
        object.__setattr__(self, "compression_ratios", ratios)
        if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
            raise PressError(f"per_layer: compression_ratios={list(ratios)}, expected a fraction removed per layer")

    @property
    def needs_budget(self) -> bool:
        return False

    @property
    def per_layer(self) -> bool:
        return True

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return self.press.sizes(self._of_layer(prompt)) if self._ratio(prompt) < 1 else {"budget": 0}

    def scalars(self, prompt: Prompt) -> dict[str, float]:
        return self.press.scalars(self._of_layer(prompt)) if self._ratio(prompt) < 1 else {}

    def fits(self, prompt: Prompt) -> bool:
        return all(self.press.fits(self._of_layer(replace(prompt, layer=layer))) for layer in range(prompt.layers))

    def for_prompt(self, prompt: Prompt) -> Press:
        inner = self.press.for_prompt(self._of_layer(prompt))
        return self if inner is self.press else self.around(inner)

    def _ratio(self, prompt: Prompt) -> float:
        if len(self.compression_ratios) != prompt.layers:
            raise PressError(
                f"per_layer: {len(self.compression_ratios)} compression_ratios, the model has {prompt.layers} layers"
            )
        return self.compression_ratios[prompt.layer]

    def _of_layer(self, prompt: Prompt) -> Prompt:
        return replace(prompt, budget=Budget(ratio=min(self._ratio(prompt), 0.999)))

    def compress(self, x: PressInputs) -> Compressed:
        if self.compression_ratios[x.layer] < 1:
            return self.press.compress(x)
        nothing = x.keys.new_zeros(*x.keys.shape[:2], 0, dtype=torch.int64)
        return Compressed(x.keys[:, :, :0], x.values[:, :, :0], nothing)
