"""The versions, code revision and devices behind a result."""

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
  """Versions, code revision and devices, as JSON values."""
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
  """The git revision of moejax, with + if the working tree has changes. None outside a git checkout."""
  folder = pathlib.Path(moejax.__file__).parent

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed inside another repository
    return None
  revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
  return f"{revision}+" if revision and changes else revision
