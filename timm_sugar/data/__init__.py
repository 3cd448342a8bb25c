"""Data sets, transforms, batches and evaluation."""

from .cache import ArrayCache
from .crops import CropFlip
from .evaluation import Evaluation, NormalizedBatches, evaluate_batches
from .folders import files_below, is_image_name, listed
from .images import BadImageError, LabelledImages, available_cpus, to_rgb, why_unreadable
from .loading import Split, content_key, decode, decode_kept, fingerprint, seed_everything, with_digests
from .parallel import compute_rows, readable
from .sources import Source, load_source, split_validation, stratified_sample
from .transforms import EVALUATION, channel_counts, channel_statistics, eval_transform, normalize, train_transform

__all__ = [
    "EVALUATION",
    "ArrayCache",
    "BadImageError",
    "CropFlip",
    "Evaluation",
    "LabelledImages",
    "NormalizedBatches",
    "Source",
    "Split",
    "available_cpus",
    "channel_counts",
    "channel_statistics",
    "compute_rows",
    "content_key",
    "decode",
    "decode_kept",
    "eval_transform",
    "evaluate_batches",
    "files_below",
    "fingerprint",
    "is_image_name",
    "listed",
    "load_source",
    "normalize",
    "readable",
    "seed_everything",
    "split_validation",
    "stratified_sample",
    "to_rgb",
    "train_transform",
    "why_unreadable",
    "with_digests",
]
