"""`causal_attention` as an attention implementation of transformers."""

from gptcore.config import ConfigError
from kernels import causal_attention


def use_in_transformers() -> None:
    """Register `causal_attention` with transformers as the attention "gptcore".

    Then `AutoModelForCausalLM.from_pretrained(..., attn_implementation="gptcore")`, or
    `model.set_attn_implementation("gptcore")`, of any causal decoder. Padding, windows, packed
    sequences and caches of fixed size need masks that causal_attention does not have, and raise
    ValueError. Dropout draws from torch's generator.

    Raises: ConfigError without transformers.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import causal_mask_function
    except ImportError as error:
        raise ConfigError(
            "use_in_transformers needs transformers 5 or newer; pip install -U transformers"
        ) from error

    def mask(*, kv_length, q_length, q_offset=0, kv_offset=0, **options):
        """None, the causal mask, or ValueError; called once a forward."""
        if options.get("mask_function", causal_mask_function) is not causal_mask_function:
            raise ValueError("gptcore attention: only the plain causal mask; got a custom one")
        padding = options.get("attention_mask")
        if padding is not None and not padding.all():
            raise ValueError(
                "gptcore attention: no padding; got an attention_mask with zeros: batch prompts "
                "of equal length, or use another attn_implementation"
            )
        if kv_offset != 0 or kv_length != q_offset + q_length:
            raise ValueError(
                "gptcore attention: the cache must hold exactly the tokens so far; "
                f"got {kv_length} slots from {kv_offset} for {q_length} tokens at {int(q_offset)}"
            )
        return None

    AttentionMaskInterface.register("gptcore", mask)
    AttentionInterface.register("gptcore", _attend)


def _attend(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options
):
    """query (B, H, Tq, D), key and value (B, H or fewer, Tk, D) -> (B, Tq, H, D), no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or not causal:
        raise ValueError("gptcore attention: only the plain causal mask; got another")
    for name in ("softcap", "position_bias", "s_aux", "cache"):
        if options.get(name) is not None:
            raise ValueError(f"gptcore attention: no {name}; use another attn_implementation")
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise ValueError(
            f"gptcore attention: no sliding window; got {window} for {key.shape[2]} keys"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    o = causal_attention(query, key, value, scale=scaling, dropout_p=dropout)
    return o.transpose(1, 2), None
