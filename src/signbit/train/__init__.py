"""Training: students of binary layers, what they are taught by, and the trainer."""

from signbit.train.budget import Budget, Schedule, check_length
from signbit.train.checkpoints import METRICS, RUN, last_checkpoint, read_metrics
from signbit.train.flips import FlipHistory, Flips, read_flips
from signbit.train.muon import Muon, Together, orthogonalized
from signbit.train.objectives import (
    Head,
    Objective,
    Top,
    attention_distance,
    hidden_distance,
    kl_divergence,
    output_loss,
    soft_cross_entropy,
    top_kl_divergence,
)
from signbit.train.outputs import States, head_of
from signbit.train.students import (
    Before,
    Lora,
    Packed,
    Trained,
    binary_layers,
    latents,
    matrices,
    pack_training_,
    start_dense_,
    start_lora_,
    start_training_,
    train_parts_,
)
from signbit.train.trainer import DistillTrainer, TrainOptions

__all__ = [
    "METRICS",
    "RUN",
    "Before",
    "Budget",
    "DistillTrainer",
    "FlipHistory",
    "Flips",
    "Head",
    "Lora",
    "Muon",
    "Objective",
    "Packed",
    "Schedule",
    "States",
    "Together",
    "Top",
    "TrainOptions",
    "Trained",
    "attention_distance",
    "binary_layers",
    "check_length",
    "head_of",
    "hidden_distance",
    "kl_divergence",
    "last_checkpoint",
    "latents",
    "matrices",
    "orthogonalized",
    "output_loss",
    "pack_training_",
    "read_flips",
    "read_metrics",
    "soft_cross_entropy",
    "start_dense_",
    "start_lora_",
    "start_training_",
    "top_kl_divergence",
    "train_parts_",
]
