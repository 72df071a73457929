"""One token through a GPT and its cache, with as little around the arithmetic as can be.

`plain_step` is for the CPU, where a token of a small model costs less than the checks and the
dispatch of the ops that compute it. `CapturedStep` is for the GPU: its shapes never change, so
that a CUDA graph can hold it. There positions are tensors on the device: a step reads the last
token at `position`, moves on and writes the next one, and nothing returns to the host. Attention
reads every slot of the cache and masks those to come, which `causal_attention`, whose sizes are
those of its tensors, cannot; it is the one difference to the plain loop of `generation`, and a
difference of rounding.
"""

import functools
import weakref

import torch
import torch.nn.functional as F

from gptcore.model import KVCache
from gptcore.naive import ACTIVATION_MODULES
from kernels import rotary_qkv

_KEEP_BYTES = 1 << 30  # larger caches are not kept between calls
_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (key, CapturedStep)


def plain_step(model, cache: KVCache):
    """A function of the next token (B, 1) that computes `model.next_logits(token, cache)`.

    The same equations in plain PyTorch, with the parameters looked up once.
    """
    config = model.config
    B, H, D, C = cache.keys.shape[1], config.n_head, config.D, (config.n_embd,)
    linear, norm, scale = F.linear, F.layer_norm, config.scale
    activate = ACTIVATION_MODULES[config.activation]().forward
    rotate = functools.partial(rotary_qkv, normalize=config.qk_norm, backend=config.backend)

    def parameters(module):
        return module.weight, module.bias

    blocks = list(model.blocks)
    layers = [
        (
            *map(parameters, (b.ln_1, b.qkv, b.proj, b.ln_2, b.mlp_in, b.mlp_out)),
            cache.pair[:, layer],  # (2, B, H, block_size, D)
        )
        for layer, b in enumerate(blocks)
    ]
    final, head = parameters(model.ln_f), parameters(model.lm_head)
    tokens, angles = model.token_embedding.weight, model.angles
    positions = None if angles else model.position_embedding.weight
    shift = model.shift

    def step(token):
        t = cache.length
        x = tokens[token[:, 0]]  # (B, C)
        if positions is not None:
            x = x + positions[t]
        if shift is not None:
            x = torch.addcmul(x, cache.shifted(x[:, None])[:, 0], shift)
        for ln_1, qkv, proj, ln_2, mlp_in, mlp_out, pair in layers:
            y = linear(norm(x, C, *ln_1), *qkv).view(B, 1, 3, H, D)
            if angles is not None:
                y = rotate(y, angles.table[t : t + 1])
            q, kv = y.view(B, 3, H, 1, D).transpose(0, 1).split((1, 2))
            pair[:, :, :, t : t + 1] = kv
            k, v = pair[:, :, :, : t + 1]
            o = F.scaled_dot_product_attention(q[0], k, v, scale=scale)  # (B, H, 1, D)
            x = x + linear(o.reshape(B, H * D), *proj)
            x = x + linear(activate(linear(norm(x, C, *ln_2), *mlp_in)), *mlp_out)
        cache.advance(1)
        return linear(norm(x, C, *final), *head)

    return step


