"""Suggests fields for an unknown name: names in other frameworks, missing groups and typos."""

from collections.abc import Collection, Iterable

from moejax.field_values import option

# Names in other frameworks, by field, in lower case and with underscores.
ALIASES = {
  "optimizer.learning_rate": "lr max_lr peak_lr base_lr learn_rate",
  "optimizer.schedule.final_fraction": "min_lr final_lr end_lr min_lr_ratio lr_final_fraction",
  "optimizer.schedule.warmup_fraction": "warmup warmup_steps warmup_ratio num_warmup_steps warmup_iters",
  "optimizer.kind": "optim optimizer_type optimizer_name opt",
  "optimizer.schedule.kind": "lr_schedule scheduler lr_scheduler lr_scheduler_type decay_type lr_decay_style",
  "optimizer.weight_decay": "wd decay",
  "optimizer.gradient_clip": "clip grad_clip clip_grad gradient_clipping max_grad_norm clip_grad_norm grad_clip_norm",
  "optimizer.beta1": "b1 beta_1 adam_beta1 adam_b1",
  "optimizer.beta2": "b2 beta_2 adam_beta2 adam_b2",
  "optimizer.epsilon": "eps adam_eps adam_epsilon",
  "training.batch_size": "bs batch batchsize global_batch_size train_batch_size per_device_train_batch_size "
  "per_device_batch_size micro_batch_size",
  "training.gradient_accumulation": "accum accumulate grad_accum accumulation gradient_accumulation_steps "
  "grad_accum_steps accumulation_steps",
  "training.steps": "step max_steps num_steps n_steps train_steps num_train_steps total_steps iters iterations "
  "max_iters epochs num_epochs num_train_epochs",
  "training.budget.tokens_per_parameter": "tokens token_budget tokens_per_param chinchilla",
  "training.log_every": "log_interval logging_steps log_freq log_every_n_steps log_period log_steps",
  "training.checkpoints.every": "save_steps save_every save_interval save_freq checkpoint_every checkpoint_period "
  "checkpoint_interval checkpoints ckpt_every ckpt_interval",
  "training.checkpoints.keep_last": "keep max_to_keep save_total_limit",
  "training.losses.load_balance": "aux_loss aux_loss_coef router_aux_loss_coef moe_aux_loss_coeff load_balancing "
  "load_balancing_loss lb_loss balance_loss",
  "training.losses.router_z": "z_loss router_z_loss router_z_loss_coef moe_z_loss_coeff",
  "training.losses.z": "z_loss z_loss_weight",
  "evaluation.every": "eval_every eval_interval eval_steps eval_freq eval_period",
  "evaluation.batch_size": "eval_batch_size eval_bs per_device_eval_batch_size",
  "evaluation.tasks": "task benchmarks benchmark",
  "model.num_layers": "layers n_layer n_layers num_hidden_layers depth num_decoder_layers base_num_decoder_layers",
  "model.d_model": "dim width hidden_size n_embd embed_dim embedding_dim emb_dim base_emb_dim model_dim d_embed",
  "model.num_heads": "heads n_head n_heads num_attention_heads num_query_heads base_num_query_heads",
  "model.num_kv_heads": "kv_heads n_kv_head n_kv_heads num_key_value_heads num_query_groups base_num_kv_heads",
  "model.d_ff": "ffn_dim mlp_dim hidden_dim intermediate_size ffn_hidden_size base_mlp_dim d_mlp",
  "model.vocab_size": "vocab n_vocab",
  "model.tie_embeddings": "tie_word_embeddings tied tied_embeddings tie",
  "model.rope_theta": "theta rope_base rotary_base",
  "model.norm_epsilon": "norm_eps rms_norm_eps layer_norm_eps",
  "model.activation": "act hidden_act activation_function",
  "model.compute_dtype": "dtype precision bf16 fp16 mixed_precision torch_dtype",
  "model.save_activations": "save_only_these_names saved_activations",
  "model.remat": "remat_policy gradient_checkpointing activation_checkpointing recompute checkpointing rematerialize",
  "model.multi_token_depth": "mtp mtp_num_layers num_nextn_predict_layers n_future_tokens multi_token",
  "model.moe.num_experts": "experts n_experts num_local_experts n_routed_experts",
  "model.moe.experts_per_token": "k topk top_k num_experts_per_tok experts_per_tok moe_top_k moe_router_topk",
  "model.moe.num_shared_experts": "shared_experts n_shared_experts",
  "model.moe.capacity_factor": "capacity moe_capacity_factor",
  "data.sequence_length": "context seq_len seq_length seqlen max_length max_seq_len max_seq_length context_length "
  "block_size max_target_length max_position_embeddings",
  "data.train": "dataset datasets dataset_path dataset_name data_path train_data train_file train_files text source",
  "data.validation": "val eval_data val_data validation_file valid_data",
  "data.tokenizer": "tokenizer_path tokenizer_name vocab_file",
  "data.prefetch": "num_workers workers prefetch_size prefetch_factor",
  "mesh.data": "dp fsdp data_parallel data_parallel_size ici_fsdp_parallelism",
  "mesh.model": "tp tensor_parallel tensor_parallel_size model_parallel tensor_model_parallel_size "
  "ici_tensor_parallelism",
  "mesh.expert": "ep expert_parallel expert_parallel_size expert_model_parallel_size ici_expert_parallelism",
  "mesh.context": "cp sp context_parallel context_parallel_size sequence_parallel ici_context_parallelism",
  "mesh.replica": "slices num_slices dcn_data_parallelism",
  "workdir": "work work_dir output output_dir out out_dir outdir run_dir save_dir log_dir logdir dir directory "
  "checkpoint_dir base_output_directory",
}  # fmt: skip
OF_A_COMMAND = ("workdir",)
"""Names in ALIASES that are options of commands instead of fields."""
EXPERIMENT = "config config_file config_name config_path cfg experiment model_name preset recipe"

