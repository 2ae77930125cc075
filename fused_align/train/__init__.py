"""The reference trainer (pip install fused-align[train]): AlignTrainer, its settings, `fused-align train`."""

try:
    from .config import AlignConfig, DataConfig, ModelConfig
    from .data import load_data
    from .model import load_model
    from .trainer import AlignTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "fused_align":
        raise
    raise ImportError(
        f"fused_align.train needs {error.name}, which is not installed: pip install 'fused-align[train]'"
    ) from error

__all__ = ["AlignConfig", "AlignTrainer", "DataConfig", "ModelConfig", "load_data", "load_model"]
