"""Counter-based randomness: every random bit is f(seed, step, site, position).

Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    key      k0 = seed, k1 = step
    counter  c0 = col // 8, c1 = row, c2 = plane, c3 = site
    lanes    the 4 output words are 8 lanes of 16 bits; lane col % 8 is word lane // 2, low half
             first
    dropout  an element is dropped iff its lane < round(p * 65536); survivors are scaled by
             65536 / (65536 - round(p * 65536))

Attention probabilities: plane = b * H + h, row = query position, col = key position.
Activations (B, T, C): plane = 0, row = b * T + t, col = channel. b counts in the global batch.

`key` is a (2,) int64 tensor [seed, step] or a (3,) one [seed, step, first], values below 2**32;
`first` is the index, in the global batch, of the first sequence of the tensors given (0 if
absent), so that ranks and micro-batches draw what the whole batch would.
"""

import contextlib
import contextvars
import math
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from kernels.backend import HAS_TRITON, jit, launch, tl, traced
from kernels.threads import for_each

PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

# Sites, numbered here and nowhere else.
SITE_BATCH = 0
SITE_EMBEDDING = 1
SITE_SAMPLE = 2
SITE_EVALUATION = 3
SITE_PROBLEM = 4
_FIRST_LAYER_SITE = 16
_SITES_PER_LAYER = 4
PLACES = {"attention": 0, "projection": 1, "feedforward": 2}

_LOW32 = 0xFFFFFFFF
# Philox calls of one window: many, as two threads contend for the GIL at every op of numpy.
_CHUNK_GROUPS = 1 << 17
_AHEAD_GROUPS = 1 << 15  # Philox calls of all the updates whose masks `MasksAhead` draws at once


def layer_site(layer: int, place: str) -> int:
    """The site of one dropout: `place` is "attention", "projection" or "feedforward"."""
    return _FIRST_LAYER_SITE + _SITES_PER_LAYER * layer + PLACES[place]


def make_key(seed: int, step: int = 0, first: int = 0, device=None) -> torch.Tensor:
    """The (3,) int64 key of one step."""
    return torch.tensor([seed & _LOW32, step & _LOW32, first & _LOW32], device=device)


def draw_key(device=None) -> torch.Tensor:
    """A key from torch's own generator, so that torch.manual_seed governs calls without a key."""
    key = torch.zeros(3, dtype=torch.int64, device=device)
    key[:2] = torch.randint(0, 2**32, (2,), device=device)
    return key


def check_key(op: str, key: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """`key`, contiguous, or a fresh one if None.

    Raises: TypeError, ValueError if it is not a (2,) or (3,) int64 tensor on `device`.
    """
    if key is None:
        return draw_key(device)
    if not isinstance(key, torch.Tensor) or key.dtype != torch.int64:
        got = key.dtype if isinstance(key, torch.Tensor) else type(key).__name__
        raise TypeError(f"{op}: key must be an int64 tensor; got {got}")
    if tuple(key.shape) not in ((2,), (3,)):
        raise ValueError(
            f"{op}: key must be (2,) [seed, step] or (3,) [seed, step, first]; "
            f"got shape {tuple(key.shape)}"
        )
    if key.device != device:
        raise ValueError(f"{op}: key must be on {device}; got {key.device}")
    return key.contiguous()


def dropout_threshold(p: float) -> int:
    """16-bit lanes below it are dropped: round(p * 65536)."""
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """The factor of the survivors: 65536 / (65536 - round(p * 65536))."""
    return 65536 / (65536 - dropout_threshold(p))


def check_dropout(op: str, dropout_p: float, site: int = 0) -> None:
    """Raises: ValueError unless 0 <= dropout_p, some 16-bit lane survives and site has 32 bits;
    TypeError if they are no numbers."""
    check_number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1); got {dropout_p}")
    if dropout_threshold(dropout_p) >= 65536:
        raise ValueError(f"{op}: dropout_p must keep one of 65536 elements; got {dropout_p}")
    if not isinstance(site, int):
        raise TypeError(f"{op}: site must be a whole number; got {site!r}")
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site must be in [0, 2**32); got {site}")


