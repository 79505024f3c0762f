"""Programs hold for every prompt that they are for."""

from pathlib import Path
from typing import Any

import torch
from models import compiled_model, token_ids
from torch import Tensor, nn
from torch.export import Dim, export

import kvpass
from kvpass.deployment.assumptions import broken_assumption


class Fifths(nn.Module):
    """Right for as many tokens as a table says, and for multiples of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.arange(100).clamp(max=40))

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        torch._check(tokens % 5 == 0)
        count = torch.ops.aten._local_scalar_dense.default(self.counts[tokens])
        torch._check(count >= tokens)
        return input_ids * 2


def test_assertions_are_tried_for_all_lengths() -> None:
    ids = torch.zeros(1, 20, dtype=torch.int64)
    program = export(
        Fifths(),
        (ids,),
        dynamic_shapes={"input_ids": {1: Dim.DYNAMIC(min=2, max=90)}},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    assert broken_assumption(program, range(5, 45, 5)) is None
    assert (broken_assumption(program, (10, 12)) or "").startswith("for 12 tokens: ")
    assert (broken_assumption(program, (10, 45)) or "").startswith("for 45 tokens: ")


def test_loops(tmp_path: Path) -> None:
    """A loop over blocks of the prompt reads sizes, of which the number of rows is fixed."""
    model = compiled_model("llama", "observed_attention(block=16)", ratio=0.5)
    model.export(tmp_path / "package", max_tokens=150, batch_size=2)
    loaded: Any = kvpass.load(tmp_path / "package")
    for tokens in (49, 118):
        out = model.prefill(token_ids(2, tokens))
        _, state = loaded.prefill(token_ids(2, tokens), room=0)
        for layer in range(2):
            torch.testing.assert_close(state.tensors[f"keys_{layer}"], out.past_key_values.keys(layer))
