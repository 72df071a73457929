"""A long run with evaluations, checkpoints and samples: memory stays flat, no file stays open."""

import gc
import os
import signal
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from gptcore.log import Log, read_metrics
from gptcore.trainer import training_step

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
ROOT = Path(__file__).parents[2]
FLAGS = (
    "--preset=baby-cpu --max_iters=1000000000 --eval_interval=40 --checkpoint_interval=10 "
    "--log_interval=5 --eval_iters=4 --sample_tokens=60 --device=cpu --dtype=float32"
).split()


def resident_bytes(pid):
    """Memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def watched(process, seconds, every_s):
    """(seconds, bytes, open files) of a process, again and again."""
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < seconds:
        assert process.poll() is None, "the run ended"
        yield now, resident_bytes(process.pid), open_files(process.pid)
        time.sleep(every_s)


def slope(samples):
    """Bytes a minute, the least squares line through (seconds, bytes)."""
    seconds, held = zip(*samples, strict=True)
    return 60 * statistics.linear_regression(seconds, held).slope


@pytest.mark.parametrize("minutes", [0.3, pytest.param(20, marks=pytest.mark.slow)])
def test_memory_is_flat(text_file, tmp_path, minutes):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *FLAGS, f"--data={text_file}", f"--out_dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (folder / "last").is_dir():  # imports and the first evaluation are over
            assert process.poll() is None
            time.sleep(0.1)
        samples = list(watched(process, 60 * minutes, every_s=0.05 * minutes))
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 1
    finally:
        process.kill()
    # A plot, once a minute, imports matplotlib; buffers and the allocator's arenas settle, too:
    # it takes some thousand steps until a megabyte more is held, and then no more.
    settled = [sample for sample in samples if sample[0] > 0.4 * 60 * minutes]
    growth = slope([(seconds, held) for seconds, held, _ in settled])
    files = [count for _, _, count in settled]
    fifths = [samples[len(samples) * fifth // 5 - 1][1] / 1e6 for fifth in range(1, 6)]
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = sum(record["kind"] == "eval" for record in records)
    steps = records[-1]["step"]
    bytes_a_step = growth * minutes / steps
    held = " ".join(f"{megabytes:.1f}" for megabytes in fifths)
    print(
        f"\n{minutes} minutes, {steps} steps, {evaluations} evaluations and samples, "
        f"{steps // 10} checkpoints: after each fifth {held} MB resident, slope "
        f"{growth / 1e3:+.2f} kB a minute, {bytes_a_step:.1f} bytes a step; open files "
        f"{min(files)} to {max(files)}"
    )
    assert evaluations > 3
    # The writer has at most a file and a folder open, the log one.
    assert max(files) <= min(files) + 3 and statistics.median(files[-20:]) <= statistics.median(
        files
    )
    # A number kept in a list at each step would be 32. The short run is still settling.
    assert bytes_a_step < (1e4 if minutes < 1 else 12)


def test_a_step_keeps_next_to_nothing_in_python(prepared):
    """Which is told apart from what a process holds that still settles, as above."""
    run = prepared("--log_interval=5")
    log, held = Log(run, step_seconds_at_rate=1e-3), []
    tracemalloc.start()
    with log.progress_bar():
        for step in range(1, 81):
            log.stepped(training_step(run))
            log.look(wait=False)
            if step in (30, 80):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert (held[1] - held[0]) / 50 < 1000  # a running median, too, fills up to 256 numbers


def test_a_leak_would_be_seen():
    samples = [(float(second), 10**9 + 500 * second) for second in range(1200)]
    assert slope(samples) == pytest.approx(30e3)
