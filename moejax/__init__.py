"""moejax compares dense and mixture-of-experts language models at equal step time.

The commands are functions of this package: `moejax.find`, `replace`, `train`, `compare`, `evaluate`, `generate`,
`sparsity`, `prune`, `import_model` and `export_model` (`moejax/api.py`), and `plan`, `match`, `calibrate`, `decide`,
`check_claim` and `fit` (`moejax/api_planning.py`).
Importing this package is fast: JAX is imported by the functions that need it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

FUNCTIONS = (
  "calibrate", "check_claim", "compare", "decide", "evaluate", "export_model", "find", "fit", "generate",
  "import_model", "match", "plan", "prune", "replace", "sparsity", "train",
)  # fmt: skip


def __getattr__(name: str) -> Any:
  if name in FUNCTIONS:
    return importlib.import_module("moejax.python_calls").function(name)
  raise AttributeError(f"module 'moejax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*globals(), *FUNCTIONS]
