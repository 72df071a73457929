"""Randomness as a pure function: Philox itself, its three implementations, keys."""

import re
import threading

import pytest
import torch

from kernels import rng
from kernels.backend import tl, triton
from kernels.rng import (
    SITE_BATCH,
    dropout_keep_mask,
    dropout_scale,
    dropout_threshold,
    make_key,
    random_integers,
)
from kernels.threads import for_each


def philox_by_hand(counter, key, rounds):
    """Salmon et al. 2011, section 3.3, on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            product0 >> 32 ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


# Known answers of Random123's philox4x32-10.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    assert philox_by_hand(counter, key, 10) == words
    counters = [torch.tensor(c) for c in counter]
    assert tuple(int(w) for w in rng.philox4x32(*counters, *key, rounds=10)) == words


def keep_by_hand(seed, step, site, plane, row, col, threshold):
    """The definition, for one element."""
    words = philox_by_hand((col // 8, row, plane, site), (seed, step), 7)
    lane = words[col % 8 // 2] >> 16 * (col % 2) & 0xFFFF
    return lane >= threshold


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1 / 65536], ids="p{:.3g}".format)
def test_mask_is_the_definition(p):
    seed, step, site, planes, rows, cols = 2**32 - 1, 2**31 + 7, 21, range(5, 7), range(3, 6), 19
    keep = dropout_keep_mask(make_key(seed, step), site, planes, rows, cols, p)
    threshold = dropout_threshold(p)
    expected = [
        [[keep_by_hand(seed, step, site, i, j, k, threshold) for k in range(cols)] for j in rows]
        for i in planes
    ]
    assert keep.tolist() == expected


@pytest.mark.parametrize("chunk", [1, 7, 8192])
def test_numpy_and_torch_agree(chunk, monkeypatch):
    monkeypatch.setattr(rng, "_CHUNK_GROUPS", chunk)
    key = make_key(123, 456)
    planes, rows = torch.tensor([9, 2, 2**31]), torch.arange(11, 18)
    by_torch = rng._keep_torch(key, 3, planes, rows, 4, 0.3)
    assert torch.equal(dropout_keep_mask(key, 3, planes, rows, 29, 0.3), by_torch[..., :29])


@pytest.mark.parametrize("updates", [0, 1, 4])
def test_masks_drawn_ahead_are_those_drawn_one_by_one(updates, monkeypatch):
    """In order, after a jump back, and with another seed."""
    requests = [
        (21, torch.tensor([9, 2, 2**31]), range(11, 18), 29, 0.3),
        (3, 1, torch.arange(5, 25), 8, 0.0),
        (16, 2, 4, 1, 0.9),
    ]
    groups = 3 * 7 * 4 + 20 + 2 * 4
    monkeypatch.setattr(rng, "_AHEAD_GROUPS", updates * groups)
    ahead = rng.MasksAhead(requests)
    assert ahead.updates == updates
    for seed, step in [(5, 2**32 - 3), (5, 2**32 - 2), *((6, step) for step in (*range(7), 3, 9))]:
        key = make_key(seed, step)
        expected = [dropout_keep_mask(key, *request) for request in requests]
        assert all(map(torch.equal, ahead(key), expected)), (seed, step)
    assert rng.MasksAhead([])(key) == []


def test_masks_may_come_from_elsewhere():
    key, given = make_key(1, 2), torch.ones(2, 3, 4, dtype=torch.bool)
    seen = []

    def source(*request):
        seen.append(request)
        return rng.draw_keep_mask(*request) & given

    with rng.masks_from(source):
        found = dropout_keep_mask(key, 7, 2, 3, 4, 0.5)
    assert len(seen) == 1 and seen[0][1:] == (7, 2, 3, 4, 0.5)
    assert torch.equal(found, dropout_keep_mask(key, 7, 2, 3, 4, 0.5))


def test_masks_from_elsewhere_reach_helpers_and_no_other_thread():
    drawn, key = [], make_key(1, 2)

    def source(*request):
        drawn.append(threading.current_thread().name)
        return rng.draw_keep_mask(*request)

    def draw(*_):
        dropout_keep_mask(key, 7, 2, 3, 4, 0.5)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with rng.masks_from(source):
            for_each(range(4), draw)
            stranger = threading.Thread(target=draw, name="stranger")
            stranger.start()
            stranger.join()
    finally:
        torch.set_num_threads(threads)
    assert len(drawn) == 4 and "stranger" not in drawn


def test_masks_under_the_compiler():
    key = make_key(1, 2)
    compiled = torch.compile(dropout_keep_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key, 7, 2, 3, 9, 0.5), dropout_keep_mask(key, 7, 2, 3, 9, 0.5))


def test_a_key_counts_modulo_its_32_bits():
    """On every device, as the kernels read it."""
    key, wrapped = torch.tensor([2**32 + 5, -1]), torch.tensor([5, 2**32 - 1])
    expected = dropout_keep_mask(wrapped, 7, 2, 3, 9, 0.5)
    assert torch.equal(dropout_keep_mask(key, 7, 2, 3, 9, 0.5), expected)
    counts = torch.arange(2), torch.arange(3)
    assert torch.equal(rng._keep_torch(key, 7, *counts, 2, 0.5)[..., :9], expected)


def test_a_key_between_others_is_gathered():
    """The kernels read it as neighbours."""
    keys = torch.tensor([[1, 8], [2, 9]])
    key = rng.check_key("op", keys[:, 0], keys.device)
    assert key.stride() == (1,) and key.tolist() == [1, 2]


@pytest.mark.parametrize("quads", [False, True], ids=["natural", "quads"])
def test_kernel_draws_the_same_mask(quads, device):
    pytest.importorskip("triton", reason="needs triton")

    @triton.jit
    def kernel(
        key_ptr, keep_ptr, plane, site, threshold,
        ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr,
    ):  # fmt: skip
        seed, step, first = rng.load_key(key_ptr, True)
        rows = 100 + tl.arange(0, ROWS)
        plane32 = first * 3 + plane.to(tl.uint32)
        keep = rng.keep_tile(seed, step, plane32, site, rows, 64, threshold, COLS, QUADS)
        offsets = tl.arange(0, ROWS)[:, None] * COLS + rng.lane_order(COLS, QUADS)[None, :]
        tl.store(keep_ptr + offsets, keep.to(tl.int8))

    key = make_key(2**32 - 5, 77, 2, device=device)
    for p in (0.3, 0.8):
        keep = torch.full((16, 64), -1, dtype=torch.int8, device=device)
        kernel[(1,)](key, keep, 5, 21, dropout_threshold(p), 16, 64, quads)
        assert keep.min() == 0  # every place is written: the order is a permutation
        expected = dropout_keep_mask(key, 21, range(11, 12), range(100, 116), 128, p)
        assert torch.equal(keep.bool(), expected[0, :, 64:])


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5], ids="p{}".format)
def test_dropped_fraction_and_scale(p):
    keep = dropout_keep_mask(make_key(1), 0, 4, 256, 1024, p)
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean().item() - p) < 5 * deviation
    assert abs(keep.double().mean().item() * dropout_scale(p) - 1) < 5 * deviation / (1 - p)


def test_every_coordinate_matters():
    """Masks that differ in one coordinate agree as often as independent ones."""
    base = dropout_keep_mask(make_key(1, 1), 1, 1, 64, 256, 0.5)
    others = [
        dropout_keep_mask(make_key(2, 1), 1, 1, 64, 256, 0.5),
        dropout_keep_mask(make_key(1, 2), 1, 1, 64, 256, 0.5),
        dropout_keep_mask(make_key(1, 1), 2, 1, 64, 256, 0.5),
        dropout_keep_mask(make_key(1, 1), 1, range(1, 2), 64, 256, 0.5),
        dropout_keep_mask(make_key(1, 1), 1, 1, range(64, 128), 256, 0.5),
        dropout_keep_mask(make_key(1, 1), 1, 1, 64, 512, 0.5)[..., 256:],
    ]
    for other in others:
        assert abs((base == other).double().mean().item() - 0.5) < 5 * 0.5 / 128


def test_drawn_keys_follow_manual_seed():
    keys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        keys.append(rng.draw_key().tolist())
    assert keys[0] == keys[1] != keys[2] and keys[0][2] == 0


def test_sites_are_distinct():
    sites = [rng.layer_site(layer, place) for layer in range(9) for place in rng.PLACES]
    named = [site for name, site in vars(rng).items() if name.startswith("SITE_")]
    assert len(named) >= 5 and len({*sites, *named}) == len(sites + named)


BAD_KEYS = {
    "key must be an int64 tensor; got int": (TypeError, 3),
    "key must be an int64 tensor; got torch.int32": (TypeError, torch.zeros(2, dtype=torch.int32)),
    "key must be (2,) [seed, step] or (3,) [seed, step, first]; got shape (4,)": (
        ValueError,
        torch.zeros(4, dtype=torch.int64),
    ),
    "key must be on cpu; got meta": (ValueError, torch.zeros(2, dtype=torch.int64, device="meta")),
}


@pytest.mark.parametrize("message", BAD_KEYS)
def test_bad_keys(message):
    error, key = BAD_KEYS[message]
    with pytest.raises(error, match=re.escape(f"op: {message}")):
        rng.check_key("op", key, torch.device("cpu"))


def test_a_mask_wants_a_key_and_a_site():
    with pytest.raises(TypeError, match="dropout_keep_mask: key must be an int64 tensor"):
        dropout_keep_mask(torch.zeros(2), 0, 1, 1, 8, 0.1)
    for key in (None, [1, 2]):
        with pytest.raises(
            TypeError, match=f"key must be an int64 tensor; got {type(key).__name__}"
        ):
            dropout_keep_mask(key, 0, 1, 1, 8, 0.1)
    with pytest.raises(ValueError, match="dropout_keep_mask: site must be in"):
        dropout_keep_mask(make_key(1), -1, 1, 1, 8, 0.1)


@pytest.mark.parametrize("name", ["planes", "rows", "cols"])
def test_a_mask_has_no_negative_size(name):
    sizes = {"planes": 1, "rows": 1, "cols": 8, name: -1}
    with pytest.raises(ValueError, match=f"dropout_keep_mask: {name} must be at least 0; got -1"):
        dropout_keep_mask(make_key(1), 0, *sizes.values(), 0.1)


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999, float("nan")])
def test_bad_probability(p):
    rule = "keep one of 65536 elements" if 0 < p < 1 else "be in [0, 1)"
    message = f"dropout_keep_mask: dropout_p must {rule}; got {p}"
    with pytest.raises(ValueError, match=re.escape(message)):
        dropout_keep_mask(make_key(1), 0, 1, 1, 8, p)


@pytest.mark.parametrize("high", [1, 7, 1_003_854, 2**31 + 11, 2**40 + 1])
@pytest.mark.parametrize("rows", [range(1), range(5, 300), range(0)])
@pytest.mark.parametrize("fields", [2, 3])
def test_one_kernel_draws_the_integers_of_torchs_ops(fields, rows, high, device):
    pytest.importorskip("triton", reason="needs triton")
    key = make_key(2**32 - 1, 77, 4000)[:fields]
    drawn = rng._random_integers_triton(key.to(device), SITE_BATCH, rows, high)
    assert torch.equal(drawn.cpu(), random_integers(key, SITE_BATCH, rows, high))
    assert torch.equal(random_integers(key.to(device), SITE_BATCH, rows, high), drawn)
