"""Everything that describes an experiment, as frozen dataclasses. Standard library only, so it never imports JAX."""

from moejax.config.data import Data
from moejax.config.experiment import Evaluation, Experiment, Measurement, Pair, Suite
from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.router import Router
from moejax.config.sharding import DATA_EXPERT_MODEL, Mesh, Rules
from moejax.config.training import Budget, Checkpoints, Losses, Optimizer, Training

__all__ = [
  "DATA_EXPERT_MODEL",
  "Budget",
  "Checkpoints",
  "Data",
  "Evaluation",
  "Experiment",
  "Losses",
  "Measurement",
  "Mesh",
  "MoE",
  "Model",
  "Optimizer",
  "Pair",
  "Router",
  "Rules",
  "Suite",
  "Training",
]
