"""Everything between the flags and the record: options, questions in turn, output."""

import dataclasses
import importlib
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench import record as recording
from bench import render
from bench.__main__ import DEFAULT_SECONDS, QUESTIONS, QUICK_SECONDS
from bench.harness import OURS, Budget, Options, hold_against, run_cases
from bench.peers import COMPILE_MODES, NANOGPT, PEERS, SDPA_BACKENDS, SDPA_WARNINGS
from bench.time_to_loss import check_preset
from bench.timing import Stopwatch, ceilings
from gptcore.config import ConfigError
from gptcore.machine import pick_device


def options_of(given: dict[str, Any], nanogpt: Path | None) -> Options:
    """The flags as Options.

    Raises: ConfigError for an unknown device, peer or preset.
    """
    check_preset(given.get("preset"))
    device = pick_device(given.get("device", "auto"))
    default = "bfloat16" if device.type == "cuda" else "float32"
    quick = given.get("quick", False)
    seconds = given.get("seconds", QUICK_SECONDS if quick else DEFAULT_SECONDS)
    return Options(
        device=device,
        dtype=getattr(torch, given.get("dtype", default)),
        seconds=seconds,
        quick=quick,
        full=given.get("full", False),
        peers=peers_of(given["peers"]) if "peers" in given else None,
        nanogpt=nanogpt.resolve() if nanogpt else None,
        target=given.get("target"),
        seeds=given.get("seeds", 1),
        preset=given.get("preset"),
        data=given.get("data", "auto"),
        dtype_given="dtype" in given,
    )


def peers_of(words: list[str]) -> tuple[str, ...]:
    """Names of peers, separated by spaces or commas.

    Raises: ConfigError for an unknown one.
    """
    known = (*PEERS, *SDPA_BACKENDS, *COMPILE_MODES, *NANOGPT)
    names = [name for word in words for name in word.split(",") if name]
    if names == ["none"]:
        return ()
    for name in names:
        if name not in ("all", *known):
            raise ConfigError(f"unknown peer {name!r}; known: all, none, {', '.join(PEERS)}")
    return tuple(PEERS) if "all" in names else tuple(names)


def run(
    argv: list[str],
    given: dict[str, Any],
    questions: list[str],
    nanogpt: Path | None,
    *,
    selfcheck: bool,
) -> int:
    """Ask `questions` one after the other; exit code 1 if anything of ours failed its check."""
    options = options_of(given, nanogpt)
    if "json" in given:
        recording.check_writable("--json", Path(given["json"]))
    if "plot" in given:
        recording.check_writable("--plot", Path(given["plot"]) / "plot.png")
    warnings.filterwarnings("ignore", message=SDPA_WARNINGS, category=UserWarning)
    record = recording.new(argv, options.device)
    stopwatch = Stopwatch(options.device)
    show_environment(record)
    if selfcheck:
        from bench.selfcheck import selfcheck as check

        record["selfcheck"] = check(stopwatch)
        _write(record, given)
        return 0 if record["selfcheck"]["passed"] else 1
    budget, weights = Budget(options.seconds), sum(QUESTIONS[name] for name in questions)
    for name in questions:
        module = importlib.import_module(f"bench.{name}")
        share = max(5.0, budget.left * QUESTIONS[name] / weights)
        weights -= QUESTIONS[name]
        # One question alone may take the time that its runs need.
        run_seconds = share if len(questions) > 1 or "seconds" in given else None
        mine = dataclasses.replace(options, seconds=share, run_seconds=run_seconds)
        print(f"\n=== {name}: {module.__doc__.splitlines()[0]}", flush=True)
        started = time.perf_counter()
        record["questions"][name] = ask(module, mine, stopwatch)
        if "runs" in record["questions"][name]:
            record["runs"] = record["questions"][name]["runs"]
        if "kernel_times" in record["questions"][name]:  # codegen looks for them there
            record["kernel_times"] = record["questions"][name].pop("kernel_times")
        print(f"    ({time.perf_counter() - started:.0f} s)", flush=True)
        _write(record, given)
    if "plot" in given:
        for path in plots(record, Path(given["plot"])):
            print(f"wrote {path}")
    failures = broken(record)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def ask(module, options: Options, stopwatch: Stopwatch) -> dict[str, Any]:
    """The cases of one question, between two measurements of the ceilings: the higher ones count.

    What is shown meanwhile is held against the first.
    """
    limits = _ceilings("now", stopwatch, options)
    seen: set[str] = set()

    def show(case):
        print(render.case_text(case, seen), flush=True)

    if hasattr(module, "answer"):
        content = module.answer(options, stopwatch, limits, show)
    else:
        content = run_cases(module.cases(options), options, stopwatch, limits, show)
    after = _ceilings("then", stopwatch, options)
    content["ceilings_measured"] = [limits, after]
    content["ceilings"] = {
        name: (min if name == "dispatch_us" else max)(limits[name], after[name]) for name in limits
    }
    for case in content["cases"]:
        hold_against(case, content["ceilings"])
    grown = render.growth_text(content["cases"], OURS)
    if grown:
        print(f"\n{grown}")
    if content.get("left_out"):
        print(f"\nleft out for time: {', '.join(content['left_out'])}")
    return content


def _ceilings(when: str, stopwatch: Stopwatch, options: Options) -> dict[str, float]:
    limits = ceilings(stopwatch, options.dtype)
    print(
        f"    {when}: copy {limits['copy_gbps']:.3g} GB/s, matrix product "
        f"{limits['matmul_tflops']:.3g} TFLOP/s, a call {limits['dispatch_us']:.2g} us",
        flush=True,
    )
    return limits


def plots(record: dict[str, Any], folder: Path, stem: str = "") -> list[Path]:
    """Every plot of a record."""
    paths = []
    for name, content in record["questions"].items():
        paths += render.plot_sweeps(name, content["cases"], OURS, folder, stem)
        module = importlib.import_module(f"bench.{name}")
        if hasattr(module, "plot"):
            paths += module.plot(content, folder, stem)
    return paths + render.plot_roofline(record, OURS, folder, stem)


def broken(record: dict[str, Any]) -> list[str]:
    """Ours that failed its check or broke, one line each."""
    found = []
    for name, content in record["questions"].items():
        found += [
            f"{name}: {case['case']}: {result['reason']}"
            for case in content["cases"]
            for result in case["results"]
            if result["name"] == OURS and result["status"] == "failed"
        ]
        found += [
            f"{name}: {what}: {content['absent'][what]}" for what in content.get("broken", ())
        ]
    return found


def show_environment(record: dict[str, Any]) -> None:
    """What this ran on, and what ran."""
    environment, git = record["environment"], record["git"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    print(f"{environment['device']}; {versions}")
    if environment["allocator_variables"]:
        names = ", ".join(environment["allocator_variables"])
        print(f"WARNING: {names} set: peers in processes of their own run without")
    dirty = " with uncommitted changes" if git["dirty"] else ""
    print(f"{record['date']}, revision {str(git['revision'])[:12]}{dirty}")


def _write(record: dict[str, Any], given: dict[str, Any]) -> None:
    if "json" in given:
        recording.write(record, Path(given["json"]))
