"""Published config.json files become models with the published number of parameters, or are refused by the field."""

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_models import CONFIGS

from moejax.config.attention import GroupedQuery
from moejax.config.kinds import is_built_in, kinds
from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.parameters import parameter_counts
from moejax.config.router import Router
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.interop.configs import ALSO, config_of, max_length, model_of, read_config
from moejax.interop.families import FAMILIES
from moejax.interop.same_function import differences

LLAMA_2_7B = {
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
  "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
  "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
  "max_position_embeddings": 4096, "pretraining_tp": 1, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "initializer_range": 0.02, "transformers_version": "4.31.0.dev0", "use_cache": True, "_name_or_path": "x",
}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {
  "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 500000.0,
  "max_position_embeddings": 8192, "attention_bias": False, "attention_dropout": 0.0, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_31_8B = LLAMA_3_8B | {
  "max_position_embeddings": 131072, "rope_scaling": {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
}  # fmt: skip
MISTRAL_7B = {
  "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
  "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3_8B = {
  "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
  "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
  "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
  "max_window_layers": 36, "tie_word_embeddings": False, "max_position_embeddings": 40960, "attention_bias": False,
}  # fmt: skip
MIXTRAL_8X7B = MISTRAL_7B | {
  "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
  "output_router_logits": False, "router_aux_loss_coef": 0.02,
}  # fmt: skip
QWEN3_30B_A3B = QWEN3_8B | {
  "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
  "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001,
}  # fmt: skip
DEEPSEEK_MOE_16B = {
  "model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
  "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
  "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_layer_freq": 1,
  "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
  "seq_aux": True, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False, "hidden_act": "silu",
  "max_position_embeddings": 4096, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
}  # fmt: skip
QWEN2_7B = QWEN3_8B | {
  "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "head_dim": None,
  "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "sliding_window": 131072,
}  # fmt: skip
QWEN15_MOE_A27B = QWEN2_7B | {
  "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
  "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
  "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
  "norm_topk_prob": False, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001,
}  # fmt: skip
OLMOE_1B_7B = {
  "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
  "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
  "norm_topk_prob": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "clip_qkv": None, "attention_bias": False,
  "max_position_embeddings": 4096, "tie_word_embeddings": False, "router_aux_loss_coef": 0.01,
}  # fmt: skip
LLAMA_4_SCOUT = {
  "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "head_dim": 128,
  "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
  "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "moe_layers": [*range(48)],
  "no_rope_layers": [1, 1, 1, 0] * 12, "attention_chunk_size": 8192, "use_qk_norm": True, "floor_scale": 8192,
  "attn_temperature_tuning": True, "attn_scale": 0.1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {
    "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  }, "max_position_embeddings": 10485760, "tie_word_embeddings": False, "router_jitter_noise": 0.0,
  "router_aux_loss_coef": 0.001, "attention_bias": False, "for_llm_compressor": False, "hidden_act": "silu",
}  # fmt: skip
LLAMA_4_MAVERICK = LLAMA_4_SCOUT | {
  "num_local_experts": 128, "interleave_moe_layer_step": 2, "moe_layers": [*range(1, 48, 2)], "use_qk_norm": False,
  "rope_scaling": None, "max_position_embeddings": 1048576,
}  # fmt: skip
PUBLISHED = {
  "Llama 2 7B": (LLAMA_2_7B, 6_738_415_616, 6_738_415_616),
  "Llama 3 8B": (LLAMA_3_8B, 8_030_261_248, 8_030_261_248),
  "Mistral 7B v0.3": (MISTRAL_7B, 7_248_023_552, 7_248_023_552),
  "Qwen3 8B": (QWEN3_8B, 8_190_735_360, 8_190_735_360),
  "Qwen2 7B": (QWEN2_7B, 7_615_616_512, 7_615_616_512),
  "Qwen1.5 MoE A2.7B": (QWEN15_MOE_A27B, 14_315_784_192, 2.7e9),
  "OLMoE 1B-7B": (OLMOE_1B_7B, 6_919_161_856, 1.3e9),
  "Mixtral 8x7B": (MIXTRAL_8X7B, 46_702_792_704, 12.9e9),
  "Llama 3.1 8B": (LLAMA_31_8B, 8_030_261_248, 8_030_261_248),
  "DeepSeekMoE 16B": (DEEPSEEK_MOE_16B, 16_375_728_128, 2.83e9),
  "Qwen3 30B-A3B": (QWEN3_30B_A3B, 30_532_122_624, 3.3e9),
}
"""config.json as published, total parameters of the safetensors on the hub, and active ones."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_number_of_parameters(name):
  config, total, active = PUBLISHED[name]
  model = model_of(config)
  assert parameter_counts(model).total == total
  assert parameter_counts(model).active == pytest.approx(active, rel=0.02)  # published in tenths of a billion


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_comes_back_from_the_config_json_that_is_written_for_it(name):
  model = model_of(PUBLISHED[name][0])
  assert model_of(config_of(model, 16)) == model


@pytest.mark.parametrize(("name", "config"), [("llama4_scout", LLAMA_4_SCOUT), ("llama4_maverick", LLAMA_4_MAVERICK)])
def test_the_declared_models_of_llama_4_compute_what_its_config_json_says_and_come_back(name, config):
  model = model_of(config)
  assert not [*differences(EXPERIMENTS[name]().model, model)]
  assert model_of(config_of(model, 16384)) == model
  assert model_of(config, 8192).attention[0] == dataclasses.replace(model.attention[0], chunk=None)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"moe_layers": [0, 2]}, r"moe_layers=\[0, 2\] is not supported; moejax supports every n-th layer"),
    ({"moe_layers": []}, r"moe_layers=\[\] is not supported"),
    ({"no_rope_layers": [1, 0]}, r"no_rope_layers has 2 entries, but num_hidden_layers=48"),
    ({"layer_types": ["sliding_attention"] * 48}, r"layer_types has sliding_attention; Llama 4 has only chunked"),
    ({"num_experts_per_tok": 2}, r"moe\.weights_on='inputs' needs one expert per token"),
    ({"floor_scale": 0.5}, r"floor_scale=0\.5 must be an integer above 0"),
  ],
)
def test_what_llama_4_says_of_its_layers_is_read_or_refused(fields, message):
  with pytest.raises(UserError, match=message):
    model_of(LLAMA_4_SCOUT | fields)


def test_layers_of_llama_4_without_lists_follow_its_intervals():
  lists = dict.fromkeys(("moe_layers", "no_rope_layers", "layer_types"))
  assert model_of(LLAMA_4_MAVERICK | lists) == model_of(LLAMA_4_MAVERICK)
  every_second = model_of(LLAMA_4_SCOUT | lists | {"no_rope_layer_interval": 2, "attn_temperature_tuning": False})
  assert [(layer.rotary_embedding, layer.chunk) for layer in every_second.attention] == [(True, 8192), (False, None)]
  assert not every_second.attention[1].score_log_scale
  others = model_of(LLAMA_4_SCOUT | {"layer_types": ["full_attention", "chunked_attention"] * 24})
  assert [layer.chunk for layer in others.attention] == [None, 8192] * 2
  assert model_of(config_of(others, 16384)) == others


REFUSED = {
  "mlp_only_layers": [0], "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
  "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}, "hidden_act": "gelu", "attention_bias": True,
  "attention_dropout": 0.1, "clip_qkv": 8.0, "quantization_config": {"quant_method": "fp8"}, "scoring_func": "sigmoid",
  "partial_rotary_factor": 0.5, "layer_types": ["linear_attention"], "hidden_size": "4096",
  "never_seen": 3, "model_type": "gpt2", "vocab_size": None, "max_position_embeddings": None, "head_dim": 7,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_model_cannot_express_is_refused_by_the_field(field):
  theirs = {"head_dim": "model.head_dim=7"}.get(field, field)
  with pytest.raises(UserError) as caught:
    model_of(QWEN3_30B_A3B | {field: REFUSED[field]})
  assert theirs in str(caught.value)


def test_the_first_layers_of_deepseek_moe_are_dense():
  model = model_of(DEEPSEEK_MOE_16B)
  assert model.moe and (model.moe.num_shared_experts, model.moe.d_ff, model.moe.leading_dense) == (2, 1408, 1)
  assert (model.d_ff, model.num_sparse_layers, model.num_periods) == (10944, 27, 27)
  assert not model.moe.router.renormalize


def test_windows_count_only_for_texts_that_are_longer():
  windowed = MISTRAL_7B | {"sliding_window": 4096}
  assert model_of(windowed).attention == (GroupedQuery(window=4096),)
  assert model_of(windowed, sequence_length=4096) == model_of(MISTRAL_7B)
  assert model_of(MISTRAL_7B | {"sliding_window": 32768}) == model_of(MISTRAL_7B)
  with pytest.raises(UserError, match="have no windows; use --sequence-length 1024 or less"):
    model_of(LLAMA_3_8B | {"sliding_window": 1024})


LOCAL = GroupedQuery(window=4096)
WINDOWS = {
  "all layers": (MISTRAL_7B | {"sliding_window": 4096}, (LOCAL,)),
  "last layers": (
    QWEN2_7B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14},
    (GroupedQuery(),) * 14 + (LOCAL,) * 14,
  ),
  "every second layer": (
    QWEN15_MOE_A27B | {"use_sliding_window": True, "sliding_window": 4096}, (LOCAL, GroupedQuery()),
  ),
  "as listed": (
    QWEN3_8B | {
      "use_sliding_window": True, "sliding_window": 4096,
      "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 12,
    },
    (LOCAL, LOCAL, GroupedQuery()),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_layers_with_windows_are_the_shortest_pattern_and_come_back(name):
  config, pattern = WINDOWS[name]
  model = model_of(config)
  assert model.attention == pattern
  assert model_of(config_of(model, 8192)) == model


def test_a_pattern_that_is_written_twice_is_the_same_model():
  once, twice = (dataclasses.replace(MODEL, attention=(GroupedQuery(),) * count) for count in (1, 2))
  assert config_of(once, 8) == config_of(twice, 8)
  with pytest.raises(UserError, match=r"model\.attention=.* is not supported by"):
    config_of(dataclasses.replace(MODEL, attention=(GroupedQuery(window=2), GroupedQuery(window=3))), 8)


def test_rope_has_its_base_where_either_version_of_transformers_writes_it():
  old = {name: value for name, value in MIXTRAL_8X7B.items() if name != "rope_theta"}
  assert model_of(old).rope_theta == 1e6  # the default of the family
  assert model_of(old | {"rope_theta": 5000}).rope_theta == 5000.0
  new = old | {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}
  assert model_of(new).rope_theta == 7000.0


def test_a_config_json_is_read_from_its_folder_or_by_its_name(tmp_path):
  for content in ("{", "[1]"):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="is not"):
      read_config(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
  assert read_config(tmp_path) == read_config(tmp_path / "config.json") == LLAMA_2_7B
  assert max_length(LLAMA_2_7B) == 4096
  with pytest.raises(UserError, match="cannot be read"):
    read_config(tmp_path / "nothing")


MODEL = Model(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=8, vocab_size=30)
SPARSE = dataclasses.replace(MODEL, moe=MoE(num_experts=4, experts_per_token=2, d_ff=8))


@pytest.mark.parametrize(
  ("model", "field"),
  [
    (dataclasses.replace(MODEL, logit_cap=3.0), "model.logit_cap=3.0"),
    (dataclasses.replace(MODEL, activation="gelu"), "model.activation='gelu'"),
    (dataclasses.replace(MODEL, attention_experts=2), "model.attention_experts=2"),
    (dataclasses.replace(SPARSE, logit_cap=3.0), "model.logit_cap=3.0"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_no_family_expresses_is_refused_by_its_field(model, field):
  with pytest.raises(UserError, match=f"{field} is not supported by"):
    config_of(model, 8)


def test_every_other_router_is_refused_by_its_kind():
  assert config_of(SPARSE, 8)["model_type"] == "mixtral"
  for name, kind in kinds(Router).items():
    if not is_built_in(kind) or name == "top_k":
      continue
    router = kind(threshold=0.5) if name == "top_p" else kind()
    active = 2 if name in ("top_p", "expert_choice") else 4
    for every, field in ((1, f"moe.router.kind='{name}'"), (2, "")):
      moe = dataclasses.replace(SPARSE.moe, experts_per_token=active, router=router, every=every)
      with pytest.raises(UserError, match=rf"model\.{field}.* is not supported by"):
        config_of(dataclasses.replace(SPARSE, moe=moe), 8)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_has_the_defaults_of_transformers(family):
  transformers = pytest.importorskip("transformers", reason="needs transformers")
  if family.model_type not in transformers.CONFIG_MAPPING:
    pytest.skip("the class is not part of transformers")
  theirs = transformers.CONFIG_MAPPING[family.model_type]().to_dict()
  rope = theirs["rope_parameters"]
  assert rope.get("full_attention", rope)["rope_theta"] == family.rope_theta
  assert family.local_theta is None or rope["sliding_attention"]["rope_theta"] == family.local_theta
  assert family.balance_loss is None or family.balance_loss in theirs
  needed = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
  for name in (*needed, *family.moe.values()):
    assert name in theirs or ALSO[name] in theirs


VALUES = (None, "", "x", 0, -1, 1.5, True, [], {}, [1], {"a": {}}, 10**30, math.nan)


def changed(config):
  """The config with each field, also of nested objects, at each of VALUES."""
  for name, value in config.items():
    for other in VALUES:
      yield config | {name: other}
    if isinstance(value, dict):
      yield from (config | {name: inner} for inner in changed(value))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_value_of_any_type_makes_a_model_or_is_refused_in_one_line(family):
  refused = 0
  often = {"sliding_window": 3, "layer_types": ["full_attention"] * 4, "rope_scaling": None, "rope_theta": 1e4}
  for config in changed(often | CONFIGS[family]):
    try:
      model_of(config)
    except UserError as error:
      assert "\n" not in str(error)
      refused += 1
  assert refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek"])  # not part of transformers
def test_a_missing_field_has_the_value_that_transformers_gives_it_or_is_asked_for(family):
  theirs = pytest.importorskip("transformers", reason="needs transformers").CONFIG_MAPPING[family]
  whole = theirs().to_dict() | {"layer_types": None} | CONFIGS[family]
  whole.pop(next((ALSO[name] for name in ALSO if name in CONFIGS[family]), ""), None)
  model_of(whole)
  for name in whole:
    config = {other: value for other, value in whole.items() if other != name}
    with contextlib.suppress(UserError):
      found = model_of(config)
      assert found == model_of(theirs.from_dict(config).to_dict()), name
