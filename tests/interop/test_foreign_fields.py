"""Each field of another project's configuration changes the experiment, is named, or is known to have no effect."""

import json
import pathlib
import random
import re

import pytest
import yaml

from moejax.config.parameters import parameter_counts
from moejax.errors import UserError
from moejax.interop.configs import WITHOUT_EFFECT
from moejax.interop.foreign import foreign_experiment

LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096}  # fmt: skip
CONFIGS = {
  "Llama 3.1 405B": (405_853_388_800, {
    "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
    "num_hidden_layers": 126, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_scaling": LLAMA_3_1,
    "eos_token_id": [128001, 128008], "mlp_bias": False, "attention_bias": False, "hidden_act": "silu"}),
  "Llama 4 Scout": (107_769_861_120, {
    "model_type": "llama4", "vision_config": {}, "text_config": {
      "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
      "head_dim": 128, "num_attention_heads": 40, "num_key_value_heads": 8, "num_hidden_layers": 48,
      "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "vocab_size": 202048,
      "attention_chunk_size": 1024, "no_rope_layers": [], "use_qk_norm": True, "rope_theta": 500000.0,
      "rms_norm_eps": 1e-5, "rope_scaling": LLAMA_3_1 | {"high_freq_factor": 1.0, "factor": 16.0}}}),
  "Mistral 7B": (7_241_732_096, {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "sliding_window": 1024, "tie_word_embeddings": False, "vocab_size": 32000}),
  "Qwen2.5 0.5B": (494_032_768, {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "sliding_window": 1024, "tie_word_embeddings": True, "use_sliding_window": False,
    "use_mrope": False, "vocab_size": 151936}),
  "Qwen3 30B-A3B": (30_532_122_624, {
    "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False, "vocab_size": 151936}),
  "Qwen1.5-MoE": (14_315_784_192, {
    "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
    "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False,
    "vocab_size": 151936}),
  "Mixtral 8x22B": (140_630_071_296, {
    "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48,
    "num_experts_per_tok": 2, "num_hidden_layers": 56, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000, "router_jitter_noise": 0.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32768}),
  "OLMoE": (6_919_161_856, {
    "model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 50304}),
  "gpt-oss 20B": (20_914_757_184, {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
                     "beta_slow": 1.0, "truncate": False}}),
  "DeepSeek-V2-Lite": (15_706_484_224, {
    "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_scaling": YARN, "rope_theta": 10000, "topk_group": 1,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "v_head_dim": 128,
    "vocab_size": 102400}),
  "DeepSeek-MoE 16B": (16_375_728_128, {
    "model_type": "deepseek", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000, "scoring_func": "softmax",
    "tie_word_embeddings": False, "vocab_size": 102400}),
  "Gemma 7B": (8_537_680_896, {
    "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "hidden_size": 3072, "intermediate_size": 24576,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "vocab_size": 256000}),
  "Gemma 2 9B": (9_241_705_984, {
    "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336,
    "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 1024, "vocab_size": 256000}),
  "Gemma 3 12B": (11_766_034_176, {
    "model_type": "gemma3", "vision_config": {}, "text_config": {
      "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
      "num_hidden_layers": 48, "num_key_value_heads": 8, "sliding_window": 1024,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}),
}  # fmt: skip

SAME_FUNCTION = {
  "eos_token_id", "router_aux_loss_coef",
  "hidden_act",  # of Gemma, which transformers ignores
  "max_window_layers", "sliding_window",  # where use_sliding_window is false
  "n_group", "topk_group",  # where topk_method is greedy
}  # fmt: skip
"""Fields that do not change the function of one of these models."""

WRONG = (True, "x", "", -1, 0, 3, 7.5, 1e308, 10**30, [], {}, ["a"], {"a": 1}, [[0]], None)


def planned(name: str) -> tuple:
  """The experiment and what is missing, without everything that it lacks; or the one-line error that says why not."""
  try:
    return foreign_experiment(name, 8, ())
  except UserError as error:
    assert "\n" not in str(error) and len(str(error)) < 3000
    advised = re.search(r"add --without ([\w ]+)$", str(error))
    if not advised:
      return (str(error),)
  try:
    return foreign_experiment(name, 8, tuple(advised[1].split()))
  except UserError as error:
    return (str(error),)


@pytest.fixture
def of_config(tmp_path):
  def plan(config) -> tuple:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return planned(f"hf:{tmp_path / 'config.json'}")

  return plan


def text_of(config):
  return config.get("text_config", config)


def changed(config, name, *value):
  text = {key: old for key, old in text_of(config).items() if key != name} | ({name: value[0]} if value else {})
  return config | {"text_config": text} if "text_config" in config else text


@pytest.mark.parametrize("model", CONFIGS)
def test_a_published_config_has_the_published_number_of_parameters(model, of_config):
  total, config = CONFIGS[model]
  experiment, _ = of_config(config)
  assert parameter_counts(experiment.model).total == total


@pytest.mark.parametrize("model", CONFIGS)
def test_no_value_of_a_field_is_ignored_or_a_bug(model, of_config):
  _, config = CONFIGS[model]
  whole = of_config(config)
  fields = {*text_of(config), "head_dim", "tie_word_embeddings", "layer_types", "sliding_window", "rope_scaling"}
  for name in sorted(fields):
    of_config(changed(config, name))
    for wrong in random.Random(f"{model} {name}").sample(WRONG, 3):
      of_config(changed(config, name, wrong))
    value = text_of(config).get(name)
    other = not value if isinstance(value, bool) else 2 * value if isinstance(value, int | float) and value else None
    if other is not None and name not in SAME_FUNCTION | WITHOUT_EFFECT - {"head_dim", "rope_theta"}:
      found = of_config(changed(config, name, other))
      named = len(found) == 1 or name in found[1] or found[1] != whole[1]
      assert named or found[0] != whole[0], f"{name}={other} is ignored"
  for name, value in (("a_new_field", 2), ("attention_bias", "x"), ("partial_rotary_factor", 0.5), ("mlp_bias", True),
                      ("rope_scaling", {"rope_type": "longrope", "factor": 4.0}), ("logit_scale", 0.5),
                      ("rope_scaling", {"rope_type": {}}), ("num_hidden_layers", 10**9)):  # fmt: skip
    found = of_config(changed(config, name, value))
    assert len(found) == 1 or name in found[1] or found[0].model != whole[0].model, name


@pytest.mark.parametrize("experts", [5, 0, 9])
def test_more_choices_than_experts_are_refused(experts, of_config):
  config = CONFIGS["Mixtral 8x22B"][1] | {"num_experts_per_tok": experts, "num_local_experts": 4}
  (error,) = of_config(config)
  assert "experts_per_tok" in error


def test_layers_that_are_not_known_are_refused_or_named(of_config):
  _, llama = CONFIGS["Llama 3.1 405B"]
  (error,) = of_config(llama | {"layer_types": ["linear_attention"] * 126})
  assert "linear_attention" in error
  _, without = of_config(llama | {"layer_types": ["sliding_attention"] * 126, "sliding_window": 128})
  assert "sliding_window" in without


LLAMA_2 = {"base_emb_dim": 4096, "base_num_query_heads": 32, "base_num_kv_heads": 32, "base_mlp_dim": 11008,
           "base_num_decoder_layers": 32, "head_dim": 128, "vocab_size": 32000}  # fmt: skip


@pytest.fixture
def of_yaml(tmp_path):
  def plan(text, *overrides, name="model.yml") -> tuple:
    (tmp_path / name).write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return planned(f"maxtext:{','.join([str(tmp_path / name), *overrides])}")

  return plan


def test_no_setting_of_maxtext_is_ignored_or_a_bug(of_yaml):
  from moejax.interop.maxtext import LACKS, USED

  whole = of_yaml(LLAMA_2)
  assert parameter_counts(whole[0].model).total == 6_738_415_616
  for name in sorted({*USED, *LACKS, "ici_fsdp_parallelism", "ici_context_parallelism", "a_new_setting"}):
    for wrong in random.Random(name).sample(WRONG, 1):
      of_yaml(LLAMA_2 | {name: wrong})
  sparse = {"num_experts": 8, "num_experts_per_tok": 2, "decoder_block": "qwen3_moe"}
  for name, value in (
    ("a_new_setting", 3), ("decoder_block", "gemma2"), ("use_post_attn_norm", True), ("rope_type", "llama3.1"),
    ("mtp_num_layers", 1), ("attention_type", "local_sliding"), ("opt_type", "sgd"), ("dtype", "float32"),
    ("ici_context_parallelism", 2), ("weight_dtype", "bfloat16"), ("mlp_activations", ["gelu", "linear"]),
    ("mlp_activations", ["relu"]), ("scan_layers", False), ("num_vocab_tiling", 4), ("use_qk_norm", True),
    ("attention", "dot_product"), ("first_num_dense_layers", 2), ("norm_topk_prob", True), ("shared_experts", 1),
    ("interleave_moe_layer_step", 2), ("capacity_factor", 1.5), ("base_moe_mlp_dim", 512), ("kv_lora_rank", 64),
  ):  # fmt: skip
    base = LLAMA_2 | sparse
    before, after = of_yaml(base), of_yaml(base | {name: value})
    assert len(after) == 1 or name in after[1] or after[0].model != before[0].model, name
  run = {"run_name": "a", "steps": 30, "base_output_directory": "gs://a", "enable_checkpointing": False,
         "dataset_type": "synthetic", "profiler": "xplane", "tokenizer_path": "t"}  # fmt: skip
  assert of_yaml(LLAMA_2 | run) == whole


@pytest.mark.parametrize(
  "text",
  [
    "a: !!python/object/apply:os.system ['touch hacked']", "a: &a [1, 1]\nb: *a", "[" * 3000, "- 1", "1: 2", "a: b: c",
    "\x00", "a: 2026-99-99", "base_emb_dim: .inf", "base_emb_dim: 0x" + "f" * 5000, "base_config: 3",
    "base_config: model.yml", "base_config: absent.yml", "model_name: ../model", "model_name: absent",
    "model_name: [a]", "<<: {a: 1}\nb: [",
  ],
)  # fmt: skip
def test_yaml_that_is_no_configuration_is_refused_in_one_line(text, of_yaml):
  (error,) = of_yaml(text)
  assert len(error) < 600 and not pathlib.Path("hacked").exists()


@pytest.mark.parametrize(
  "override", ["a: b", "=3", "base_emb_dim=[", "base_emb_dim=!!python/name:os.system", "dtype=int4"]
)
def test_an_override_that_is_not_valid_is_refused_in_one_line(override, of_yaml):
  (error,) = of_yaml(LLAMA_2, override)
  assert len(error) < 600


def test_a_chain_of_maxtext_files_is_read_in_its_order(of_yaml, tmp_path):
  (tmp_path / "base.yml").write_text(yaml.safe_dump({"max_target_length": 1024, "base_emb_dim": 1, "vocab_size": 50}))
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "large.yml").write_text("base_num_decoder_layers: 48\n")
  (tmp_path / "middle.yml").write_text("base_config: base.yml\nbase_emb_dim: 512\nvocab_size: 60\n")
  text = {"base_config": "middle.yml", "model_name": "large", "base_num_decoder_layers": 2, "vocab_size": 70}
  found, without = of_yaml(text, "head_dim=32", "vocab_size=80", name="run.yml")
  assert not without
  model = found.model
  assert (model.d_model, model.num_layers, model.vocab_size, model.head_dim) == (512, 48, 80, 32)
  assert found.data.sequence_length == 1024
  (tmp_path / "base.yml").unlink()
  found, _ = of_yaml(text, name="run.yml")
  assert found.data.sequence_length == 2048
