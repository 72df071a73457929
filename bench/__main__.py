"""python -m bench: ask one question, several or all; `report`, `predict` and `selfcheck` too."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gptcore.config import ConfigError
from gptcore.flags import Parser, run_command

QUESTIONS = {  # name -> share of the time that all of them get
    "attention": 70,
    "layer_norm": 30,
    "mlp": 25,
    "cross_entropy": 25,
    "embedding": 10,
    "muon": 10,
    "kernels": 20,
    "step": 60,
    "generate": 15,
    "memory": 20,
    "scaling": 25,
    "time_to_loss": 60,
    "ablation": 60,
}
BY_NAME_ONLY = {"ablation"}  # many whole trainings
TASKS = {
    "report": "turn the JSON files of a folder into RESULTS.md with plots",
    "predict": "step time, tokens/s and memory of a model on a GPU, term by term",
    "selfcheck": "show on this machine that the harness reports what is so",
}
WHOLE_MODELS = {"step", "generate", "memory", "scaling", "time_to_loss", "ablation"}
FLAGS = {  # that apply to these alone; the others apply to all questions and selfcheck
    **dict.fromkeys(("gpu", "model", "gpus"), {"predict"}),
    **dict.fromkeys(("preset", "seeds", "data"), {"time_to_loss", "ablation"}),
    "results": {"report", "predict"},
    "target": {"time_to_loss"},
}
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SECONDS, QUICK_SECONDS = 300, 48  # beside which it starts, draws and writes


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 good, 1 a check failed, 2 bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _main(argv))


def _parser() -> Parser:
    from argparse import SUPPRESS, RawDescriptionHelpFormatter

    parser = Parser(
        prog="python -m bench",
        description="How fast is it, against whom, how far from the limit?",
        formatter_class=RawDescriptionHelpFormatter,
        argument_default=SUPPRESS,
        epilog="questions: all, "
        + ", ".join(QUESTIONS)
        + "\ntasks:\n"
        + "\n".join(f"  {name:10} {what}" for name, what in TASKS.items()),
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="questions, or one task; default all but ablation")
    add("--quick", action="store_true", help="about a minute: fewer shapes, no training runs")
    add("--full", action="store_true", help="every shape, as long as it takes")
    seconds = f"{DEFAULT_SECONDS}; --quick: {QUICK_SECONDS}"
    add("--seconds", type=float, metavar="S", help=f"time for everything [{seconds}]")
    add("--device", metavar="D", help="auto, cpu, cuda, cuda:1, ... [auto]")
    dtypes = f"{', '.join(DTYPES)} [bfloat16 on a GPU, else float32; trainings choose]"
    add("--dtype", metavar="T", help=dtypes)
    add("--json", metavar="FILE", help="write the record, raw samples included")
    add("--plot", metavar="DIR", help="write plots")
    add("--peers", nargs="+", metavar="P", help="all, none, or some; an unknown one lists them")
    add("--nanogpt", metavar="DIR", help="a checkout of nanoGPT, to compete with")
    group = parser.add_argument_group("time_to_loss, ablation")
    group.add_argument("--preset", metavar="P", help="recipe [speedrun; on a CPU speedrun-cpu]")
    group.add_argument("--target", type=float, metavar="L", help="exact loss, time_to_loss only")
    group.add_argument("--seeds", type=int, metavar="N", help="runs [1]")
    group.add_argument("--data", metavar="TEXT", help="as train.py's [auto]")
    group = parser.add_argument_group("predict")
    group.add_argument("--gpu", metavar="G", help="h100, h200, a100, b200, mi300x, ... [h100]")
    group.add_argument("--model", metavar="M", help="a preset of train.py [gpt2-124m]")
    group.add_argument("--gpus", type=int, metavar="N", help="data-parallel GPUs [1]")
    group = parser.add_argument_group("report, predict")
    group.add_argument("--results", metavar="DIR", help="folder of JSON files [bench/results]")
    return parser


def _one_of(what: str, word: str, known) -> str:
    if word not in known:
        raise ConfigError(f"unknown {what} {word!r}; known: {', '.join(known)}")
    return word


def _folder(flag: str, path: str, must_hold: str | None = None) -> Path:
    folder = Path(path)
    if must_hold is not None and not (folder / must_hold).is_file():
        raise ConfigError(f"{flag} must be a folder with {must_hold}; got {path}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{flag} must be a folder; got {path}")
    return folder


def _main(argv: list[str]) -> int:
    given = vars(_parser().parse_args(argv))
    names = given.get("names") or ["all"]
    for name in names:
        _one_of("benchmark", name, ("all", *QUESTIONS, *TASKS))
    task = next((name for name in names if name in TASKS), None)
    if task is not None and len(names) > 1:
        raise ConfigError(f"{task} stands alone; got {' '.join(names)}")
    chosen = list(dict.fromkeys(names))
    if "all" in names:
        left_out = BY_NAME_ONLY | (WHOLE_MODELS if given.get("dtype") == "float16" else set())
        if given.get("quick"):
            left_out = left_out | {"time_to_loss"}  # one run takes longer than all the rest
        chosen = [name for name in QUESTIONS if name not in left_out]
    for flag in given.keys() - {"names"}:
        if not FLAGS.get(flag, {*QUESTIONS, "selfcheck"}).intersection(chosen):
            raise ConfigError(f"--{flag} says nothing to {' '.join(names)}; leave it out")
    if given.get("quick") and given.get("full"):
        raise ConfigError("--quick and --full exclude each other")
    for flag in ("seconds", "seeds", "gpus"):
        if given.get(flag, 1) <= 0:
            raise ConfigError(f"--{flag} must be above 0; got {given[flag]:g}")
    if not 0 < given.get("target", 1) < math.inf:
        raise ConfigError(f"--target must be a loss above 0; got {given['target']:g}")
    if "dtype" in given:
        _one_of("dtype", given["dtype"], DTYPES)
    if given.get("dtype") == "float16":
        for name in set(names) & WHOLE_MODELS:
            raise ConfigError(f"{name} computes in float32 or bfloat16; got --dtype float16")
    if task == "report":
        from bench.report import report

        return report(_folder("--results", given.get("results", str(_results()))))
    if task == "predict":
        from bench.predict import predict

        return predict(
            gpu=given.get("gpu", "h100"),
            model=given.get("model", "gpt2-124m"),
            gpus=given.get("gpus", 1),
            results=_folder("--results", given.get("results", str(_results()))),
        )
    if "plot" in given:
        _folder("--plot", given["plot"])
    nanogpt = _folder("--nanogpt", given["nanogpt"], "model.py") if "nanogpt" in given else None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr otherwise
    from bench.run import run
    from gptcore.pool import terminate_as_interrupt

    with terminate_as_interrupt():  # trainings that were started end, too
        return run(argv, given, chosen, nanogpt, selfcheck=task == "selfcheck")


def _results() -> Path:
    return Path(__file__).resolve().parent / "results"


if __name__ == "__main__":
    sys.exit(main())
