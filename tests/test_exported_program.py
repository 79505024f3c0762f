"""Programs that somebody else exported: their inputs read, their masks and repeated heads undone, compressed alike."""

from typing import Any

import pytest
import torch
from bare_modules import CONTEXT, BareLM
from models import token_ids
from padding import close, padded, texts
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import GenerationConfig

import kvpass
from kvpass.errors import UnsupportedModelError

SIZES = {0: Dim("batch", min=1, max=64), 1: Dim("tokens", min=2, max=200)}


class Call(nn.Module):
    """A model of transformers as a user would wrap it for export."""

    def __init__(self, model: nn.Module, mask: bool) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Any:
        given = {"attention_mask": attention_mask} if self.mask else {}
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **given)


def exported(arch: str, mask: bool) -> ExportedProgram:
    ids, positions = torch.zeros(2, 24, dtype=torch.int64), torch.arange(24).repeat(2, 1)
    with torch.no_grad():
        return torch.export.export(
            Call(tiny_model(arch, attn_implementation="sdpa").eval(), mask),
            (ids, torch.ones_like(ids) if mask else None, positions),
            dynamic_shapes=(SIZES, SIZES if mask else None, SIZES),
            strict=False,
        )


@pytest.mark.parametrize("mask", [False, True], ids=["bare", "padding mask"])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_the_export_of_a_transformers_model(arch: str, mask: bool) -> None:
    """Entry for entry what compiling the live model gives; a padded batch too."""
    theirs = kvpass.compile(exported(arch, mask), "expected_attention", ratio=0.5, backend="eager")
    ours = kvpass.compile(tiny_model(arch), "expected_attention", ratio=0.5, backend="eager")
    ids, padding = padded(texts((50, 31)), "left")
    question = token_ids(2, 5, seed=1)
    caches = []
    for model in (theirs, ours):
        out = model.prefill(ids, padding)
        caches.append((out.logits, model(input_ids=question, past_key_values=out.past_key_values).logits, out))
    close(caches[0][0], caches[1][0])
    close(caches[0][1], caches[1][1])
    found, expected = (entry[2].past_key_values for entry in caches)
    for layer in range(len(expected)):
        assert torch.equal(found.positions(layer), expected.positions(layer))
        close(found.keys(layer), expected.keys(layer))
    assert theirs._execution.recipe.max_tokens == 200


@pytest.mark.parametrize("positions", ["learned", "table", "none"])
def test_a_bare_module_and_its_export_on_padded_batches(positions: str) -> None:
    """Positions that the module counts for all rows at once: rows at other places run apart."""
    module = BareLM(positions)
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.zeros(2, 24, dtype=torch.int64),), dynamic_shapes=(SIZES,), strict=False
        )
    for given in (module, program):
        model = kvpass.compile(given, "knorm", ratio=0.5, backend="eager", max_tokens=min(CONTEXT, 200))
        rows = [row % 60 for row in texts((40, 23, 23))]
        ids, mask = padded(rows, "left")
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=mask, **options)[:, 40:]
        for row, tokens in enumerate(rows):
            alone = model.generate(tokens[None], attention_mask=torch.ones(1, len(tokens)), **options)
            assert found[row].tolist() == alone[0, len(tokens) :].tolist()


def test_generation_config_is_taken() -> None:
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    model = kvpass.compile(BareLM("none"), backend="eager", max_tokens=CONTEXT, generation_config=settings)
    assert model.generate(token_ids(1, 9) % 60).shape == (1, 12)
    assert model.generation_config is not settings


def test_what_cannot_be_read_is_refused() -> None:
    ids = torch.zeros(2, 24, dtype=torch.int64)
    fixed = torch.export.export(BareLM("none"), (ids,), strict=False)
    with pytest.raises(UnsupportedModelError, match=r"a fixed batch of 2.*dynamic_shapes"):
        kvpass.compile(fixed, backend="eager")

    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BareLM("none")

        def forward(self, idx: Tensor, extra: Tensor) -> Tensor:
            return self.inner(idx) + extra[..., None]

    with torch.no_grad():
        program = torch.export.export(Embeds(), (ids, torch.zeros(2, 24)), dynamic_shapes=(SIZES, SIZES), strict=False)
    with pytest.raises(UnsupportedModelError, match=r"reads \(idx: .*extra: .*expected token ids \[B, S\]"):
        kvpass.compile(program, backend="eager")
