"""`pytest bench` measures; the default `pytest` never comes here."""

import importlib

import pytest

QUESTIONS = ("attention", "layer_norm", "mlp", "cross_entropy", "embedding", "step")


def pytest_addoption(parser):
    """--bench-device, --bench-dtype, --bench-all."""
    group = parser.getgroup("bench")
    group.addoption("--bench-device", default="auto", help="auto, cpu, cuda, ...")
    group.addoption("--bench-dtype", default=None, help="float32, bfloat16 or float16")
    group.addoption("--bench-all", action="store_true", help="all cases, not the smallest set")


def _options(config):
    from bench.run import options_of

    given = {"device": config.getoption("--bench-device"), "quick": True}
    if config.getoption("--bench-dtype"):
        given["dtype"] = config.getoption("--bench-dtype")
    return options_of(given, None)


@pytest.fixture(scope="session")
def stopwatch(request):
    """Flushes the caches before a round."""
    from bench.timing import Stopwatch

    return Stopwatch(_options(request.config).device)


def pytest_generate_tests(metafunc):
    """One test a case and contestant; a case allocates nothing until it is opened."""
    if "contestant_name" not in metafunc.fixturenames:
        return
    from bench.harness import distinct

    options, every = _options(metafunc.config), metafunc.config.getoption("--bench-all")
    found, names = [], []
    for question in QUESTIONS:
        for case in distinct(importlib.import_module(f"bench.{question}").cases(options)):
            if case.full or not (every or (case.quick and not case.sweeps)):
                continue
            for name in case.contestants:
                found.append((question, case, name))
                names.append("-".join((question, *case.name.split(), name)))
    metafunc.parametrize(("question", "case", "contestant_name"), found, ids=names)
