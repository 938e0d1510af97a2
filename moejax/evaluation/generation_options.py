"""Generation options of a task of lm-evaluation-harness: sampling, stop strings and number of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.errors import UserError
from moejax.inference.sampling import Sampling

NEUTRAL: dict[str, float] = {
  "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "n": 1, "best_of": 1, "repetition_penalty": 1,
  "encoder_repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "diversity_penalty": 0,
  "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "min_tokens": 0,
  "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "guidance_scale": 1,
}  # fmt: skip
"""Options for other models, each with the value that has no effect. None has no effect either."""
OF_BEAMS = ("length_penalty", "early_stopping")
"""Options that only affect beam search."""
OF_THE_PROGRAM = ("use_cache",)
"""Options that affect the speed of generation, but not its result."""


@dataclasses.dataclass(frozen=True)
class Generation:
  """The generation options of a task."""

  sampling: Sampling
  until: tuple[str, ...]
  """Stop strings, which are not part of the text."""
  max_new: int
  """Maximum number of new tokens."""


def generation(task: str, normalized: Mapping[str, Any]) -> Generation:
  """Parses the generation_kwargs of a task.

  Args:
    task: name of the task, for messages.
    normalized: options as returned by `normalize_gen_kwargs` of the harness.

  Raises:
    UserError: If an option is not supported. The message names it.
  """
  left = {name: value for name, value in normalized.items() if value is not None}
  until, max_new, sampled = left.pop("until"), left.pop("max_gen_toks"), left.pop("do_sample", False)
  temperature, top_k = left.pop("temperature", 0.0), left.pop("top_k", None)
  top_p, min_p = left.pop("top_p", None), left.pop("min_p", None)
  refused = {name: value for name, value in left.items() if not _changes_nothing(name, value)}
  if refused:
    options = ", ".join(f"{name}={value!r}" for name, value in refused.items())
    remedy = ",".join(f"{name}={NEUTRAL[name]:g}" for name in refused if name in NEUTRAL)
    raise UserError(
      f"the task {task} generates with {options}, which moejax does not support; remove the task"
      + (f", or set --gen-kwargs {remedy}" if len(refused) == sum(name in NEUTRAL for name in refused) else "")
    )
  if max_new < 1:
    raise UserError(f"the task {task} has max_gen_toks={max_new}, which must be at least 1")
  if sampled and not temperature:
    raise UserError(
      f"the task {task} samples (do_sample=True) with a temperature that is not above 0; set --gen-kwargs "
      "do_sample=False, or --gen-kwargs temperature=1"
    )
  if not sampled:
    return Generation(Sampling(), tuple(until), max_new)
  # Other libraries use values up to zero for all tokens.
  top_k = None if top_k is None or top_k <= 0 else int(top_k)
  return Generation(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), tuple(until), max_new)


def _changes_nothing(name: str, value: Any) -> bool:
  return name in OF_BEAMS or name in OF_THE_PROGRAM or (name in NEUTRAL and value == NEUTRAL[name])
