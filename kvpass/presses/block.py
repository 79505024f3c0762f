"""Choose block by block, as if the text came in pieces. From KeyDiff, https://arxiv.org/abs/2504.15364"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import MissingTapError, PressError
from kvpass.loops import is_traced, unaliased, while_loop
from kvpass.press import ScorerPress, SelectingPress, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_scorer
from kvpass.registry import register_press
from kvpass.selection import best, compact, gather


@register_press("block")
@dataclass(frozen=True)
class Block(Wrapper, SelectingPress):
    """Keeps what the inner press keeps of what is kept so far and the next `block_size` tokens, block after block.

    It imitates a prefill in pieces with a cache that never holds more than the budget and a block; a loop inside the
    graph. Queries, keys and values of a candidate are its own. For a score that depends on each token alone the result
    is that of the inner press, which then runs once.
    """

    block_size: int = 128

    def __post_init__(self) -> None:
        expect_scorer(self.name, self.press, "candidates are scored again in every block")
        if self.block_size < 1:
            raise PressError(f"block: block_size={self.block_size}, expected at least 1")

    @property
    def example_tokens(self) -> int:
        """Half of it is some whole blocks and a rest that is neither nothing nor one token."""
        blocks = -(-self.min_tokens // self.block_size)
        return 2 * (blocks * self.block_size + max(2, self.block_size // 2))

    def fits(self, prompt: Prompt) -> bool:
        return self.press.fits(Prompt(prompt.kept, prompt.budget, prompt.layer, prompt.layers))

    def smallest(self) -> dict[str, int]:
        return {**self.press.smallest(), "budget": max(2, self.press.min_tokens)}

    def keep(self, x: PressInputs) -> Tensor:
        assert isinstance(self.press, ScorerPress)
        if self.press.local:
            return best(self.press.score(x), x.budget)
        batch, heads, tokens, _ = x.keys.shape
        size, block = x.budget, self.block_size
        end = size + (tokens - size) // block * block  # of the last whole block
        device = x.keys.device

        def unfinished(start: Tensor, kept: Tensor) -> Tensor:
            return start < end

        def next_block(start: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
            return start + block, self._chosen(x, kept, torch.arange(block, device=device) + start)

        first = torch.arange(size, device=device).expand(batch, heads, size).contiguous()
        if is_traced(x.keys):  # a loop may close over what the inner press reads, and over no views of one tensor
            self._chosen(x, first, torch.arange(size, tokens, device=device))
            names = [name for name in x.reads if isinstance(x.taps.get(name), Tensor)]
            given = [tap for name in names if isinstance(tap := x.taps[name], Tensor)]
            x = x.replace(dict(zip(names, unaliased(*given), strict=True)), only=names)
        _, kept = while_loop(unfinished, next_block, (torch.arange(1, device=device)[0] + size, first))
        kept = self._chosen(x, kept, torch.arange(end, tokens, device=device))
        return torch.zeros_like(x.keys[..., 0], dtype=torch.bool).scatter(2, kept, True)

    def _chosen(self, x: PressInputs, kept: Tensor, block: Tensor) -> Tensor:
        """The best of those kept and the block. i64[B, Hkv, N]"""
        assert isinstance(self.press, ScorerPress)
        candidates = torch.cat([kept, block.expand(*kept.shape[:2], -1)], dim=2)
        marked = best(self.press.score(_shown(x, candidates)), x.budget)
        return candidates.gather(2, compact(marked, x.budget)).contiguous()


def _shown(x: PressInputs, candidates: Tensor) -> PressInputs:
    """The layer as if the candidates i64[B, Hkv, n] were the text."""
    taps: dict[str, Tensor | MissingTapError] = {}
    for name, tap in x.taps.items():
        if not isinstance(tap, Tensor) or name.startswith("asset.") or name == "output_weight":
            taps[name] = tap
        elif name == "hidden_states":
            taps[name] = MissingTapError("block: heads keep different candidates, so there is no hidden state of all")
        else:
            groups = tap.shape[1] // candidates.shape[1]
            taps[name] = gather(tap, candidates.repeat_interleave(groups, dim=1) if groups != 1 else candidates)
    return x.replace(taps, next_position=x.next_position)
