"""Text from a model, one token at a time.

A step crops the sequence to its last block_size tokens, as the notebook does, and draws the next
token from the softmax of the last logits. Up to block_size tokens the keys and values of the past
are cached, so a step costs one token. Past it every position embedding of the cropped window
changes and with it every key: a step is one forward of the window, of which the last layer
computes the last token only.

A draw is a pure function of (seed, prompt, position): one uniform number u of `kernels.rng` at
plane = prompt, row = position picks the token by inverting the cumulative distribution. The
batch, the cache and the device change nothing but roundings, and a text generated in two calls
is the text of one call.
"""

import functools
import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gptcore import decoding
from gptcore.model import GPT, KVCache, evaluating, is_plain
from kernels.backend import resolve
from kernels.rng import SITE_SAMPLE, philox4x32


def generate(
    model,
    idx,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    stop=None,
    seed: int | None = None,
    cache: bool = True,
    cuda_graph: bool = True,
):
    """Continue prompts by max_new_tokens tokens each.

    Args:
        model: any rung of the ladder; dropout is off while it generates.
        idx: (B, T) integers, or a list of B sequences of any lengths. Shorter prompts of a list
            are continued while the longer ones are still read: no padding, no masks.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: draw among the k likeliest tokens, and among the fewest tokens whose
            probabilities reach p.
        repetition_penalty: the logits of tokens already in the sequence are divided by it where
            positive and multiplied where negative (Keskar et al. 2019, arXiv:1909.05858).
        vocab_size: draw only smaller tokens, for a head padded past its tokenizer.
        stop: a sequence of tokens, or several; a text ends with the first it produces.
        seed: in [0, 2**32); drawn from torch's generator if None.
        cache: False recomputes the whole window at every step.
        cuda_graph: on a GPU, replay a captured step; otherwise without effect.
    Returns: (B, T + max_new_tokens) int64, shorter if all prompts stopped; for a list, a list of
        B int64 vectors.
    Raises: ValueError, TypeError on a bad argument.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, vocab_size)
    run = _Run(model, idx, max_new_tokens, sampling, stop, seed, cache, cuda_graph)
    if run.stops and not run.is_list and len(run.lengths) > 1:
        raise ValueError(
            f"generate: several prompts with stop end at different lengths: pass them as a list; "
            f"got a tensor {tuple(idx.shape)}"
        )
    for _ in run:
        pass
    ends = run.ends.tolist()
    if run.is_list:
        return [row[:end].clone() for row, end in zip(run.out, ends, strict=True)]
    return run.out[:, : max(ends, default=run.out.shape[1])].clone()


def stream(
    model,
    idx,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    stop=None,
    seed: int | None = None,
    cache: bool = True,
    cuda_graph: bool = True,
) -> Iterator[torch.Tensor]:
    """The tokens of `generate`, each as soon as it is drawn.

    Args: those of `generate`; idx is (B, T).
    Returns: an iterator of (B,) int64 tensors; it ends once every prompt has stopped.
    Raises: ValueError, TypeError on a bad argument, before the first token.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, vocab_size)
    run = _Run(model, idx, max_new_tokens, sampling, stop, seed, cache, cuda_graph)
    if run.is_list:
        raise ValueError("stream: idx must be a (B, T) tensor; got a list")
    return (run.out[:, t].clone() for t in run)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; `generate` explains the fields.

    Raises: ValueError, TypeError.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self):
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not (value is None and name == "top_p") and not isinstance(value, (int, float)):
                raise TypeError(f"generate: {name} must be a number; got {value!r}")
        for name in ("top_k", "vocab_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"generate: {name} must be at least 1, or None; got {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"generate: temperature must be at least 0; got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1]; got {self.top_p}")
        if not 1e-30 <= self.repetition_penalty <= 1e30:  # as 1 / it, a float32
            raise ValueError(
                "generate: repetition_penalty must be in [1e-30, 1e30]; "
                f"got {self.repetition_penalty}"
            )

    def choose(self, logits, u, seen=None):
        """The next tokens.

        Args:
            logits: (B, V); its values may be overwritten.
            u: (B, 1) float32 in [0, 1).
            seen: (B, V) bool, the tokens that repetition_penalty applies to.
        Returns: (B, 1) int64.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            penalised = torch.where(
                logits > 0, 1 / self.repetition_penalty, self.repetition_penalty
            )
            logits = torch.where(seen, logits * penalised, logits)
        if self.vocab_size is not None:
            logits = logits[:, : self.vocab_size]
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if self.temperature != 1:
            # The largest stays 0 where others overflow; 1 / 1e-30 is a float32.
            logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)
        V, tokens = logits.shape[1], None
        if self.top_k is not None and self.top_k < V:
            logits, tokens = logits.topk(self.top_k)
        elif self.top_p is not None and self.top_p < 1:
            logits, tokens = logits.sort(descending=True)
        cumulative = logits.softmax(-1).cumsum(-1)
        last, total = logits.shape[1] - 1, cumulative[:, -1:]
        if self.top_p is not None and self.top_p < 1:
            last = (cumulative < self.top_p * total).sum(-1, keepdim=True).clamp(max=last)
            total = cumulative.gather(1, last)
        # u < 1, so u * total stays below the sum that the last allowed token completes.
        choice = torch.searchsorted(cumulative, u * total, right=True).clamp(max=last)
        return choice if tokens is None else tokens.gather(1, choice)


def uniforms(seed: int, prompts: int, positions: range, device=None) -> torch.Tensor:
    """u of each prompt and position: (prompts, len(positions)) float32, multiples of 2**-24."""
    row = torch.arange(positions.start, positions.stop, device=device)
    plane = torch.arange(prompts, device=device)[:, None]
    word, _, _, _ = philox4x32(row * 0, row, plane, row * 0 + SITE_SAMPLE, seed, 0)
    return (word >> 8).float() * 2.0**-24


class _Run:
    """One call of `generate`: checked arguments and the state of its loop.

    Attributes:
        out: (B, total) int64: the prompts, continued column by column.
        lengths: lengths of the prompts.
        ends: (B,) int64: where each text ends.
    """

    def __init__(self, model, idx, max_new_tokens, sampling, stop, seed, cache, cuda_graph):
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(
                f"generate: max_new_tokens must be a whole number of at least 0; "
                f"got {max_new_tokens!r}"
            )
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**32):
            raise ValueError(f"generate: seed must be in [0, 2**32); got {seed!r}")
        self.model, self.sampling = model, sampling
        self.is_list = isinstance(idx, (list, tuple))
        device = next(model.parameters()).device
        self.stops = [tokens.to(device) for tokens in _stop_sequences(stop)]
        prompts = [_prompt(row, device) for row in idx] if self.is_list else _checked(idx, device)
        self.lengths = [len(row) for row in prompts]
        if 0 in self.lengths:
            raise ValueError("generate: a prompt needs at least one token; got an empty one")
        V = model.config.vocab_size
        if prompts.numel() if isinstance(prompts, torch.Tensor) else prompts:
            tokens = torch.cat(prompts) if self.is_list else prompts
            low, high = tokens.aminmax()
            if low < 0 or high >= V:
                raise ValueError(
                    f"generate: tokens must be in [0, {V}), the model's vocabulary; "
                    f"got {int(low)} to {int(high)}"
                )
        B = len(prompts)
        longest = max(self.lengths, default=0) if self.is_list else prompts.shape[1]
        self.start = min(self.lengths, default=longest)
        self.out = torch.zeros(B, longest + max_new_tokens, dtype=torch.int64, device=device)
        if self.is_list:
            for row, prompt in zip(self.out, prompts, strict=True):
                row[: len(prompt)] = prompt
        else:
            self.out[:, :longest] = prompts
        self.ragged = self.start < longest
        self.length = torch.tensor(self.lengths, device=device, dtype=torch.int64)[:, None]
        self.ends = self.length[:, 0] + max_new_tokens
        seed = int(torch.randint(2**32, ())) if seed is None else seed
        self.u = uniforms(seed, B, range(self.out.shape[1]), device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(B, V, dtype=torch.bool, device=device)
            self.seen.scatter_(1, self.out[:, : self.start], True)
        self.cached = cache and isinstance(model, GPT)
        self.captured = (
            self.cached
            and cuda_graph
            and device.type == "cuda"
            and not torch.is_autocast_enabled("cuda")
            and is_plain(model)
        )

    def __iter__(self) -> Iterator[int]:
        """Fill one column of `out` after the other, each yielded when it is whole."""
        with evaluating(self.model):
            for t in self._steps():
                yield t
                if self.stops and self._stopped(t):
                    return

    def _steps(self):
        columns = range(self.start, self.out.shape[1] if len(self.out) else 0)
        return self._captured_steps(columns) if self.captured else self._plain_steps(columns)

    @torch.inference_mode()
    def _plain_steps(self, columns):
        model, out, cache, step = self.model, self.out, None, None
        block_size = model.config.block_size
        is_gpt = isinstance(model, GPT)
        if self.cached and columns:
            cache = KVCache(model.config, len(out), out.device, _compute_dtype(model))
            eager = resolve("generate", model.config.backend, out) == "eager"
            if eager and is_plain(model) and not torch.is_autocast_enabled(out.device.type):
                step = decoding.plain_step(model, cache)
            else:
                step = functools.partial(model.next_logits, cache=cache)
        for t in columns:
            if cache is not None and t <= block_size:
                tokens = out[:, cache.length : t]
                logits = step(tokens) if cache.length else model.next_logits(tokens, cache)
            else:
                window = out[:, max(0, t - block_size) : t]
                logits = model.next_logits(window) if is_gpt else model(window)[0][:, -1]
            token = self.sampling.choose(logits, self.u[:, t : t + 1], self.seen)
            if self.ragged:
                token = torch.where(self.length > t, out[:, t : t + 1], token)
            if self.seen is not None:
                self.seen.scatter_(1, token, True)
            out[:, t : t + 1] = token
            yield t

    @torch.inference_mode()
    def _captured_steps(self, columns):
        if not columns:
            return
        model, (B, total) = self.model, self.out.shape
        arguments = (self.sampling, self.ragged, self.out.device, _compute_dtype(model))
        try:
            key, step = decoding.take_step(model, B, total, *arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"tokens come eagerly, because the capture failed: {reason}", stacklevel=2
            )
            yield from self._plain_steps(columns)
            return
        step.load(model, self.out, self.u, self.length, self.seen, self.start)
        self.out = step.out[:, :total]
        try:
            for t in columns:
                step.advance(model, t)
                yield t
        finally:
            self.out = self.out.clone()
            decoding.give_back(model, key, step)

    def _stopped(self, t: int) -> bool:
        """Note which texts end with column t; whether all have ended."""
        for stop in self.stops:
            first = t + 1 - len(stop)
            if first >= self.start:
                ended = (self.out[:, first : t + 1] == stop).all(1)
                ended &= self.length[:, 0] <= first
                self.ends = torch.where(ended, self.ends.clamp(max=t + 1), self.ends)
        return bool((self.ends <= t + 1).all())


def _compute_dtype(model) -> torch.dtype:
    """The dtype of keys and values: autocast's where it is on, else the weights'."""
    weight = model.token_embedding.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _prompt(row, device) -> torch.Tensor:
    """One prompt of a list as an int64 vector."""
    row = torch.as_tensor(row, device=device)
    if row.numel() and (row.ndim != 1 or row.is_floating_point()):
        raise TypeError(
            f"generate: a prompt must be a sequence of integers; got shape {tuple(row.shape)}, "
            f"{row.dtype}"
        )
    return row.long()


def _checked(idx, device) -> torch.Tensor:
    """idx, (B, T) integers on `device`, as int64."""
    if not isinstance(idx, torch.Tensor) or idx.is_floating_point() or idx.dtype == torch.bool:
        got = idx.dtype if isinstance(idx, torch.Tensor) else type(idx).__name__
        raise TypeError(f"generate: idx must be a tensor of integers or a list; got {got}")
    if idx.ndim != 2:
        raise ValueError(f"generate: idx must be (B, T); got {tuple(idx.shape)}")
    if idx.device != device:
        raise ValueError(f"generate: idx must be on the model's {device}; got {idx.device}")
    return idx.long()


def _stop_sequences(stop) -> list[torch.Tensor]:
    """The stop sequences as vectors; `stop` is None, one sequence of tokens, or several."""
    if stop is None:
        return []
    several = isinstance(stop, Sequence) and len(stop) and not isinstance(stop[0], numbers.Integral)
    rule = f"generate: stop must be a sequence of at least one token, or several such; got {stop!r}"
    try:
        stops = [torch.as_tensor(tokens) for tokens in (stop if several else [stop])]
    except (TypeError, ValueError, RuntimeError) as error:  # of text, say
        raise TypeError(rule) from error
    if any(x.ndim != 1 or not len(x) or x.is_floating_point() for x in stops):
        raise ValueError(rule)
    return [tokens.long() for tokens in stops]
