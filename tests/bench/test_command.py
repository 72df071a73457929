"""The command line: bad input is one line with the known words and exit code 2."""

import subprocess
import sys

import pytest

from bench.__main__ import QUESTIONS, main

BAD = {
    "benchmark": (["atention"], "known: all, attention"),
    "benchmark beside a good one": (["step", "nothing"], "known: all, attention"),
    "peer": (["step", "--peers", "cublas"], "known: all, none, naive, eager"),
    "one peer of two": (["step", "--peers", "naive,cublas"], "known: all, none, naive, eager"),
    "device": (["step", "--device", "tpu"], "auto, cpu, cuda or cuda:N"),
    "device not here": (["step", "--device", "cuda:77"], "sees"),
    "dtype": (["step", "--dtype", "int8"], "known: float32, bfloat16, float16"),
    "dtype of a model": (["step", "--dtype", "float16"], "float32 or bfloat16"),
    "nanogpt folder": (["step", "--nanogpt", "/nowhere"], "must be a folder with model.py"),
    "results folder": (["report", "--results", __file__], "must be a folder"),
    "plot folder": (["step", "--plot", __file__], "must be a folder"),
    "json folder": (["step", "--json", "/"], "must be a file"),
    "name of a gpu": (["predict", "--gpu", "h300"], "known: "),
    "model": (["predict", "--model", "gpt5"], "known: "),
    "model that is no GPT": (["predict", "--model", "bigram"], "known: notebook, baby-cpu"),
    "gpus": (["predict", "--gpus", "0"], "must be above 0"),
    "seconds": (["--seconds", "-1"], "must be above 0"),
    "task and question": (["report", "step"], "stands alone"),
    "quick and full": (["--quick", "--full"], "exclude each other"),
    "preset": (["time_to_loss", "--preset", "fast"], "known: "),
    "flag": (["--quik"], "did you mean --quick?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_2(case, capsys):
    argv, words = BAD[case]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1


def test_help_imports_no_torch():
    code = (
        "import sys, bench.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert all(name in done.stdout for name in QUESTIONS)