def check_number(op: str, name: str, value: float) -> None:
    """Raises: TypeError unless it is one of Python's."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {value!r}")


def philox4x32(c0, c1, c2, c3, k0: int, k1: int, rounds: int = PHILOX_ROUNDS):
    """The four 32-bit output words, as int64 tensors or arrays, of Philox-4x32.

    c0..c3: counters, int64 tensors or arrays below 2**32 of broadcastable shapes. A word takes
    only the shape it depends on, so with counters along different axes the first two rounds cost
    little.
    """
    m0, m1 = PHILOX_MULTIPLIERS
    for _ in range(rounds):
        # int64 products wrap; shifting then masking reads them as unsigned all the same.
        product0, product1 = c0 * m0, c2 * m1
        c0, c2 = (
            ((product1 >> 32) & _LOW32) ^ c1 ^ k0,
            ((product0 >> 32) & _LOW32) ^ c3 ^ k1,
        )
        c1, c3 = product1 & _LOW32, product0 & _LOW32
        k0 = (k0 + PHILOX_INCREMENTS[0]) & _LOW32
        k1 = (k1 + PHILOX_INCREMENTS[1]) & _LOW32
    return c0, c1, c2, c3


_source: contextvars.ContextVar[Callable[..., torch.Tensor] | None]
_source = contextvars.ContextVar("source", default=None)


@contextlib.contextmanager
def masks_from(source: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Here and in this thread `dropout_keep_mask` is source(key, site, planes, rows, cols, p)."""
    before = _source.set(source)
    try:
        yield
    finally:
        _source.reset(before)


def dropout_keep_mask(
    key: torch.Tensor,
    site: int,
    planes: int | range | torch.Tensor,
    rows: int | range | torch.Tensor,
    cols: int,
    p: float,
    device=None,
) -> torch.Tensor:
    """True where an element survives dropout.

    Args:
        key: (2,) or (3,) int64 [seed, step(, first)]; `first` is ignored here: positions are
            given by planes and rows, which count in the global batch.
        site: which dropout of the model (`layer_site`).
        planes, rows: a count n, meaning range(n), a range, or an int64 tensor of positions. On a
            GPU nothing waits for the device.
        cols: number of columns.
        p: dropout probability in [0, 1).
    Returns: (planes, rows, cols) bool.
    Raises: ValueError, TypeError on a bad key, site, count or p.
    """
    source = None if torch.compiler.is_compiling() else _source.get()
    if source is not None:
        return source(key, site, planes, rows, cols, p)
    return draw_keep_mask(key, site, planes, rows, cols, p, device)


