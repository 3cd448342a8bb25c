"""Data sets, transforms, batches and evaluation."""

from .evaluation import Evaluation, NormalizedBatches, evaluate, evaluate_batches
from .folders import listed
from .images import BadImageError, LabelledImages, available_cpus, check_readable, readable
from .loading import Split, decode, decoded_size, fingerprint, seed_everything
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
    "check_readable",
    "decode",
    "decoded_size",
    "eval_transform",
    "evaluate",
    "evaluate_batches",
    "fingerprint",
    "listed",
    "load_source",
    "normalize",
    "readable",
    "seed_everything",
    "split_validation",
    "stratified_sample",
    "train_transform",
]
