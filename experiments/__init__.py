"""Experiments and suites. A dictionary lists them."""

from collections.abc import Callable

from moejax.config import Experiment, Suite
from moejax.experiments.books_mini import (
  books_cpu,
  books_cpu_dense,
  books_mini,
  books_mini_cpu,
  books_mini_cpu_dense,
  books_mini_dense,
)
from moejax.experiments.ds_moe import (
  ds_dense_1b,
  ds_dense_3b,
  ds_dense_6b,
  ds_moe_1b,
  ds_moe_3b,
  ds_moe_6b,
  ds_smoe_1b,
  ds_smoe_5b,
)
from moejax.experiments.ds_moe_mini import ds_mini_dense, ds_mini_moe, ds_mini_moe_no_mi, ds_mini_smoe, ds_moe_mini
from moejax.experiments.gemma3 import gemma3_12b
from moejax.experiments.mixtral import mixtral_8x7b, mixtral_64e
from moejax.experiments.published import (
  fuji_7b_v1,
  fuji_7b_v2,
  fuji_70b_v2,
  maxtext_16b,
  maxtext_32b,
  maxtext_64b,
  mistral_7b,
)
from moejax.experiments.quickstart import quick_large, quick_small, quickstart
from moejax.experiments.qwen3 import qwen3_30b_a3b, qwen3_235b_a22b
from moejax.experiments.sparse_families import (
  deepseek_v3,
  deepseek_v3_mtp,
  gpt_oss_20b,
  gpt_oss_120b,
  llama4_maverick,
  llama4_scout,
)
from moejax.experiments.speed_accuracy import (
  dense_6b4,
  dense_12b6,
  dense_29b6,
  moe_1b6_256e,
  moe_6b4_16e,
  moe_6b4_64e,
  moe_12b6_16e,
  moe_12b6_64e,
  moe_29b6_16e,
  moe_29b6_64e,
)
from moejax.experiments.switch import switch_base, switch_large, switch_xxl

EXPERIMENTS: dict[str, Callable[[], Experiment | Suite]] = {
  "quickstart": quickstart,
  "books_mini": books_mini,
  "books_mini_dense": books_mini_dense,
  "books_mini_cpu": books_mini_cpu,
  "books_mini_cpu_dense": books_mini_cpu_dense,
  "books_cpu": books_cpu,
  "books_cpu_dense": books_cpu_dense,
  "quick_small": quick_small,
  "quick_large": quick_large,
  "dense_6b4": dense_6b4,
  "dense_12b6": dense_12b6,
  "dense_29b6": dense_29b6,
  "moe_1b6_256e": moe_1b6_256e,
  "moe_6b4_16e": moe_6b4_16e,
  "moe_6b4_64e": moe_6b4_64e,
  "moe_12b6_16e": moe_12b6_16e,
  "moe_12b6_64e": moe_12b6_64e,
  "moe_29b6_16e": moe_29b6_16e,
  "moe_29b6_64e": moe_29b6_64e,
  "fuji_7b_v1": fuji_7b_v1,
  "fuji_7b_v2": fuji_7b_v2,
  "fuji_70b_v2": fuji_70b_v2,
  "mixtral_8x7b": mixtral_8x7b,
  "mixtral_64e": mixtral_64e,
  "mistral_7b": mistral_7b,
  "maxtext_16b": maxtext_16b,
  "maxtext_32b": maxtext_32b,
  "maxtext_64b": maxtext_64b,
  "qwen3_30b_a3b": qwen3_30b_a3b,
  "qwen3_235b_a22b": qwen3_235b_a22b,
  "gemma3_12b": gemma3_12b,
  "gpt_oss_20b": gpt_oss_20b,
  "gpt_oss_120b": gpt_oss_120b,
  "deepseek_v3": deepseek_v3,
  "deepseek_v3_mtp": deepseek_v3_mtp,
  "llama4_scout": llama4_scout,
  "llama4_maverick": llama4_maverick,
  "switch_base": switch_base,
  "switch_large": switch_large,
  "switch_xxl": switch_xxl,
  "ds_dense_1b": ds_dense_1b,
  "ds_dense_3b": ds_dense_3b,
  "ds_dense_6b": ds_dense_6b,
  "ds_moe_1b": ds_moe_1b,
  "ds_moe_3b": ds_moe_3b,
  "ds_moe_6b": ds_moe_6b,
  "ds_smoe_1b": ds_smoe_1b,
  "ds_smoe_5b": ds_smoe_5b,
  "ds_moe_mini": ds_moe_mini,
  "ds_mini_dense": ds_mini_dense,
  "ds_mini_moe": ds_mini_moe,
  "ds_mini_moe_no_mi": ds_mini_moe_no_mi,
  "ds_mini_smoe": ds_mini_smoe,
}
"""Experiments and suites by name. Members of suites can also be found by their names."""
