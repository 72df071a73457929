"""A small text and a tiny model, trained in a second: what the tests of gptcore share."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORDS = "the king and queen of all that is not what we were, good my lord! Enter:".split(" ")
TINY = (
    "--preset=baby-cpu --max_iters=12 --eval_interval=4 --log_interval=2 --eval_iters=2 "
    "--sample_tokens=8 --device=cpu --dtype=float32"
).split()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> str:
    """Path of 6,000 characters of made-up English."""
    words = random.Random(0).choices(WORDS, k=2000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(words).split("! ")).ljust(6000)[:6000])
    return str(path)


@pytest.fixture(scope="session")
def train_main():
    """`main` of train.py, run in this process."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="session")
def tiny_flags(text_file) -> list[str]:
    """Flags of a run of 12 steps of a 2-layer model on `text_file`; add --out_dir."""
    return [*TINY, f"--data={text_file}"]


@pytest.fixture(scope="session")
def trained_run(train_main, tiny_flags, tmp_path_factory) -> Path:
    """The run folder of such a run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert train_main([*tiny_flags, f"--out_dir={folder}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def two_threads_at_most():
    """More threads only slow these sizes down."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prepared(tiny_flags, tmp_path):
    """prepare(flags) -> a Run of the tiny settings."""
    from gptcore.flags import parse_settings
    from gptcore.trainer import prepare

    count = iter(range(100))

    def make(*flags):
        folder = tmp_path / f"run{next(count)}"
        return prepare(parse_settings([*tiny_flags, f"--out_dir={folder}", *flags]))

    return make
