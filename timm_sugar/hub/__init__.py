"""Hub-ready folders, their cards, publishing and verifying."""

from .card import dataset_of, read_facts
from .client import check_destination
from .half import halve
from .loading import NamedModel, find_model, image_batches, sample_batches
from .packaging import write_model_folder
from .publish import Published, check_weights, files_of_run, publish, write_folder
from .verify import Verification, verify

__all__ = [
    "NamedModel",
    "Published",
    "Verification",
    "check_destination",
    "check_weights",
    "dataset_of",
    "files_of_run",
    "find_model",
    "halve",
    "image_batches",
    "publish",
    "read_facts",
    "sample_batches",
    "verify",
    "write_folder",
    "write_model_folder",
]
