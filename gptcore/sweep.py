"""Hyperparameter search: many runs side by side, one table.

    python -m gptcore sweep --grid n_embd=64,128 --grid batch_size=16,32 --max_iters 200
    python -m gptcore sweep --random learning_rate=log:1e-4:1e-2 --trials 20 --halving

Every flag of train.py holds for all trials. The sweep's folder keeps sweep.json (what was asked),
trials/NAME/ (run folders, with result.json once they are done), results.csv and two plots. With
--resume finished trials are skipped, interrupted and failed ones go on from their last checkpoint;
--grid and --random may then add trials, but leave none out.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all trials get a small part of
the steps, the best 1 / eta of them eta times as many, and so on. Schedules span all the steps
from the start, so that a trial that goes on is the trial it would have been.
"""

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcore.config import ConfigError, RunError
from gptcore.files import CAN_LOCK, disk_errors, first_free, lock, read_json, replace_text
from gptcore.flags import FIELDS, Parser, Settings, add_training_flags, from_text, take_settings
from gptcore.pool import Pool, terminate_as_interrupt
from gptcore.trackers import check_tracker

NOT_SWEPT = ("out_dir", "resume", "log")
# Of what the validation loss is taken, and per what: losses of different ones do not compare.
MEASURE = ("data", "val_fraction", "tokenizer", "digits", "operations", "worked_steps")
QUIET = {"sample_tokens": 0}  # what a sweep sets for every trial, unless told otherwise
COLUMNS = ("best_val_loss", "val_loss", "val_accuracy", "step", "elapsed_s")
EVALUATIONS = 5  # of each trial, unless told otherwise
SHOWN = 30  # rows of the table in the terminal; results.csv has them all


@dataclass(frozen=True)
class Plan:
    """What was asked: settings of all trials, and what differs between them.

    Attributes:
        grid: the values of each setting; every combination is tried.
        random: of each setting how to draw it: "log:LOW:HIGH", "uniform:LOW:HIGH" or "A,B,C".
        trials: how often to draw; each draw is tried with every combination of the grid.
        eta: successive halving keeps one trial of eta; None runs all to the end.
    """

    base: Settings
    grid: dict[str, list[Any]]
    random: dict[str, str]
    trials: int
    eta: int | None

    def settings(self) -> list[dict[str, Any]]:
        """What each trial sets; a pure function of the plan, and a longer plan begins the same."""
        seed = self.base.given.get("seed", FIELDS["seed"].default)
        draws = [
            {
                name: draw(name, spec, random.Random(f"{seed} {trial} {name}"))
                for name, spec in self.random.items()
            }
            for trial in range(self.trials)
        ]
        points = [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]
        every = ({**point, **draw} for draw in draws for point in points)
        return list({trial_name(settings): settings for settings in every}.values())

    def to_json(self) -> dict[str, Any]:
        """What sweep.json holds."""
        return {**dataclasses.asdict(self), "base": dataclasses.asdict(self.base)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        """The plan that `to_json` wrote.

        Raises: KeyError, TypeError if it is not one.
        """
        return cls(**{**content, "base": Settings(**content["base"])})


def draw(name: str, spec: str, generator: random.Random) -> Any:
    """One value of setting `name` by `spec`, rounded so that it can be retyped: to three digits, or
    as many as tell hundreds of values between the bounds apart.

    Raises: ConfigError if `spec` is none of log:LOW:HIGH, uniform:LOW:HIGH and A,B,C.
    """
    kind, *bounds = spec.split(":")
    if kind not in ("log", "uniform"):
        return generator.choice(_values(name, spec))
    whole = FIELDS[name].type in (int, int | None)
    try:
        low, high = map(float, bounds)
        if whole:
            low, high = math.ceil(low), math.floor(high)
        good = low < high and math.isfinite(high - low) and (kind == "uniform" or low > 0)
    except (ValueError, OverflowError):
        good = False
    if not good or not (whole or FIELDS[name].type in (float, float | None)):
        raise ConfigError(
            f"--random {name} must be log:LOW:HIGH or uniform:LOW:HIGH with LOW < HIGH (log: above "
            f"0) for a number, or values A,B,C; got {spec!r}"
        )
    if kind == "log":
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    digits = max(3, 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low))))
    return min(high, max(low, round(value) if whole else float(f"{value:.{digits}g}")))


def _values(name: str, text: str) -> list[Any]:
    """The comma-separated values of setting `name`."""
    read = from_text(FIELDS[name])
    values = []
    for word in text.split(","):
        try:
            values.append(read(word))
        except Exception as error:
            raise ConfigError(f"{name} {error}") from error
    return values


