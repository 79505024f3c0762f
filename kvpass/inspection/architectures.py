"""Tiny configs of all decoder classes in transformers' causal-LM mapping.

One table of field values serves nearly all classes, because they name their fields alike; what does not fit stands in
`OVERRIDES`. Sizes are small and windows shorter than the texts, so that they bite.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvpass.inspection.overrides import LEFT_OUT, OVERRIDES, VARIANTS

WINDOW = 16
LONGEST = 512

_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "dff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(
        ("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1
    ),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), LONGEST),
    **dict.fromkeys(("original_max_position_embeddings", "context_length"), LONGEST),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads", "mamba_n_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads", "linear_num_key_heads", "num_nextn_predict_layers"), 2),
    **dict.fromkeys(("swa_head_dim", "index_head_dim", "index_topk", "linear_key_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_value_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "hidden_size_per_layer_input", "laurel_rank"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "router_hidden_size", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("mamba_num_heads", "linear_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 64,
    "no_rope_layer_interval": 2,  # in the layers without windows, as in the real ones
    "attention_multiplier": 0.25,  # 1 by default, which makes attention pick one token
    "use_sliding_window": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Architecture:
    """One row of the sweep: a decoder class with a tiny config."""

    name: str  # the model type; behind a + what its config varies
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    fields: Mapping[str, Any]

    def config(self) -> PreTrainedConfig:
        return self.config_class(**self.fields)

    def shallow(self) -> "Architecture":
        """With the first two layers alone; as it is where layers read the keys of others."""
        if self.fields.get("num_kv_shared_layers"):
            return self
        fields: dict[str, Any] = {name: 2 if name in _DEPTHS else value for name, value in self.fields.items()}
        fields |= {name: fields[name][:2] for name in ("layer_types", "mlp_layer_types") if name in fields}
        return replace(self, fields=fields)


@cache
def architectures() -> tuple[dict[str, Architecture], dict[str, str]]:
    """All rows by name, and why the other model types of the mapping are left out."""
    rows: dict[str, Architecture] = {}
    left_out: dict[str, str] = {}
    known: dict[type[PreTrainedModel], str] = {}
    # The model type that the class itself names comes first: llama4_text before llama4.
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=lambda n: (_alias_rank(n), n)):
        model_class = _model_class(name)
        if (reason := _left_out(name)) is not None:
            left_out[name] = reason
        elif model_class in known:
            left_out[name] = f"the class of {known[model_class]}"
        else:
            known[model_class] = name
            config_class: Any = model_class.config_class
            for variant, changes in {"": {}, **VARIANTS.get(name, {})}.items():
                row = f"{name}+{variant}" if variant else name
                fields = tiny_fields(config_class, {**OVERRIDES.get(name, {}), **changes})
                rows[row] = Architecture(row, model_class, config_class, fields)
    return dict(sorted(rows.items())), dict(sorted(left_out.items()))


def tiny_fields(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Field values of a tiny config, as far as the class has such fields."""
    known = field_names(config_class)
    fields = {name: value for name, value in _FIELDS.items() if name in known}
    if "kv_lora_rank" in known:
        fields["num_key_value_heads"] = 4  # the latent is expanded to all heads
    kinds = _kinds(config_class)
    depth = 4 if len(kinds) > 1 or "no_rope_layers" in known else 2
    fields |= {name: depth for name in _DEPTHS if name in known}
    if "layer_types" in known and kinds:
        fields["layer_types"] = [kinds[layer % len(kinds)] for layer in range(depth)]
    if "mlp_layer_types" in known:
        fields["mlp_layer_types"] = ["dense", *["sparse"] * (depth - 1)]
    elif "sliding_window" in known and "layer_types" not in known:
        fields["sliding_window"] = None  # one window in all layers would leave nothing to press: a variant
    fields |= overrides
    return fields


def field_names(config_class: type[PreTrainedConfig]) -> set[str]:
    """Keyword arguments that a config class declares itself."""
    if dataclasses.is_dataclass(config_class):
        return {f.name for f in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def _kinds(config_class: type[PreTrainedConfig]) -> list[str]:
    """The kinds of layers that a class mixes, full attention last."""
    kinds = set(getattr(config_class(), "layer_types", None) or ())
    if kinds and kinds <= {"full_attention", "sliding_attention"} and "sliding_window" in field_names(config_class):
        kinds = {"full_attention", "sliding_attention"}
    return sorted(kinds, key=lambda kind: (kind == "full_attention", kind))


def _model_class(name: str) -> type[PreTrainedModel]:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def _alias_rank(name: str) -> int:
    """How far a name is from the one that the class itself has."""
    config_class = CONFIG_MAPPING[name]
    return int(_model_class(name).config_class is not config_class) + int(config_class.model_type != name)


def _left_out(name: str) -> str | None:
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    config_class = CONFIG_MAPPING[name]
    if getattr(config_class, "is_encoder_decoder", False):
        return "encoder-decoder"
    if "is_decoder" in field_names(config_class) and not name.startswith("gpt_neox"):
        return "an encoder that can be used as a decoder"
    return None
