"""Everything that describes an experiment, as frozen dataclasses. Standard library only, so it never imports JAX."""

from moejax.config.attention import Attention, GroupedQuery, Latent
from moejax.config.data import Data
from moejax.config.depths import AllTokens, Depths, ThresholdDepths, TopKDepths
from moejax.config.dispatch import DenseDispatch, Dispatch, EinsumDispatch, GroupedDispatch
from moejax.config.experiment import Evaluation, Experiment, Measurement, Pair, Suite
from moejax.config.feed_forward import MLP, FeedForward
from moejax.config.learning_rates import GivenLearningRates, LearningRates, LearningRateSweep
from moejax.config.model import Model
from moejax.config.moe import MoE
from moejax.config.optimizer import AdamW, Lion, LoRA, Muon, Optimizer, SpIEL
from moejax.config.precision import Precision
from moejax.config.rope import LinearScaling, Llama3Scaling, NoScaling, RopeScaling, YarnScaling
from moejax.config.router import (
  DenseRouter,
  ExpertChoiceRouter,
  Router,
  Scoring,
  ThresholdRouter,
  TopKRouter,
  TopPRouter,
)
from moejax.config.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay
from moejax.config.sharding import DATA_EXPERT_MODEL, Mesh, Rules
from moejax.config.training import Anomalies, Budget, Checkpoints, Losses, Training
from moejax.config.upcycled import Upcycled

__all__ = [
  "DATA_EXPERT_MODEL",
  "MLP",
  "AdamW",
  "AllTokens",
  "Anomalies",
  "Attention",
  "Budget",
  "Checkpoints",
  "Constant",
  "Cosine",
  "Data",
  "DenseDispatch",
  "DenseRouter",
  "Depths",
  "Dispatch",
  "EinsumDispatch",
  "Evaluation",
  "Experiment",
  "ExpertChoiceRouter",
  "FeedForward",
  "GivenLearningRates",
  "GroupedDispatch",
  "GroupedQuery",
  "Latent",
  "LearningRateSweep",
  "LearningRates",
  "Linear",
  "LinearScaling",
  "Lion",
  "Llama3Scaling",
  "LoRA",
  "Losses",
  "Measurement",
  "Mesh",
  "MoE",
  "Model",
  "Muon",
  "NoScaling",
  "Optimizer",
  "Pair",
  "Precision",
  "RopeScaling",
  "Router",
  "Rules",
  "Schedule",
  "Scoring",
  "SpIEL",
  "Suite",
  "ThresholdDepths",
  "ThresholdRouter",
  "TopKDepths",
  "TopKRouter",
  "TopPRouter",
  "Training",
  "Upcycled",
  "WarmupStableDecay",
  "YarnScaling",
]