def draw_keep_mask(key, site, planes, rows, cols, p, device=None) -> torch.Tensor:
    """`dropout_keep_mask`, drawn whatever `masks_from` says."""
    op = "dropout_keep_mask"
    check_dropout(op, p, site)
    if not isinstance(key, torch.Tensor):
        raise TypeError(f"{op}: key must be an int64 tensor; got {type(key).__name__}")
    check_key(op, key, key.device)
    for name, count in (("planes", planes), ("rows", rows), ("cols", cols)):
        if isinstance(count, int) and count < 0:
            raise ValueError(f"{op}: {name} must be at least 0; got {count}")
    device = torch.device(device) if device is not None else key.device
    groups = -(-cols // 8)
    planes, rows = _positions(planes, device), _positions(rows, device)
    if device.type == "cpu" and not traced():
        keep = torch.from_numpy(_keep_numpy(key, site, planes.numpy(), rows.numpy(), groups, p))
    else:
        keep = _keep_torch(key.to(device), site, planes, rows, groups, p)
    return keep[..., :cols]


def as_bytes(keep: torch.Tensor) -> torch.Tensor:
    """A mask as 0 and 1 of uint8, a view: a CPU makes floats of it several times as fast."""
    return keep.view(torch.uint8)


def _positions(positions: int | range | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(positions, torch.Tensor):
        return positions.to(device)
    positions = range(positions) if isinstance(positions, int) else positions
    return torch.arange(positions.start, positions.stop, positions.step, device=device)


def _windows(planes: int, rows: int, groups: int):
    """Pieces (plane slice, row slice) of about _CHUNK_GROUPS Philox calls."""
    rows_per_chunk = max(1, _CHUNK_GROUPS // max(1, groups))
    planes_per_chunk = max(1, rows_per_chunk // max(1, rows))
    for plane in range(0, planes, planes_per_chunk):
        for row in range(0, rows, rows_per_chunk):
            yield slice(plane, plane + planes_per_chunk), slice(row, row + rows_per_chunk)


def _keep_torch(key, site, planes, rows, groups, p):
    """(planes, rows, 8 * groups) bool on the key's device."""
    keep = torch.empty(len(planes), len(rows), groups * 8, dtype=torch.bool, device=key.device)
    c0 = torch.arange(groups, device=key.device)
    c3 = torch.full((), site, device=key.device)
    k0, k1 = (key[:2] & _LOW32).unbind()
    threshold = dropout_threshold(p) - 32768
    for window in _windows(len(planes), len(rows), groups):
        c1, c2 = rows[window[1], None], planes[window[0], None, None]
        words = philox4x32(c0, c1, c2, c3, k0, k1)
        # Flipping the top bit of each half turns the unsigned comparison into a signed one.
        lanes = (torch.stack(words, dim=-1) ^ 0x80008000).to(torch.int32).view(torch.int16)
        keep[window] = lanes.flatten(-2) >= threshold
    return keep


def _keep_numpy(key, site, planes, rows, groups, p):
    """`_keep_torch` for the CPU: numpy's uint64 loops are faster than torch's int64."""
    w0, w1 = PHILOX_INCREMENTS
    seed, step = key.tolist()[:2]
    keys = [((seed + i * w0) & _LOW32, (step + i * w1) & _LOW32) for i in range(PHILOX_ROUNDS)]
    threshold = np.uint16(dropout_threshold(p))
    keep = np.empty((len(planes), len(rows), groups * 8), dtype=np.bool_)

    def draw(_, window):
        piece = keep[window]
        c0 = np.arange(groups, dtype=np.uint64)
        c1 = rows[window[1], None].astype(np.uint64)
        c2 = planes[window[0], None, None].astype(np.uint64)
        c3 = np.full(1, site, dtype=np.uint64)
        lanes = _philox_lanes(c0, c1, c2, c3, keys, (*piece.shape[:2], groups))
        np.greater_equal(lanes.view(np.uint16).reshape(piece.shape), threshold, out=piece)

    for_each(_windows(len(planes), len(rows), groups), draw)
    return keep


_MULTIPLIER0, _MULTIPLIER1 = map(np.uint64, PHILOX_MULTIPLIERS)
_32, _LOW = np.uint64(32), np.uint64(_LOW32)
_workspace = threading.local()  # fresh memory would cost more than the arithmetic


def _mix(product, low, k, out=None):
    """high word of product ^ low ^ k"""
    mixed = np.bitwise_xor(np.right_shift(product, _32, out=out), low, out=out)
    mixed ^= np.uint64(k)
    return mixed


def _philox_lanes(c0, c1, c2, c3, keys, shape):
    """Words w0 | w1 << 32 and w2 | w3 << 32 of `shape`, (*shape, 2): eight 16-bit lanes in order.

    The result is overwritten by the next call in this thread.
    """
    size = math.prod(shape)
    if getattr(_workspace, "size", 0) < size:
        _workspace.size, _workspace.buffers = size, np.empty((8, size), dtype=np.uint64)
    x0, x2, *spare = (buffer[:size].reshape(shape) for buffer in _workspace.buffers[:6])
    lanes = _workspace.buffers[6:].reshape(-1)[: 2 * size].reshape(*shape, 2)
    for k0, k1 in keys[:2]:  # in two rounds the words come to depend on every axis
        product0, product1 = c0 * _MULTIPLIER0, c2 * _MULTIPLIER1
        c0, c2 = _mix(product1, c1, k0), _mix(product0, c3, k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
    for k0, k1 in keys[2:]:
        product0, product1 = spare[:2]
        np.multiply(c0, _MULTIPLIER0, out=product0)
        np.multiply(c2, _MULTIPLIER1, out=product1)
        c0, c2 = _mix(product1, c1, k0, x0), _mix(product0, c3, k1, x2)
        product0 &= _LOW
        product1 &= _LOW
        c1, c3 = product1, product0
        spare = spare[2:] + spare[:2]
    for half, high, low in ((0, c0, c1), (1, c2, c3)):
        low <<= _32
        np.bitwise_or(high, low, out=lanes[..., half])
    return lanes


class MasksAhead:
    """masks = ahead(key): every mask of an update, equal to `dropout_keep_mask`'s; on the CPU.

    For models whose masks take less time than the calls that draw them: all masks of an update,
    and of as many updates to come as make arrays worth a call, come from the same few ops.

    Args:
        requests: (site, planes, rows, cols, p) of each mask, as `dropout_keep_mask` takes them;
            they count in the global batch, and no key moves them.
    """

    def __init__(self, requests: list[tuple]):
        self.requests = requests
        self.shapes, counters, thresholds = [], [], []
        for site, planes, rows, cols, p in requests:
            check_dropout("MasksAhead", p)
            planes, rows = (_positions(x, torch.device("cpu")).numpy() for x in (planes, rows))
            shape = len(planes), len(rows), -(-cols // 8)
            self.shapes.append(shape)
            c2, c1, c0 = np.meshgrid(planes, rows, np.arange(shape[2]), indexing="ij")
            counters.append(np.stack([c0, c1, c2, np.full(shape, site)]).reshape(4, -1))
            thresholds.append(np.full(c0.size, dropout_threshold(p), np.uint16))
        self.ends = np.cumsum([math.prod(shape) for shape in self.shapes]).tolist()
        self.updates = _AHEAD_GROUPS // self.ends[-1] if requests else 0
        if self.updates:
            self.counters = np.concatenate(counters, axis=1)
            self.thresholds = np.concatenate(thresholds)[:, None]
        self.seed = self.first = self.drawn = None

    def __call__(self, key: torch.Tensor) -> list[torch.Tensor]:
        """(planes, rows, cols) bool of every request, for key (2,) or (3,)."""
        if not self.updates:
            return [dropout_keep_mask(key, *request) for request in self.requests]
        seed, step = key.tolist()[:2]
        if seed != self.seed or not self.first <= step < self.first + self.updates:
            self.seed, self.first, self.drawn = seed, step, self._draw(seed, step)
        drawn, masks, start = self.drawn[step - self.first], [], 0
        for end, shape, request in zip(self.ends, self.shapes, self.requests, strict=True):
            masks.append(drawn[start:end].view(*shape[:2], -1)[..., : request[3]])
            start = end
        return masks

    def _draw(self, seed, step):
        """(updates, groups, 8) bool."""
        words = philox4x32(*self.counters, seed, step + np.arange(self.updates)[:, None])
        lanes = np.stack(words, -1).astype(np.uint32).view(np.uint16)
        return torch.from_numpy(lanes >= self.thresholds)


def random_integers(key: torch.Tensor, site: int, rows: range, high: int) -> torch.Tensor:
    """len(rows) integers in [0, high), one a row, equal to those of any larger range of rows.

    Computed on the key's device without a host sync. Keys (..., 3) give integers (..., rows).
    """
    if _one_kernel(key):
        return _random_integers_triton(key, site, rows, high)
    row = torch.arange(rows.start, rows.stop, device=key.device)
    if key.shape[-1] == 3:
        row = row + key[..., 2, None]
    zero = torch.zeros_like(row)
    w0, w1, _, _ = philox4x32(zero, row, zero, zero + site, key[..., 0, None], key[..., 1, None])
    return (w0 << 31 | w1 >> 1) % high


def _one_kernel(key: torch.Tensor) -> bool:
    """Whether a GPU draws integers in one kernel; torch's ops are 120, more than a layer's."""
    if not (HAS_TRITON and key.is_cuda and key.ndim == 1) or traced():
        return False
    return torch.cuda.get_device_capability(key.device) >= (8, 0)  # where Triton is supported


def _random_integers_triton(key, site, rows, high):
    """`random_integers` of one key."""
    integers = torch.empty(len(rows), dtype=torch.int64, device=key.device)
    launch(
        _random_integers_kernel,
        (-(-len(rows) // 128),),
        key.contiguous(),
        integers,
        site,
        rows.start,
        len(rows),
        high,
        HAS_FIRST=key.numel() == 3,
        BLOCK=128,
        num_warps=4,
    )
    return integers


_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_M0, _M1 = tl.constexpr(PHILOX_MULTIPLIERS[0]), tl.constexpr(PHILOX_MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(PHILOX_INCREMENTS[0]), tl.constexpr(PHILOX_INCREMENTS[1])


@jit
def load_key(key_ptr, HAS_FIRST: tl.constexpr):
    """seed, step, first of a (2,) or (3,) key, as uint32 scalars."""
    seed = tl.load(key_ptr).to(tl.uint32)
    step = tl.load(key_ptr + 1).to(tl.uint32)
    if HAS_FIRST:
        first = tl.load(key_ptr + 2).to(tl.uint32)
    else:
        first = seed ^ seed
    return seed, step, first


@jit
def philox_pairs(c0, c1, c2, c3, k0, k1):
    """The output words of `philox4x32` in pairs, w0 << 32 | w1 and w2 << 32 | w3.

    All arguments are uint32. Counters keep their own broadcastable shapes, e.g. c0 (1, G), c1
    (M, 1), scalar c2 and c3: the first two rounds and half of the third then cost one axis
    each, not the tile.
    """
    for _ in tl.static_range(_ROUNDS - 1):
        # One wide product gives both words; umulhi and * would be two instructions.
        product0, product1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ (c1 ^ k0), product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ (c3 ^ k1), product0.to(tl.uint32)
        k0 += _W0
        k1 += _W1
    # The last products stay whole: they are two words each, only the upper to be mixed.
    pair0 = c2.to(tl.uint64) * _M1 ^ (c1 ^ k0).to(tl.uint64) << 32
    pair1 = c0.to(tl.uint64) * _M0 ^ (c3 ^ k1).to(tl.uint64) << 32
    return pair0, pair1


@jit
def lane_order(COLS: tl.constexpr, QUADS: tl.constexpr):
    """(COLS,) int32, the column that each place of `keep_tile` holds, counted from the first.

    Natural order, or with QUADS that for tensor cores: of every 8 columns of their products
    each of 4 neighbouring threads holds two, so 4 x 8 columns are dealt out such that those 8
    which a thread holds are the lanes of one Philox call.
    """
    n = tl.arange(0, COLS)
    if QUADS:
        n = n // 32 * 32 + n // 2 % 4 * 8 + n // 8 % 4 * 2 + n % 2
    return n


@jit
def keep_tile(
    seed, step, plane, site, rows, col, threshold, COLS: tl.constexpr,
    QUADS: tl.constexpr = False,
):  # fmt: skip
    """(M, COLS) int1, what survives dropout in rows (M,) and columns col ... col + COLS - 1.

    col and COLS are multiples of 8, or 32 with QUADS, and COLS is a power of two; seed, step,
    plane, site and threshold, `dropout_threshold(p)`, are scalars. Columns stand in
    `lane_order`.
    """
    groups = (col // 8 + tl.arange(0, COLS // 8)).to(tl.uint32)[None, :]
    rows32 = rows.to(tl.uint32)[:, None]
    plane, site = tl.full((), plane, tl.uint32), tl.full((), site, tl.uint32)
    # Joined only once, the mask has one chain of ops behind it, which the compiler computes in
    # the layout that its user wants; a second join would be converted through shared memory.
    pairs = tl.join(*philox_pairs(groups, rows32, plane, site, seed, step))  # (M, G, 2)
    halves = (32 - 32 * tl.arange(0, 2)).to(tl.uint64)
    words = (pairs[:, :, :, None] >> halves[None, None, None, :]).to(tl.uint32)
    # Shifted left by 16 or 0, a half word decides an unsigned comparison of the whole word.
    shifts = (16 - 16 * tl.arange(0, 2)).to(tl.uint32)
    lanes = words[:, :, :, :, None] << shifts[None, None, None, None, :]
    bound = tl.full((), threshold, tl.uint32) << 16
    keep = lanes >= bound
    if QUADS:  # (M, COLS // 32, thread, word, half) -> (M, COLS // 32, word, thread, half)
        keep = keep.reshape(rows.shape[0], COLS // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
    return keep.reshape(rows.shape[0], COLS)


@jit(do_not_specialize=["site", "start", "number", "high"])
def _random_integers_kernel(
    key_ptr, integers_ptr, site, start, number, high,
    HAS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """integers (number,) int64: those of the rows from `start` on."""
    seed, step, first = load_key(key_ptr, HAS_FIRST)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (start + i).to(tl.uint32) + first
    zero = row ^ row
    pairs, _ = philox_pairs(zero, row, zero, zero + site.to(tl.uint32), seed, step)
    integers = (pairs >> 1) % high.to(tl.uint64)
    tl.store(integers_ptr + i, integers.to(tl.int64), i < number)