def trial_name(settings: dict[str, Any]) -> str:
    """A folder name made of what a trial sets."""
    text = ",".join(f"{name}={_text(value)}" for name, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", text)[:120]
    if name == text:
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# ---- the command -----------------------------------------------------------------------------


def add_arguments(parser: Parser) -> None:
    """The sweep's own flags, then those of training."""
    add = parser.add_argument_group("sweep").add_argument
    add("--grid", action="append", default=[], metavar="NAME=A,B", help="try these values")
    add(
        "--random",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="draw: log:LOW:HIGH, uniform:LOW:HIGH or A,B,C",
    )
    add("--trials", type=int, default=None, metavar="N", help="how often to draw")
    add(
        "--halving",
        type=int,
        nargs="?",
        const=3,
        default=None,
        metavar="ETA",
        help="successive halving: the best of ETA trials go on ETA times as long [3]",
    )
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side on the device [1]")
    helps = {"out_dir": "the sweep's folder; default runs/sweep-N"}
    add_training_flags(parser, helps | {"resume": "go on with the sweep in --out_dir"})


def sweep(arguments) -> int:
    """try many settings, side by side: table, CSV, plots and the best as a train command"""
    with contextlib.ExitStack() as held:
        folder, plan = _prepare(arguments, held)
        resume = _resume(folder, arguments.jobs)
        held.enter_context(disk_errors(folder, lambda: resume))
        trials = {trial_name(settings): settings for settings in plan.settings()}
        print(f"sweep   {folder}: {len(trials)} trials, {arguments.jobs} at a time")
        try:
            with _signals_as_interrupt(), Pool(arguments.jobs, folder / "workers.log") as pool:
                not_run = _search(folder, plan, trials, pool)
        except KeyboardInterrupt:
            done = sum((folder / "trials" / name / "result.json").is_file() for name in trials)
            print(f"interrupted, {done} of {len(trials)} trials done; go on with: {resume}")
            raise
        finally:
            results = read_results(folder, trials)
            if results:
                report(folder, results)
    if not_run:
        raise RunError(
            f"could not run, as said above: {', '.join(not_run)}; mend that, then: {resume}"
        )
    best = results[0]
    if best["error"]:
        raise RunError(f"every trial failed; the first: {best['error']}; see {folder}/trials")
    print(f"best    {train_command(plan, trials[best['trial']])}")
    return 0


@contextlib.contextmanager
def _alone_in(folder: Path):
    """`folder` locked against other sweeps.

    Raises: ConfigError if one runs there.
    """
    if not CAN_LOCK:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise ConfigError(
                f"another sweep runs in {folder}; wait for its end, or give another --out_dir"
            )
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signals_as_interrupt():
    """SIGTERM, and SIGHUP where nohup does not have it ignored, raise KeyboardInterrupt."""

    def hang_up(number, frame):
        signal.signal(number, signal.SIG_IGN)  # shell and kernel may both send it
        raise KeyboardInterrupt

    with terminate_as_interrupt():
        here = threading.current_thread() is threading.main_thread() and os.name != "nt"
        if not here or signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGHUP, hang_up)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _prepare(arguments, held: contextlib.ExitStack) -> tuple[Path, Plan]:
    """The folder, with the plan in it, locked until the end of `held`.

    Raises: ConfigError on bad settings of any trial, before anything is written.
    """
    base = take_settings(vars(arguments))
    resume, folder = base.given.pop("resume", False), base.given.pop("out_dir", None)
    grid = {name: _values(name, text) for name, text in _assignments("grid", arguments.grid)}
    drawn = dict(_assignments("random", arguments.random))
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1; got {arguments.jobs}")
    if arguments.halving is not None and arguments.halving < 2:
        raise ConfigError(f"--halving must be at least 2; got {arguments.halving}")
    if (arguments.trials is None) == bool(drawn) or (drawn and arguments.trials < 1):
        raise ConfigError(
            f"--trials N, at least 1, goes with --random; got --trials {arguments.trials}, "
            f"--random {' '.join(drawn) or 'none'}"
        )
    if grid.keys() & drawn.keys():
        raise ConfigError(f"--grid and --random must differ; got {min(grid.keys() & drawn.keys())}")
    if resume and folder is None:
        raise ConfigError("--resume needs the sweep's folder; add --out_dir")
    plan = Plan(base, grid, drawn, arguments.trials or 1, arguments.halving)
    path = None if folder is None else Path(folder)
    if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
        if not resume:
            raise ConfigError(
                f"sweep folder {path} exists; add --resume to go on with it, or give another "
                "--out_dir"
            )
        plan = _continued(path, plan)
    if not plan.grid and not plan.random:
        raise ConfigError("nothing to try; give --grid NAME=A,B or --random NAME=log:LOW:HIGH")
    _check(plan)
    path = path or first_free("runs/sweep")
    try:
        (path / "trials").mkdir(parents=True, exist_ok=True)
        held.enter_context(_alone_in(path))
        _write(path / "sweep.json", plan.to_json())
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}; give --out_dir") from error
    return path, plan


