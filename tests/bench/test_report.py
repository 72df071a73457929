"""report: what is in the JSON files, and nothing else, is in RESULTS.md."""

import shutil
from pathlib import Path

import pytest
import torch

import bench
from bench import record as recording
from bench import render
from bench.__main__ import main
from bench.harness import OURS
from bench.report import ceilings_line
from bench.time_to_loss import rows

CEILINGS = {"copy_gbps": 12.3, "matmul_tflops": 0.456, "dispatch_us": 7.8}


def a_case(T, ms):
    def result(name, factor):
        return {
            "name": name,
            "status": "timed",
            "check": {"passed": True, "text": "1.1x plain"},
            "median_ms": ms * factor,
            "q25_ms": ms * factor * 0.95,
            "q75_ms": ms * factor * 1.05,
            "rate": 1.0,
            "percent_of_limit": 50.0,
            "ratio": factor,
            "samples_ms": [ms * factor] * 3,
        }

    return {
        "case": f"core T{T}",
        "phase": "forward",
        "dtype": "float32",
        "shape": {"T": T, "B": 4, "kind": "core", "p": 0.0},
        "sweeps": ["T"],
        "unit": "TFLOP/s",
        "work": {"flops": 1e9 * T, "bytes": 1e6 * T, "tokens": T},
        "limit_ms": ms / 2,
        "bound": "compute",
        "results": [
            result(OURS, 1.0),
            result("eager", 2.5),
            {"name": "flex", "status": "skipped", "reason": "not here"},
        ],
    }


def run(who, seed, seconds):
    return {
        "who": who,
        "seed": seed,
        "seconds": seconds,
        "steps": 450,
        "val_loss": 1.88,
        "reached": True,
        "curve": [[0.0, 4.2], [seconds / 2, 2.2], [seconds, 1.88]],
    }


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    record = recording.new(["attention", "--json", "cpu.json"], torch.device("cpu"))
    runs = [run(OURS, 1337, 20.0), run(OURS, 1338, 22.0)]
    runs += [run("nanogpt", 1337, 84.0) | {"exact_val_loss": 1.9108}] * 2
    record["questions"] = {
        "attention": {
            "cases": [a_case(256, 10.0), a_case(512, 40.0)],
            "left_out": ["core T1024"],
            "ceilings": CEILINGS,
        },
        "memory": {
            "cases": [],
            "peaks_mb": {
                "core": {"64": {OURS: 1.0, "eager": 2.0}, "128": {OURS: 2.0, "eager": 8.0}}
            },
            "tables": [{"title": "peak memory", "rows": [["MB", "T 64"], [OURS, "1.00"]]}],
            "ceilings": CEILINGS,
        },
        "time_to_loss": {
            "cases": [],
            "target": 1.8857,
            "preset": "cpu",
            "runs": runs,
            "ceilings": CEILINGS,
        },
        "ablation": {
            "cases": [],
            "tables": [{"title": "nothing to tell", "rows": [["", "val loss"]]}],
            "absent": {OURS: "5 s are left"},
            "ceilings": CEILINGS,
        },
    }
    recording.write(record, folder / "cpu.json")
    return folder


