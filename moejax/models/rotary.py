"""Rotary position embeddings (arXiv 2104.09864).

B batch  T query position  N query heads  H head dim
"""

import jax
import jax.numpy as jnp

from moejax.config.rope import NoScaling, RopeScaling

UNSCALED = NoScaling()

Angles = tuple[jax.Array, jax.Array]
"""Cosine and sine, each [B, T, 1, H / 2]."""


def rotary_angles(positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling = UNSCALED) -> Angles:
  """Cosine and sine of the rotation of each pair, each [B, T, 1, H / 2] (arXiv 2104.09864), times the magnitude of the
  scaling.

  They are computed in float32, since bfloat16 rounds position 257 to 256.
  """
  frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if scaling != UNSCALED:
    frequency_H = frequency_H * jnp.asarray(scaling.multipliers(head_dim, theta), jnp.float32)
  angle_BTH = positions_BT.astype(jnp.float32)[:, :, None] * frequency_H[None, None, :]
  cosine, sine = jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]
  return (cosine, sine) if scaling.magnitude == 1.0 else (cosine * scaling.magnitude, sine * scaling.magnitude)


def rotate(x_BTNH: jax.Array, angles: Angles, by_product: bool = False) -> jax.Array:
  """Rotates the pairs (i, i + H / 2), as in the checkpoints of Llama.

  `by_product` swaps the halves by an exact product with a signed permutation. This is faster on TPU, where halves of 64
  lanes would be copied and padded, and slower on CPU.
  """
  cosine, sine = angles
  if by_product:
    H = x_BTNH.shape[-1]
    swap_HH = jnp.roll(jnp.eye(H, dtype=x_BTNH.dtype), H // 2, axis=0).at[H // 2 :].multiply(-1)
    swapped_BTNH = jnp.einsum("BTNH,HJ->BTNJ", x_BTNH, swap_HH, precision=jax.lax.Precision.HIGHEST)
    cosine, sine = (jnp.concatenate([part, part], axis=-1) for part in angles)
    return (x_BTNH.astype(jnp.float32) * cosine + swapped_BTNH.astype(jnp.float32) * sine).astype(x_BTNH.dtype)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
  return rotated.astype(x_BTNH.dtype)
