"""Cross-entropy from logits, whose backward pass reads the logits once.

M tokens  V vocab
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits_MV: jax.Array, targets_M: jax.Array, whole_vocabulary: bool) -> tuple[jax.Array, jax.Array]:
  """Returns the cross-entropy in nats and the log-normalizer of every token, each float32 [M].

  Args:
    logits_MV: float32.
    targets_M: token ids.
    whole_vocabulary: whether each device has all of V. If so, the logit of a target is gathered. Otherwise a gather
      would fetch the logits of other devices, so a comparison selects it, at the cost of a pass over [M, V] on CPU.
  """
  return _forward(logits_MV, targets_M, whole_vocabulary)[0]


def _forward(
  logits_MV: jax.Array, targets_M: jax.Array, whole_vocabulary: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  log_normalizer_M = jax.nn.logsumexp(logits_MV, axis=-1)
  if whole_vocabulary:
    target_logit_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
  else:
    target_logit_M = jnp.sum(jnp.where(_is_target(logits_MV, targets_M), logits_MV, 0.0), axis=-1)
  return (log_normalizer_M - target_logit_M, log_normalizer_M), (logits_MV, log_normalizer_M, targets_M)


def _backward(
  whole_vocabulary: bool, saved: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
  logits_MV, log_normalizer_M, targets_M = saved
  of_loss_M, of_log_normalizer_M = gradients
  probs_MV = jnp.exp(logits_MV - log_normalizer_M[:, None])
  of_target_MV = jnp.where(_is_target(logits_MV, targets_M), of_loss_M[:, None], 0.0)
  return probs_MV * (of_loss_M + of_log_normalizer_M)[:, None] - of_target_MV, None


def _is_target(logits_MV: jax.Array, targets_M: jax.Array) -> jax.Array:
  return jnp.arange(logits_MV.shape[-1], dtype=targets_M.dtype)[None] == targets_M[:, None]


cross_entropy.defvjp(_forward, _backward)
