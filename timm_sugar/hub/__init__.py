"""Hub-ready folders, their cards, publishing and verifying."""

from .card import dataset_of, read_facts
from .float16 import to_float16
from .loading import NamedModel, find_model, image_batches, sample_batches
from .packaging import write_model_folder
from .predict import Prediction, image_files, predict, summary_line
from .publish import Published, check_destination, check_weights, publish, published_files, write_folder
from .verify import Verification, verify

__all__ = [
    "NamedModel",
    "Prediction",
    "Published",
    "Verification",
    "check_destination",
    "check_weights",
    "dataset_of",
    "find_model",
    "image_batches",
    "image_files",
    "predict",
    "publish",
    "published_files",
    "read_facts",
    "sample_batches",
    "summary_line",
    "to_float16",
    "verify",
    "write_folder",
    "write_model_folder",
]
