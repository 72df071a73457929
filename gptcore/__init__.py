"""The GPT around the fused ops: model, data, training, generation."""

import importlib

from gptcore.config import GPTConfig

__all__ = ["GPT", "BigramLM", "GPTConfig", "NaiveGPT", "generate"]

_HOME = {"GPT": "model", "BigramLM": "naive", "NaiveGPT": "naive", "generate": "generation"}


def __getattr__(name: str):
    """Import torch only when a name needs it, so that `--help` and bad flags answer at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'gptcore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptcore.{_HOME[name]}"), name)
