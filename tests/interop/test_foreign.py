"""Other projects' configurations become experiments for plans. What moejax lacks is named and not left out unasked."""

import json
import re

import pytest

from moejax.config.parameters import parameter_counts
from moejax.errors import UserError
from moejax.experiments import EXPERIMENTS
from moejax.interop.foreign import foreign_experiment

LLAMA_31_8B = {
  "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False, "hidden_act": "silu",
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                   "original_max_position_embeddings": 8192},
}  # fmt: skip
QWEN2_7B = {
  "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
  "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
  "rope_theta": 1000000.0, "max_position_embeddings": 131072, "sliding_window": 131072, "use_sliding_window": False,
  "max_window_layers": 28, "tie_word_embeddings": False, "hidden_act": "silu", "attention_dropout": 0.0,
}  # fmt: skip
OLMOE = {
  "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
  "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
  "norm_topk_prob": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
  "tie_word_embeddings": False, "hidden_act": "silu", "clip_qkv": None, "router_aux_loss_coef": 0.01,
}  # fmt: skip
GPT_OSS_20B = {
  "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
  "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32,
  "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5,
  "rope_theta": 150000, "max_position_embeddings": 131072, "initial_context_length": 4096, "attention_bias": True,
  "layer_types": ["sliding_attention", "full_attention"] * 12, "tie_word_embeddings": False, "hidden_act": "silu",
  "rope_scaling": {"factor": 32.0, "rope_type": "yarn", "original_max_position_embeddings": 4096},
}  # fmt: skip
GEMMA_7B = {
  "model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "head_dim": 256,
  "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0, "max_position_embeddings": 8192, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA_3_12B = {
  "model_type": "gemma3", "vision_config": {"hidden_size": 1152},
  "text_config": {
    "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
    "head_dim": 256, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "sliding_window": 1024, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
  },
}  # fmt: skip
LLAMA_4_SCOUT = {
  "model_type": "llama4", "vision_config": {"hidden_size": 1408},
  "text_config": {
    "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "head_dim": 128, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 1, "attention_chunk_size": 8192,
    "no_rope_layers": [], "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 10485760,
    "attn_temperature_tuning": 4, "router_jitter_noise": 0.0, "for_llm_compressor": False, "hidden_act": "silu",
    "rope_scaling": {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
  },
}  # fmt: skip
PLANNED = (
  # What is lacking, and the total that is published less what the lacking parts have.
  (LLAMA_31_8B | {"attention_bias": True}, ["attention_bias"], 8_030_261_248),
  (GPT_OSS_20B | {"quantization_config": {"quant_method": "mxfp4"}}, ["quantization_config"], 20_914_757_184),
  (GEMMA_3_12B, ["vision"], 11_766_034_176),
  (LLAMA_4_SCOUT, ["vision"], 107_769_861_120),
)
WHOLE = (
  (LLAMA_31_8B, 8_030_261_248),
  (QWEN2_7B, 7_615_616_512),
  (OLMOE, 6_919_161_856),
  (GPT_OSS_20B, 20_914_757_184),
  (GEMMA_3_12B["text_config"], 11_766_034_176),
  (GEMMA_7B, 8_537_680_896),
  (LLAMA_4_SCOUT["text_config"], 107_769_861_120),
)


def written(tmp_path, config) -> str:
  (tmp_path / "config.json").write_text(json.dumps(config))
  return f"hf:{tmp_path / 'config.json'}"


@pytest.mark.parametrize(("config", "missing", "total"), PLANNED, ids=lambda value: str(value)[:30])
def test_a_config_is_refused_with_all_that_it_lacks_and_planned_without_it(config, missing, total, tmp_path):
  name = written(tmp_path, config)
  with pytest.raises(UserError, match="has features that moejax does not support") as raised:
    foreign_experiment(name, 8, ())
  for feature in missing:
    assert feature in str(raised.value)
  advised = re.search(r"add --without ([\w ]+)", str(raised.value))
  assert advised
  experiment, without = foreign_experiment(name, 8, tuple(advised[1].split()))
  assert sorted(without) == missing
  assert parameter_counts(experiment.model).total == total


@pytest.mark.parametrize(("config", "total"), WHOLE, ids=lambda value: str(value)[:30])
def test_a_config_that_moejax_computes_is_planned_whole(config, total, tmp_path):
  experiment, without = foreign_experiment(written(tmp_path, config), 8, ())
  assert not without and parameter_counts(experiment.model).total == total


def test_a_feature_that_a_model_does_not_have_cannot_be_left_out(tmp_path):
  with pytest.raises(UserError, match="--without sinks"):
    foreign_experiment(written(tmp_path, LLAMA_31_8B), 8, ("sinks",))


def test_a_window_as_long_as_the_sequences_is_no_lack(tmp_path):
  mistral = LLAMA_31_8B | {"model_type": "mistral", "rope_scaling": None, "sliding_window": 4096}
  experiment, without = foreign_experiment(written(tmp_path, mistral), 8, ())
  assert not without and experiment.training.batch_size == 8


def maxtext(tmp_path, text: str, *overrides: str) -> str:
  (tmp_path / "model.yml").write_text(text)
  return f"maxtext:{','.join([str(tmp_path / 'model.yml'), *overrides])}"


LLAMA_2_7B = """
base_emb_dim: 4096
base_num_query_heads: 32
base_num_kv_heads: 32
base_mlp_dim: 11008
base_num_decoder_layers: 32
head_dim: 128
mlp_activations: ["silu", "linear"]
vocab_size: 32000
logits_via_embedding: False
decoder_block: "llama2"
"""
MIXTRAL_8X7B = """
base_emb_dim: 4096
base_num_query_heads: 32
base_num_kv_heads: 8
base_mlp_dim: 14336
base_num_decoder_layers: 32
num_experts: 8
num_experts_per_tok: 2
mlp_activations: ["silu", "linear"]
vocab_size: 32000
"""


def test_a_maxtext_configuration_has_its_overrides_mesh_and_batch(tmp_path):
  overrides = ("per_device_batch_size=4", "max_target_length=4096", "ici_fsdp_parallelism=64", "dcn_data_parallelism=2",
               "remat_policy=save_qkv_proj", "gradient_accumulation_steps=2")  # fmt: skip
  found, without = foreign_experiment(maxtext(tmp_path, LLAMA_2_7B, *overrides), 128, ())
  assert not without
  assert parameter_counts(found.model).total == 6_738_415_616
  assert found.mesh.shape == {"replica": 2, "data": 64, "expert": 1, "context": 1, "model": 1}
  assert found.data.sequence_length == 4096 and found.model.saved_values == ("layer_inputs", "queries", "keys_values")
  assert found.training.batch_size == 4 * 128 * 2 and found.training.gradient_accumulation == 2


@pytest.mark.parametrize("billions", [16, 32, 64])
def test_the_default_model_of_maxtext_grows_as_its_runs_have_it(billions, tmp_path):
  listed = EXPERIMENTS[f"maxtext_{billions}b"]().model
  found, _ = foreign_experiment(maxtext(tmp_path, f"global_parameter_scale: {billions}\n"), 8, ())
  assert parameter_counts(found.model) == parameter_counts(listed)


def test_the_experts_of_maxtext_are_dropless_where_it_has_no_capacity(tmp_path):
  dropless, _ = foreign_experiment(maxtext(tmp_path, MIXTRAL_8X7B), 8, ())
  capacity, _ = foreign_experiment(maxtext(tmp_path, MIXTRAL_8X7B, "capacity_factor=1.25"), 8, ())
  assert parameter_counts(dropless.model).total == 46_702_792_704
  assert dropless.model.moe.dispatch.kind == "grouped" and capacity.model.moe.dispatch.kind == "einsum"
  assert capacity.model.moe.capacity_factor == 1.25


def test_what_maxtext_has_and_moejax_lacks_is_named(tmp_path):
  name = maxtext(tmp_path, LLAMA_2_7B, "quantization=fp8", "optimizer_memory_host_offload=True")
  with pytest.raises(
    UserError, match=r"quantization \(products in fp8\); optimizer_mem.*--without quantization optimizer_mem"
  ):
    foreign_experiment(name, 8, ())
  features = ("quantization", "optimizer_memory_host_offload")
  _, without = foreign_experiment(name, 8, features)
  assert tuple(without) == features


@pytest.mark.parametrize(
  ("tensors", "saved", "offloaded"),
  [
    (["remat_policy=qkv_proj_offloaded"], ("queries", "keys_values"), ("queries", "keys_values")),
    (["remat_policy=custom", "context=device", "decoder_layer_input=offload"], ("context",), ("layer_inputs",)),
    (
      ["remat_policy=custom", "key_proj=offload", "value_proj=offload", "out_proj=device", "query_proj=remat"],
      ("keys_values", "attention_out"),
      ("keys_values",),
    ),
    (["remat_policy=custom", "mlpwo=offload", "decoder_layer_input=device"], (), ()),  # not read in a dense layer
  ],
)
def test_what_maxtext_saves_and_offloads_is_so_here(tensors, saved, offloaded, tmp_path):
  model = foreign_experiment(maxtext(tmp_path, LLAMA_2_7B, *tensors), 8, ())[0].model
  assert model.remat == ("selected" if saved else "layer_inputs")
  assert (model.save_activations, model.offload_activations) == (saved, offloaded)


def test_what_maxtext_saves_of_experts_is_saved_and_what_it_saves_apart_is_named(tmp_path):
  tensors = ("remat_policy=custom", "moe_mlpwi_0=device", "moe_mlpwi_1=device", "moe_mlpwo=offload")
  model = foreign_experiment(maxtext(tmp_path, MIXTRAL_8X7B, *tensors), 8, ())[0].model
  assert model.save_activations == ("experts_in", "experts_out")
  assert model.offload_activations == ("experts_out",)
  assert foreign_experiment(maxtext(tmp_path, MIXTRAL_8X7B, "remat_policy=custom", "mlpwo=device"), 8, ())[
    0
  ].model.save_activations == ("experts_out",)
  with pytest.raises(UserError, match="moe_mlpwi_0=device with moe_mlpwi_1=remat"):
    foreign_experiment(maxtext(tmp_path, MIXTRAL_8X7B, *tensors[:2]), 8, ())


@pytest.mark.parametrize(
  "wrong",
  ["remat_policy=mystery", "context=host", "per_device_batch_size", "global_parameter_scale=3"],
)
def test_overrides_that_mean_nothing_are_refused(wrong, tmp_path):
  with pytest.raises(UserError):
    foreign_experiment(maxtext(tmp_path, LLAMA_2_7B, wrong), 8, ())
