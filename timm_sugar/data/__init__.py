"""Data sets, transforms, batches and evaluation."""

from .evaluation import Evaluation, NormalizedBatches, evaluate, evaluate_batches
from .images import BadImageError, LabelledImages
from .loading import Split, available_cpus, decode, decoded_size, fingerprint, readable, seed_everything
from .sources import Source, load_source, split_validation, stratified_sample
from .transforms import channel_statistics, eval_transform, normalize, train_transform

__all__ = [
    "BadImageError",
    "Evaluation",
    "LabelledImages",
    "NormalizedBatches",
    "Source",
    "Split",
    "available_cpus",
    "channel_statistics",
    "decode",
    "decoded_size",
    "eval_transform",
    "evaluate",
    "evaluate_batches",
    "fingerprint",
    "load_source",
    "normalize",
    "readable",
    "seed_everything",
    "split_validation",
    "stratified_sample",
    "train_transform",
]