MOST = 4
"""Maximum number of fields in a hint."""


def hint(path: str, fields: Collection[str]) -> str:
  """The end of the error message for an unknown field, which suggests similar fields."""
  if path.lower() in EXPERIMENT.split():
    return "; give the experiment without an option, as a listed name, FILE.py:FUNCTION or RUN/experiment.json"
  near = _near(path.lower(), fields)
  return f"; did you mean {' or '.join(map(option, near))}?" if near else "; `moejax show NAME` lists all fields"


def _near(path: str, fields: Collection[str]) -> list[str]:
  """The fields that may have been meant, the most likely first."""
  last = path.rpartition(".")[2]
  known = [*OF_A_COMMAND, *fields]
  alias = [name for name in known if last in ALIASES.get(name, "").split()]
  same = [name for name in fields if name.rpartition(".")[2] == last]
  alike = _closest(path, known, limit=max(1, len(path) // 4))
  if "." in path:  # if several fields have this last part, prefer those whose other parts are most similar
    same = [*(alike if not alias else ()), *_closest(path, same, limit=len(path))]
  found = [*dict.fromkeys(alias + same)] or alike
  if not found:
    ends = {name: name.rpartition(".")[2] for name in known}
    nearest = _closest(last, set(ends.values()), limit=max(1, len(last) // 3))
    found = [name for name, end in ends.items() if end in nearest]
  return (found or _in_group(path, fields))[:MOST]


def _in_group(path: str, fields: Iterable[str]) -> list[str]:
  """The fields of the group in which the path is, the most similar first."""
  group, _, last = path.rpartition(".")
  inside = [name for name in fields if group and name.startswith(f"{group}.")]
  return sorted(inside, key=lambda name: _edits(last, name.rpartition(".")[2], len(path)))


def _closest(text: str, names: Iterable[str], limit: int) -> list[str]:
  """The names with the smallest edit distance from `text`, or none if it exceeds `limit`."""
  found: list[str] = []
  for name in names:
    edits = _edits(text, name, limit)
    if edits < limit:
      found, limit = [], edits
    if edits == limit:
      found.append(name)
  return found


def _edits(one: str, other: str, limit: int) -> int:
  """The edit distance of two names: insertions, deletions, substitutions and swaps of adjacent letters.

  If it exceeds `limit`, returns any number above `limit`.
  """
  if abs(len(one) - len(other)) > limit:
    return limit + 1
  before, row = [0] * (len(other) + 1), list(range(len(other) + 1))
  for i, letter in enumerate(one):
    before, last, row = row, before, [i + 1]
    for j, wanted in enumerate(other):
      cost = min(before[j] + (letter != wanted), before[j + 1] + 1, row[j] + 1)
      if i and j and (letter, one[i - 1]) == (other[j - 1], wanted):
        cost = min(cost, last[j - 1] + 1)
      row.append(cost)
    if min(row) > limit and min(before) > limit:
      return limit + 1
  return row[-1]
