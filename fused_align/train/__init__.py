"""The reference trainer (pip install fused-align[train]): AlignTrainer, its settings, `fused-align train`."""

from .config import AlignConfig, DataConfig, ModelConfig
from .data import load_data
from .model import load_model
from .trainer import AlignTrainer

__all__ = ["AlignConfig", "AlignTrainer", "DataConfig", "ModelConfig", "load_data", "load_model"]
