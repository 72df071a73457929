"""The GPT around the fused ops: model, data, training, generation."""

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.naive import BigramLM, NaiveGPT

__all__ = ["GPT", "BigramLM", "GPTConfig", "NaiveGPT"]
