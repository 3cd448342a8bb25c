"""Training of image classifiers: resumable runs from recipes, used by the scripts in train/."""

from ..settings import TrainConfig
from .command import main, one_line_errors, train
from .config import load_config
from .processes import Stopped

__all__ = ["Stopped", "TrainConfig", "load_config", "main", "one_line_errors", "train"]
