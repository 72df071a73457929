"""Processes that train trials side by side: the parent's side of gptcore.worker."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Pool:
    """Workers that live as long as the `with` block; one that dies is replaced."""

    def __init__(self, jobs: int, log: Path):
        self.workers = [Worker(max(1, _cores() // jobs), log) for _ in range(jobs)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.stop()

    def run(self, requests: list, done: Callable[[dict, dict], None]) -> None:
        """Train what `requests` say; `done` is called here with each and its result.

        Whatever it raises, or Ctrl-C, ends all trials, saved.
        """
        waiting, answers = queue.SimpleQueue(), queue.SimpleQueue()
        for request in requests:
            waiting.put(request)
        threads = [
            threading.Thread(target=_serve, args=(worker, waiting, answers))
            for worker in self.workers[: len(requests)]
        ]
        try:
            for thread in threads:
                thread.start()
            for _ in requests:
                request, result = answers.get()
                if isinstance(result, BaseException):
                    raise result
                done(request, result)
        except BaseException:
            for worker in self.workers:
                worker.stop()
            raise
        finally:
            for thread in threads:
                thread.join()


def _serve(worker: "Worker", waiting: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Work off requests until none are left or the worker was stopped."""
    while True:
        try:
            request = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            answers.put((request, worker.run(request)))
        except BaseException as error:  # raised again by who waits for the answers
            answers.put((request, error))
            return


class Worker:
    """A process (gptcore.worker) that trains one trial after the other.

    Args:
        threads: how many it may use.
        log: file for what the process itself has to say.
    """

    def __init__(self, threads: int, log: Path):
        self.threads, self.log = threads, log
        self.process: subprocess.Popen | None = None
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result of one trial; the process is started if it is not there.

        Raises: KeyboardInterrupt if `stop` was called.
        """
        with self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            if self.process is None:
                self.process = self._start()
        process = self.process
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if self.stopped:
            raise KeyboardInterrupt
        if line:
            return json.loads(line)
        status, self.process = process.wait(), None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        error = f"its process ended with status {status}; see {self.log}"
        return {"error": error, "bad_input": False}

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with open(self.log, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gptcore.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C reaches it through `stop`, once
            )

    def stop(self) -> None:
        """End the process; what it trains is saved first."""
        with self.lock:
            self.stopped = True
            process, self.process = self.process, None
        if process is not None:
            process.stdin.close()  # ends it between trials, the signal during one
            process.send_signal(signal.SIGTERM)  # a shell's "&" has SIGINT ignored
            process.wait()
            process.stdout.close()


def _cores() -> int:
    """Threads that all workers together may use."""
    if given := os.environ.get("OMP_NUM_THREADS", ""):
        return int(given) if given.isdigit() else 1
    from gptcore.machine import core_count  # with torch, which nothing else here needs

    return core_count()


@contextlib.contextmanager
def terminate_as_interrupt():
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
