"""Where a number comes from: versions, code revision, devices."""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

import moejax

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def provenance() -> dict[str, Any]:
  """Plain values that say on what code and which devices this program runs."""
  devices = jax.devices()
  return {
    "moejax": moejax.__version__,
    "git_revision": _git_revision(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    "platform": platform.platform(),
    "backend": jax.default_backend(),
    "device_kind": devices[0].device_kind,
    "device_count": len(devices),
    "process_count": jax.process_count(),
    "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
  }


def _git_revision() -> str | None:
  """Revision of the source tree that moejax runs from, with + where it has changes; None outside a checkout."""
  folder = pathlib.Path(moejax.__file__).parent

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed below somebody else's repository
    return None
  revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
  return f"{revision}+" if revision and changes else revision
