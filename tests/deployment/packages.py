"""What tests of every format share."""

import functools
from typing import Any

import torch
from models import compiled_model, token_ids
from torch import Tensor

from kvpass import CompiledModel

PRESSES = (
    "knorm",
    "snapkv(window_size=8)",
    "expected_attention",
    "streaming_llm",
    "chunkkv(snapkv(window_size=8), chunk_length=5)",
    "key_rerotation(knorm)",
)
LENGTHS = (5, 41, 118, 250)  # none of them an example's; 5 is too short for some
LONGEST = 300
NEW = 12


@functools.cache
def model_with(arch: str, press: str | None) -> CompiledModel:
    model = compiled_model(arch, press, ratio=0.5 if press else None)
    model.generation_config.eos_token_id = 255  # an id that the tiny models write now and then
    return model


@functools.cache
def expected(arch: str, press: str | None, tokens: int) -> Tensor:
    """The prompt and the greedy text behind it, by the eager graphs."""
    model = model_with(arch, press)
    ids: Tensor = model.generate(token_ids(1, tokens), max_new_tokens=NEW, do_sample=False)
    return ids


def check_greedy(model: Any, arch: str, press: str | None) -> None:
    """A deployed model continues prompts of all lengths as the eager graphs do."""
    for tokens in LENGTHS:
        found = model.generate(token_ids(1, tokens), NEW)
        assert torch.equal(found, expected(arch, press, tokens)), tokens


_compiled: dict[str, Any] = {}


def compile_once(monkeypatch: Any) -> None:
    """Ahead-of-time compilation takes a minute a model; extend and decode are those of all presses."""
    compile_ahead = torch._inductor.aot_compile

    def compiled(module: torch.fx.GraphModule, arguments: Any, **options: Any) -> Any:
        key = str([(n.op, str(n.target), str(n.args), str(n.meta.get("val"))) for n in module.graph.nodes])
        if key not in _compiled:
            _compiled[key] = compile_ahead(module, arguments, **options)
        return _compiled[key]

    monkeypatch.setattr(torch._inductor, "aot_compile", compiled)


def bytes_of_weights(model: CompiledModel) -> int:
    return sum({p.data_ptr(): p.nbytes for p in model.weights.parameters()}.values())