def test_the_report_holds_every_figure_and_picture(results):
    assert main(["report", "--results", str(results)]) == 0
    text = (results.parent / "RESULTS.md").read_text()
    for words in (
        "`python -m bench attention --json cpu.json`",
        "copy 12.3 GB/s",
        "| gptcore | 10.0 | 10.0% | 1.00 | 50 | 1.00 | 1.1x plain |",
        "| eager | 100 | 10.0% | 1.00 | 50 | 2.50 | 1.1x plain |",
        "T 256 -> 512 (x2): time x4.00, least time x4.00",
        "- flex skipped: not here (2 cases)",
        "- left out for time: core T1024",
        "preset cpu; nanogpt fixes its seed, and reaches the loss by its own estimate\n",
        "| gptcore | 2 | 2 | 2/2 | 21.0 +- 1.4 | 450 | 1.8800 | 1.8800 | 1.00 |",
        "| nanogpt | 2 | 1 | 2/2 | 84.0 | 450 | 1.8800 | 1.9108 | 4.00 |",
        "[cpu.json](results/cpu.json)",
    ):
        assert words in text, words
    assert "ablation" not in text and "nothing to tell" not in text and "5 s are left" not in text
    pictures = sorted(path.name for path in results.glob("*.png"))
    assert pictures == [
        "cpu-attention-core-forward-T.png",
        "cpu-memory-core.png",
        "cpu-roofline.png",
        "cpu-time_to_loss.png",
    ]
    for picture in pictures:
        assert f"](results/{picture})" in text
        assert (results / picture).read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_have_a_deviation_and_those_without_a_checkpoint_no_exact_loss():
    first, second = run("nanogpt", 1337, 80.0), run("nanogpt", 1337, 90.0) | {"val_loss": 1.9}
    cells = ["80.0", "450", "1.8800", "", ""]
    assert rows([first | {"exact_val_loss": None}])[1] == ["nanogpt", "1", "1", "1/1", *cells]
    (found,) = rows([first, second])[1:]
    assert found[4:7] == ["85.0 +- 7.1", "450", "1.8900 +- 0.0141"]


def test_where_the_loss_was_not_reached_seconds_are_a_bound():
    ours, other = run("gptcore", 1, 20.0), run("nanogpt", 1, 60.0) | {"reached": False}
    assert [(row[4], row[-1]) for row in rows([ours, other])[1:]] == [
        ("20.0", "1.00"),
        (">60.0", ">3.00"),
    ]
    ours["reached"] = False
    assert [(row[4], row[-1]) for row in rows([ours, other])[1:]] == [(">20.0", ""), (">60.0", "")]


def test_the_report_in_the_repository_is_what_its_records_say(tmp_path):
    folder = Path(bench.__file__).parent
    for path in folder.glob("results/*.json"):
        (tmp_path / "results").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "results")
    assert main(["report", "--results", str(tmp_path / "results")]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == (folder / "RESULTS.md").read_text()


def test_the_report_says_when_ceilings_were_measured():
    assert ceilings_line({"ceilings": CEILINGS}).startswith("Measured just before: copy 12.3 GB/s")
    content = {"ceilings": CEILINGS, "ceilings_measured": [CEILINGS, CEILINGS]}
    assert ceilings_line(content).startswith("Measured before and after, the faster: copy 12.3")


def test_the_report_of_an_empty_folder_says_so(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "must hold JSON files" in capsys.readouterr().err


def test_the_report_of_a_foreign_file_says_so(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "must be a record of schema" in capsys.readouterr().err


def test_a_sweep_is_drawn_in_the_order_of_its_axis():
    groups = render.sweeps([a_case(512, 40.0), a_case(256, 10.0)])
    ((key, group),) = groups.items()
    assert key == ("T", "core forward") and [case["shape"]["T"] for case in group] == [256, 512]


def test_the_roofline_is_in_gflops(monkeypatch, tmp_path):
    """1e9 FLOP and 1e6 bytes a token, 512 tokens in 40 ms, under the ceilings of that record."""
    drawn = []
    monkeypatch.setattr(render, "save", lambda drawing, path: drawn.append(drawing))
    questions = {"attention": {"cases": [a_case(512, 40.0)], "ceilings": CEILINGS}}
    record = {"environment": {"device": "CPU"}, "questions": questions}
    render.plot_roofline(record, OURS, tmp_path)
    roof, points = drawn[0].axes[0].lines
    xs, ys = roof.get_data()
    assert ys == pytest.approx([min(456, 12.3 * x) for x in xs]) and ys[0] < 456 == ys[-1]
    assert points.get_xydata().tolist() == [[1000, 12800]]