class FixedCache(KVCache):
    """A KVCache whose length is the tensor `position`, (1,) int64: the place of the next token.

    It shares the tensors of `storage`, a KVCache that a prompt is read into.
    """

    def __init__(self, storage: KVCache, position: torch.Tensor):
        self.storage, self.position = storage, position
        self.keys, self.values, self.length = storage.keys, storage.values, 0
        self.last = storage.last
        self.slots = torch.arange(self.keys.shape[3], device=self.keys.device)

    def clear(self):
        """Hold nothing. Slots to come are masked, but only finite numbers can be masked."""
        self.storage.pair.zero_()
        self.storage.last.zero_()
        self.storage.length = 0

    def rows(self, table, T):
        """The next token's row (1, ...); called once a forward, it notes what the token sees.

        As SDPA adds it to scores: of a boolean mask it would make that anew in every layer.
        """
        bias = torch.where(self.slots <= self.position, 0.0, -torch.inf)
        self.bias = bias.to(self.keys.dtype)[None, None, None]  # (1, 1, 1, S)
        return table.index_select(0, self.position)

    def attend(self, layer, q, k, v, *, scale, **_):
        """Attention of one token, q, k, v (B, H, 1, D), over the slots up to its own."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return F.scaled_dot_product_attention(q, keys, values, self.bias, scale=scale)

    def advance(self, T):
        """Nothing: whoever drives the steps moves `position`."""


class Step:
    """The state of a batch of texts and the step that lengthens each by one token.

    Attributes:
        out: (B, capacity) int64, the texts.
        position: (1,) int64, the column of the last tokens.
    """

    def __init__(self, model, B, capacity, sampling, ragged, device, dtype):
        config = model.config
        self.sampling, self.ragged, self.block_size = sampling, ragged, config.block_size
        self.out = torch.zeros(B, capacity, dtype=torch.int64, device=device)
        self.u = torch.zeros(B, capacity, device=device)
        self.length = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.window = torch.arange(1 - self.block_size, 1, device=device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(B, config.vocab_size, dtype=torch.bool, device=device)
        self.cache = FixedCache(KVCache(config, B, device, dtype), self.position)
        self.cache.clear()

    def load(self, model, out, u, length, seen, start):
        """Begin with the tokens out[:, :start] of texts out (B, total <= capacity)."""
        total = out.shape[1]
        self.out[:, :total], self.u[:, :total], self.length[:] = out, u, length
        if seen is not None:
            self.seen.copy_(seen)
        self.cache.clear()
        if 1 < start <= self.block_size:
            model.hidden(self.out[:, : start - 1], cache=self.cache.storage, last_only=True)
        self.position.fill_(start - 1)

    def advance(self, model, t: int):
        """Write column t, which is position + 1."""
        if t <= self.block_size:
            self.decode(model)
        else:
            self.roll(model)

    def decode(self, model):
        """Read one token through the cache."""
        token = self.out.index_select(1, self.position)
        self._append(model.next_logits(token, self.cache))

    def roll(self, model):
        """Read the last block_size tokens afresh, as every position embedding has changed."""
        self._append(model.next_logits(self.out.index_select(1, self.position + self.window)))

    def _append(self, logits):
        self.position.add_(1)
        u = self.u.index_select(1, self.position)
        token = self.sampling.choose(logits, u, self.seen)
        if self.ragged:
            given = self.out.index_select(1, self.position)
            token = torch.where(self.length > self.position, given, token)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        self.out.index_copy_(1, self.position, token)


class CapturedStep(Step):
    """A Step on a GPU, replayed from CUDA graphs; one launch a token."""

    def __init__(self, model, *args):
        super().__init__(model, *args)
        self.decode_graph = self._capture(self.decode, model, position=0)
        self.roll_graph = None
        if self.out.shape[1] > self.block_size:
            self.roll_graph = self._capture(self.roll, model, position=self.block_size - 1)

    def _capture(self, function, model, position):
        """Run once for whatever compiles or allocates on first use, then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.position.fill_(position)
            function(model)
            self.position.fill_(position)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # By default torch captures on one stream of the device that came first.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function(model)
        return graph

    def advance(self, model, t):
        """Write column t, which is position + 1."""
        with torch.cuda.device(self.out.device):
            (self.decode_graph if t <= self.block_size else self.roll_graph).replay()


def take_step(model, B, total, sampling, ragged, device, dtype) -> tuple[tuple, CapturedStep]:
    """A captured step for texts of `total` tokens, and the key to give it back with.

    The model's last one serves again while nothing that the graph has fixed has changed.
    """
    capacity = model.config.block_size
    while capacity < total:
        capacity *= 2
    pointers = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    key = (B, capacity, sampling, ragged, device, dtype, model.config, pointers)
    kept_key, step = _kept.pop(model, (None, None))
    if kept_key != key:
        with torch.cuda.device(device):
            step = CapturedStep(model, B, capacity, sampling, ragged, device, dtype)
    return key, step


def give_back(model, key, step: CapturedStep):
    """Keep `step` for the model's next call; it holds no reference to the model."""
    if step.cache.storage.pair.nbytes <= _KEEP_BYTES:
        _kept[model] = key, step