def _assignments(flag: str, texts: Sequence[str]):
    """(name, what follows the equals sign) of each NAME=..., the names being settings."""
    seen = set()
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not value or name not in FIELDS or name in NOT_SWEPT or name in seen:
            raise ConfigError(
                f"--{flag} must be NAME=..., NAME a flag of train.py, each once, none of "
                f"{', '.join(NOT_SWEPT)}; got {text!r}"
            )
        if name in MEASURE:
            raise ConfigError(
                f"--{flag} {name}: losses of trials that differ in it do not compare; give each "
                f"--{name} a sweep of its own"
            )
        seen.add(name)
        yield name, value


def _continued(folder: Path, plan: Plan) -> Plan:
    """The plan in `folder`, or `plan` if it has all of that one's trials."""
    try:
        content = read_json(folder / "sweep.json")
        before = Plan.from_json(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume: {folder} is not a sweep's; give another --out_dir") from error
    same = plan.base == Settings("auto", {}) and plan.eta in (None, before.eta)
    if not plan.grid and not plan.random and same:
        return before
    if (plan.base, plan.eta) != (before.base, before.eta):
        raise ConfigError(
            f"--resume: {folder} was made with other settings, see its sweep.json; give the same, "
            f"or only: {_resume(folder)}"
        )
    tried = (trial_name(settings) for settings in before.settings())
    names = {trial_name(settings) for settings in plan.settings()}
    forgotten = [
        name for name in tried if name not in names and (folder / "trials" / name).is_dir()
    ]
    if forgotten:
        raise ConfigError(
            f"--resume: --grid and --random must include what {folder} has tried; {forgotten[0]} "
            f"is missing; add to its values, see its sweep.json, or give only: {_resume(folder)}"
        )
    return plan


def _check(plan: Plan) -> None:
    """Raises: ConfigError if any trial's settings are bad."""
    from gptcore.data import load_data
    from gptcore.machine import pick_device
    from gptcore.tasks import task_of

    check_tracker(plan.base.given.get("log", "none"))
    if "init_from" in (*plan.grid, *plan.random) and "tokenizer" not in plan.base.given:
        raise ConfigError("init_from can be tried with one tokenizer; give --tokenizer")
    device, opened = pick_device(plan.base.given.get("device", "auto")), set()
    for settings in plan.settings():
        try:
            given = {**plan.base.given, **settings}
            config, _ = Settings(plan.base.preset, given).merged(device.type)
            if config.data not in opened and task_of(config) is None:
                load_data(config.data)
                opened.add(config.data)
        except ConfigError as error:
            raise ConfigError(f"trial {trial_name(settings)}: {error}") from error
        if plan.eta and "max_iters" in settings:
            raise ConfigError("max_iters cannot be tried with --halving, which sets it")


def _resume(folder: Path, jobs: int = 1) -> str:
    words = ["python", "-m", "gptcore", "sweep", "--out_dir", str(folder), "--resume"]
    return shlex.join(words + (["--jobs", str(jobs)] if jobs > 1 else []))


# ---- running ---------------------------------------------------------------------------------


def _search(folder: Path, plan: Plan, trials: dict[str, dict[str, Any]], pool: Pool) -> list[str]:
    """Run every trial, or by successive halving the promising ones, to the end.

    Returns: the trials that could not run; without them no rung is followed by another.
    """
    last = max_iters(plan)
    rungs = [last]
    while plan.eta and len(trials) >= plan.eta ** len(rungs) and rungs[0] > plan.eta:
        rungs.insert(0, last // plan.eta ** len(rungs))
    alive, failed, not_run = list(trials), set(), []

    def record(request, result):
        result = _judged(result)
        _record(folder, request, result)
        if result["bad_input"]:
            not_run.append(request["trial"])
        elif result["error"]:
            failed.add(request["trial"])

    for rung, budget in enumerate(rungs):
        if rung:
            ranked = [r["trial"] for r in read_results(folder, {n: trials[n] for n in alive})]
            alive = ranked[: max(1, len(trials) // plan.eta**rung)]
        pending = [name for name in alive if _steps_done(folder / "trials" / name) < budget]
        pending = [name for name in pending if name not in failed]
        if len(rungs) > 1:
            print(f"rung {rung + 1} of {len(rungs)}, to step {budget}: the best {len(alive)}")
        requests = [_request(folder, plan, name, trials[name], budget) for name in pending]
        pool.run(requests, record)
        if not_run:
            break
    return not_run


def max_iters(plan: Plan) -> int:
    """Steps of a whole trial; 0 if the trials differ in it."""
    if "max_iters" in plan.grid or "max_iters" in plan.random:
        return 0
    from gptcore.machine import pick_device

    device = pick_device(plan.base.given.get("device", "auto"))
    return plan.base.merged(device.type)[0].max_iters


def _request(folder, plan: Plan, name: str, settings: dict[str, Any], budget: int):
    """What a worker is asked to do for one trial."""
    given = {**QUIET, **plan.base.given, **settings}
    if budget:
        given["max_iters"] = budget
        given.setdefault("eval_interval", max(1, max_iters(plan) // EVALUATIONS))
        if plan.eta:
            given.setdefault("lr_decay_iters", max_iters(plan))
    run = folder / "trials" / name
    given |= {"out_dir": str(run), "resume": True}
    log = str(folder / "trials" / f"{name}.log")
    return {"trial": name, "preset": plan.base.preset, "given": given, "log": log}


def _record(folder: Path, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Show the result of a trial, and keep it; one with bad input may be tried again."""
    name = request["trial"]
    if result["bad_input"]:
        print(f"  {name}: not run: {result['error']}", flush=True)
        return
    run = folder / "trials" / name
    run.mkdir(exist_ok=True)
    _write(run / "result.json", {"trial": name, **result})
    if result["error"]:
        print(f"  {name}: failed: {result['error']}", flush=True)
    else:
        print(
            f"  {name}: validation loss {result['best_val_loss']:.4f}, accuracy "
            f"{result['val_accuracy']:.1%}, {result['step']} steps, {result['elapsed_s']:.1f} s",
            flush=True,
        )


def _steps_done(run: Path) -> int:
    """Steps of a trial that has a result; -1 if it has none, or failed: it may have been killed."""
    result = _read_result(run)
    return -1 if result is None or result["error"] else result["step"]


def _read_result(run: Path) -> dict[str, Any] | None:
    path = run / "result.json"
    return _judged(read_json(path)) if path.is_file() else None


def _judged(result: dict[str, Any]) -> dict[str, Any]:
    """The same, failed if no evaluation was finite."""
    if result["error"] or result["best_val_loss"] is not None:
        return result
    return {**result, "error": "no finite validation loss"}


# ---- results ---------------------------------------------------------------------------------


def read_results(folder: Path, trials: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results there are, lowest validation loss first, failed ones last.

    Returns: one dictionary a trial: trial, settings, step, val_loss, best_val_loss, val_accuracy,
        elapsed_s, error (None or words).
    """
    results = []
    for name, settings in trials.items():
        result = _read_result(folder / "trials" / name)
        if result is not None:
            results.append({**dict.fromkeys(COLUMNS), **result, "settings": settings})
    return sorted(results, key=lambda r: math.inf if r["error"] else r["best_val_loss"])


def report(folder: Path, results: list[dict[str, Any]]) -> None:
    """Table, results.csv, parallel.png and curves.png."""
    from gptcore.sweep_plots import plot_curves, plot_parallel

    names = list(results[0]["settings"])
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", *names, *COLUMNS, "error"])
        for r in results:
            settings = [_text(r["settings"][name]) for name in names]
            writer.writerow([r["trial"], *settings, *(r[c] for c in COLUMNS), r["error"] or ""])
    print(table(results))
    plot_parallel(results, folder / "parallel.png")
    plot_curves(folder, results, folder / "curves.png")
    print(f"results {folder / 'results.csv'}, parallel.png, curves.png")


def table(results: list[dict[str, Any]]) -> str:
    """The best SHOWN results, aligned."""
    names = list(results[0]["settings"])
    rows = [[*names, "val loss", "accuracy", "steps", "seconds"]]
    for r in results[:SHOWN]:
        values = [_text(r["settings"][name]) for name in names]
        if r["error"]:
            rows.append([*values, "failed", "", "", ""])
        else:
            rows.append(
                [
                    *values,
                    f"{r['best_val_loss']:.4f}",
                    f"{r['val_accuracy']:.1%}",
                    str(r["step"]),
                    f"{r['elapsed_s']:.1f}",
                ]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    if len(results) > SHOWN:
        lines.append(f"... and {len(results) - SHOWN} more in results.csv")
    return "\n".join(lines)


def train_command(plan: Plan, settings: dict[str, Any]) -> str:
    """What to type to train with `settings` of `plan`."""
    words = ["python", "train.py"]
    if plan.base.preset != "auto":
        words += ["--preset", plan.base.preset]
    for name, value in {**plan.base.given, **settings}.items():
        text = _text(value)
        words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def _write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    replace_text(path, json.dumps(content, indent=2) + "\n")
