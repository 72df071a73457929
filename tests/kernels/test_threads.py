"""Pieces spread over threads: each done once, errors reported, the caller's settings kept."""

import threading

import pytest
import torch

from kernels import attention, attention_eager, causal_attention
from kernels.rng import make_key
from kernels.threads import for_each


@pytest.fixture
def threads():
    """Sets the number of torch's threads; puts back what was there."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_every_piece_is_done_once(threads, count, pieces):
    threads(count)
    done, states = [], []
    for_each(range(pieces), lambda state, piece: done.append((state, piece)), lambda: len(states))
    assert sorted(piece for _, piece in done) == list(range(pieces))
    assert torch.get_num_threads() == count


def test_pieces_run_side_by_side_each_with_one_thread(threads):
    threads(2)
    barrier = threading.Barrier(2, timeout=20)  # passes only if two threads wait at once
    seen = []

    def work(state, piece):
        barrier.wait()
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    for_each(range(2), work)
    assert len({ident for ident, _, _ in seen}) == 2
    assert [rest for _, *rest in seen] == [[1, False]] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_reaches_the_caller(threads, count):
    threads(count)

    def work(state, piece):
        if piece == 3:
            raise ZeroDivisionError("piece 3")

    with pytest.raises(ZeroDivisionError, match="piece 3"):
        for_each(range(6), work)
    assert torch.get_num_threads() == count
    assert torch.is_grad_enabled()


def test_callers_may_differ_in_their_number_of_threads(threads):
    done = []

    def call(count):
        for _ in range(50):
            torch.set_num_threads(count)
            for_each(range(count), lambda state, piece: done.append(piece))

    callers = [threading.Thread(target=call, args=(count,)) for count in (2, 3, 4, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(done) == 50 * (2 + 3 + 4 + 5)


def test_inference_mode_is_carried_over(threads):
    threads(2)
    barrier, modes = threading.Barrier(2, timeout=20), []  # one thread would take all pieces

    def work(state, piece):
        barrier.wait()
        modes.append(torch.is_inference_mode_enabled())

    with torch.inference_mode():
        for_each(range(2), work)
    assert modes == [True] * 2


def test_attention_does_not_depend_on_the_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(attention, "_SMALL", 0)
    monkeypatch.setattr(attention_eager, "BLOCK_ELEMENTS", 1 << 12)  # 24 pieces
    results = []
    for count, backward_count in ((1, 1), (2, 3), (3, 1)):
        threads(count)
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 6, 4, 80, 8).requires_grad_()
        o = causal_attention(q, k, v, dropout_p=0.2, key=make_key(1), backend="eager")
        threads(backward_count)  # which cuts the planes into other pieces
        results.append([o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
