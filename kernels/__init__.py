"""Fused GPT ops: Triton kernels on a GPU, tuned eager PyTorch on a CPU, one call for both."""

from kernels.attention import causal_attention, causal_attention_qkv
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.embedding import embed
from kernels.layer_norm import dropout_add_layer_norm, layer_norm
from kernels.mlp import linear_act
from kernels.rng import dropout_keep_mask
from kernels.rotary import rotary_qkv, rotary_table

__all__ = [
    "causal_attention",
    "causal_attention_qkv",
    "cross_entropy",
    "dropout_add_layer_norm",
    "dropout_keep_mask",
    "embed",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "rotary_qkv",
    "rotary_table",
]
