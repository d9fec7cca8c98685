"""The GPU check, on the CPU: it runs to its end and finds errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "dev"))

import gpu_check  # noqa: E402

from refbn_d2.norms.kernels.cpu_aten import CpuAten  # noqa: E402
from refbn_d2.norms.repeated import RecentPasses  # noqa: E402

CPU = gpu_check.Settings("cpu", quick=True)
GPU = gpu_check.Settings("cuda", quick=False)


def _run(script, output, *options):
    command = [sys.executable, str(script), "--device", "cpu", "--quick", "--output", str(output)]
    process = subprocess.run(
        [*command, *options], env=tiny.environment(), capture_output=True, text=True
    )
    report = json.loads((output / "gpu_check.json").read_text())
    return process, {name: r["status"] for name, r in report["parts"].items()}, report


@pytest.mark.slow
def test_every_part_reaches_its_end_without_a_gpu(tmp_path):
    process, statuses, report = _run(ROOT / "dev" / "gpu_check.py", tmp_path)
    assert statuses == dict.fromkeys(gpu_check.PARTS, "pass"), process.stdout + process.stderr
    assert process.returncode == 0
    parts = report["parts"]
    sets = {row["kernels"] for r in parts.values() for row in r["rows"] if "kernels" in row}
    assert sets == {"cpu_aten", "cuda_triton", "formulas", "fallback"}
    for norm in ("RefBN", "BRN"):
        assert sum(row["norm"] == norm for row in parts["training"]["rows"]) == 9
    assert {(r["detector"], r["norm"]) for r in parts["detectors"]["rows"]} == {
        (detector, norm) for detector in ("R50-C4", "R50-FPN") for norm in ("BN", "RefBN")
    }
    assert "undecided" in report["default_kernels"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {part.title}: pass" in page for part in gpu_check.PARTS.values())


_SCRIPT = """
import sys
sys.path.insert(0, {dev!r})
import gpu_check
from refbn_d2.norms.kernels.cpu_aten import CpuAten
from refbn_d2.norms.kernels.formulas import Formulas

sums = Formulas.sums
Formulas.sums = lambda *args: tuple(1.001 * s for s in sums(*args))

def fail(*args):
    raise RuntimeError("an illegal memory access was encountered")

CpuAten.moments = fail
gpu_check.main()
"""


@pytest.mark.slow
def test_a_wrong_and_a_broken_set_make_it_fail_and_do_not_stop_it(tmp_path):
    script = tmp_path / "injected.py"
    script.write_text(_SCRIPT.format(dev=str(ROOT / "dev")))
    only = ["kernels_aten", "kernels_formulas", "machine"]
    process, statuses, report = _run(script, tmp_path / "out", "--only", *only)
    assert statuses == dict(zip(only, ("error", "fail", "pass")))
    assert process.returncode == 1
    assert "an illegal memory access" in report["parts"]["kernels_aten"]["summary"]
    assert "an illegal memory access" in (tmp_path / "out" / "kernels_aten.log").read_text()


PIECES = {
    "mean": ("moments", lambda mean, var: (mean * 1.001, var)),
    "var": ("moments", lambda mean, var: (mean, var * 1.001)),
    "normalize": ("normalize", lambda y: y * 1.001),
    "sum_g": ("sums", lambda sum_g, sum_g_xhat: (sum_g * 1.001, sum_g_xhat)),
    "sum_g_xhat": ("sums", lambda sum_g, sum_g_xhat: (sum_g, sum_g_xhat * 1.001)),
    "input_gradient": ("input_gradient", lambda dx: dx * 1.001),
}


@pytest.mark.parametrize("piece", PIECES)
def test_an_error_of_a_thousandth_in_any_piece_is_found(piece, monkeypatch):
    method, change = PIECES[piece]
    right = getattr(CpuAten, method)

    def wrong(self, *args):
        result = right(self, *args)
        return change(*result) if isinstance(result, tuple) else change(result)

    monkeypatch.setattr(CpuAten, method, wrong)
    outcome = gpu_check.check_kernels([CpuAten()], CPU)
    wrong_rows = [r for r in outcome.rows if not r["passed"]]
    assert not outcome.passed
    # In each layout and way; float32 has the digits to see it.
    for layout in gpu_check.FORMATS:
        for way in gpu_check.WAYS:
            assert any(r["layout"] == layout and r["case"] == way for r in wrong_rows)


def test_recomputing_with_moved_statistics_is_found(monkeypatch):
    monkeypatch.setattr(RecentPasses, "recall", lambda self, mean, r, d: (r, d))
    rows = gpu_check.check_training(CPU).rows
    wrong = {(r["norm"], r["checkpointing"]) for r in rows if not r["passed"]}
    assert wrong == {("BRN", "use_reentrant=False"), ("BRN", "use_reentrant=True")}


@pytest.mark.parametrize(
    "correct, faster, wanted",
    [("pass", True, "cuda_triton"), ("pass", False, "cuda_aten"), ("fail", True, "cuda_aten")],
)
def test_the_default_is_triton_only_if_it_is_right_and_faster(correct, faster, wanted):
    results = {
        "kernels_triton": {"status": correct},
        "triton": {"status": "pass", "details": {"triton_is_faster": faster}},
    }
    assert gpu_check.default_kernels(results, GPU).startswith(f"{wanted}: ")
    assert gpu_check.default_kernels(results, CPU).startswith("undecided")


def test_a_missed_target_is_no_error_and_wrong_numbers_are():
    for name, status, wanted in [
        ("layers", "fail", False),
        ("layers", "error", True),
        ("kernels_triton", "fail", True),
        ("training", "fail", True),
        ("training", "pass", False),
    ]:
        assert gpu_check.is_failure(name, {"status": status}) is wanted


def test_without_a_gpu_it_says_what_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--device cpu --quick" in error
    assert not (tmp_path / "out").exists()
