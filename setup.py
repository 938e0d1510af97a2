"""Packaging of moejax, with an extra for everything that not every user needs.

The folders experiments/ and launch/ are installed as moejax.experiments and moejax.launch, through the links in
moejax/, so that they cannot clash with a folder of a user's own.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "moejax" / "__init__.py").read_text())

# Tokenizers and file formats that tests can afford; seqio and TFDS bring TensorFlow.
LIGHT_DATA = ["fsspec[http]>=2026.1", "pyarrow>=21", "sentencepiece>=0.2", "tiktoken>=0.9", "tokenizers>=0.22"]

setup(
  name="moejax",
  version=VERSION.group(1) if VERSION else "0",
  description="Dense or mixture-of-experts, decided in step time: train, compare and plan language models in JAX.",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  package_data={
    "moejax": ["py.typed", "*.pyi"],
    "moejax.comparison": ["templates/*"],
    "moejax.launch": ["README.md", "Dockerfile", "skypilot.yaml", "slurm/*.sbatch"],
  },
  packages=find_packages(include=["moejax", "moejax.*"]),
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "array_record>=0.8",
    "jinja2>=3.1",
    "markupsafe>=3.0",
    "numpy>=2.1",
    "pyyaml>=6.0",
    "qwix>=0.1.8",
    "rich>=14.0",
    "scipy>=1.14",
    "tensorboardX>=2.6.2",
    "tyro>=1.0",
    "vl-convert-python>=1.9",
  ],
  extras_require={
    "test": [
      "chex>=0.1.91",
      "hypothesis>=6.130",
      "pytest>=8.3",
      "pytest-xdist>=3.6",
      "ruff>=0.12",
      "mypy>=1.16",
      "pre-commit>=4",
      *LIGHT_DATA,
    ],
    "data": [*LIGHT_DATA, "seqio>=0.0.20", "tensorflow>=2.21", "tensorflow-datasets>=4.9.10"],
    "browser": ["axe-playwright-python>=0.1.7", "playwright>=1.50"],  # for the tests of the report
    "docs": ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1.0"],
    "eval": ["lm-eval>=0.4.13"],
    "wandb": ["wandb>=0.21"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "gpu-plan": ["jax-cuda12-plugin>=0.10.2"],  # XLA's compiler for GPUs alone, for `moejax plan` without a GPU
  },
  entry_points={"console_scripts": ["moejax = moejax.__main__:command"]},
)
