"""The report command from end to end: what it writes and what it refuses."""

import html.parser
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from refbn_d2.evaluation.comparison import compare
from refbn_d2.evaluation.report import write_report
from refbn_d2.evaluation.runs import named_results
from tests.evaluation import generated

ROOT = Path(__file__).parents[2]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def command(*arguments):
    run = [sys.executable, str(ROOT / "tools" / "compare.py"), *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def files(write, content):
    found = {"a": 0.55, "b": 0.6, "c": 0.8, "d": 0.85}
    made = {
        k: write(generated.detections(content, f, seed=n)) for n, (k, f) in enumerate(found.items())
    }
    return {**made, "copy": write(made["a"].read_text())}


class Page(html.parser.HTMLParser):
    """What a page loads from elsewhere, its tags, and those that are left open."""

    void = {"meta", "img", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(text):
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(s.startswith(("#", "data:")) for s in page.sources)
    assert "url(http" not in text and "@import" not in text
    return page


def test_report_from_results(tmp_path, gt_file, files):
    output = tmp_path / "new" / "report"
    run = command(
        "report", "--gt", gt_file, "--results", f"BN={files['a']},{files['b']}",
        f"RefBN={files['c']},{files['d']}", f"One={files['c']}", "--iou-type", "bbox", "segm",
        "--baseline", "BN", "--resamples", 40, "--seed", 0, "--output", output,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written = sorted(p.name for p in output.glob("report.*"))
    assert written == ["report.html", "report.json", "report.md"]
    report = json.loads((output / "report.json").read_text())
    assert list(report["runs"]) == ["BN", "RefBN", "One"]
    assert list(report["deltas"]) == ["RefBN", "One"]
    for iou_type in ("bbox", "segm"):
        for metric in METRICS:
            seeds = [s[iou_type][metric] for s in report["runs"]["BN"]["seeds"]]
            assert report["runs"]["BN"][iou_type][metric] == pytest.approx(np.mean(seeds))
            d = report["deltas"]["RefBN"][iou_type][metric]
            means = [report["runs"][n][iou_type][metric] for n in ("BN", "RefBN")]
            assert d["delta"] == pytest.approx(means[1] - means[0])
            assert d["ci95"][0] < d["delta"] < d["ci95"][1]
            assert 0 <= d["p"] <= d["p_adjusted"] <= 1
            # One number decides the same question both ways.
            assert (d["p"] < 0.05) == (not d["ci95"][0] <= 0 <= d["ci95"][1])
    page = assert_self_contained((output / "report.html").read_text())
    assert page.tags.count("svg") >= 8
    text = (output / "report.md").read_text()
    assert "| AP box | AP50 box | AP75 box | AP mask | AP50 mask | AP75 mask |" in text
    assert "The paper's own Table 3" in text and "| RefBN | 37.0 | 56.8 | 41.2 |" in text


def test_two_copies_of_one_result_do_not_differ(tmp_path, gt_file, files, write):
    copy = write(files["a"].read_text())
    runs = named_results([f"BN={files['a']}", f"Copy={copy}"])
    comparison = compare(runs, gt_file, ["bbox", "segm"], "BN", 50, 0)
    write_report(comparison, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    for table in report["deltas"]["Copy"].values():
        assert set(table) == set(METRICS)
        for d in table.values():
            assert (d["delta"], d["ci95"], d["p"], d["p_adjusted"]) == (0, [0, 0], 1, 1)
    assert "seed is NOT covered" in report["meta"]["model"]
    assert report["verdicts"] == {"Copy": "practically the same"}
    (warning,) = report["warnings"]
    assert str(copy) in warning and str(files["a"]) in warning
    assert warning in (tmp_path / "report.md").read_text()


def test_the_same_input_gives_the_same_bytes(tmp_path, gt_file, files):
    runs = named_results([f"A={files['a']}", f"B={files['c']}"])
    for name in ("one", "two"):
        write_report(compare(runs, gt_file, ["bbox"], None, 20, 7), tmp_path / name)
    for file in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_empty_results_and_hostile_names(tmp_path, gt_file, files, write):
    name = "<b>|'\"&"
    runs = named_results([f"A={files['a']}", f"{name}={write([])}"])
    write_report(compare(runs, gt_file, ["bbox"], "A", 20, 0), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["runs"][name]["bbox"] == dict.fromkeys(METRICS, 0.0)
    assert_self_contained((tmp_path / "report.html").read_text())


@pytest.fixture
def run_folders(tmp_path, content, gt_file):
    """Two norms, two batch sizes, two seeds; pictures; one failed and one interrupted run."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for image in content["images"]:
        noise = rng.integers(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
        cv2.imwrite(str(images / image["file_name"]), noise)
    for n, (name, batch, seed) in enumerate(
        (name, batch, seed) for name in ("BN", "RefBN") for batch in (1, 2) for seed in (1, 2)
    ):
        folder = tmp_path / "runs" / f"{name}_{batch}_{seed}"
        (folder / "inference").mkdir(parents=True)
        settings = {"name": name, "seed": seed, "norm": name, "ims_per_batch": batch, "iid": 1.0}
        paths = {"gt": str(gt_file), "image_root": str(images)}
        (folder / "run.json").write_text(json.dumps({**settings, **paths, "status": "finished"}))
        found = 0.5 + 0.1 * batch + 0.1 * (name == "RefBN")
        results = generated.detections(content, found, seed=n)
        (folder / "inference/coco_instances_results.json").write_text(json.dumps(results))
        lines = [{"iteration": i, "total_loss": 3 - i / 50} for i in range(0, 100, 20)]
        lines.append({"iteration": 49, "bbox/AP": 8.0})
        lines.append({"iteration": 99, "bbox/AP": 12.0, "segm/AP": float("nan")})
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.json").write_text(log + '{"iterat')
    failed = {
        "name": "SN",
        "seed": 1,
        "ims_per_batch": 1,
        "status": "failed",
        "error": "loss is\nNaN",
    }
    for name, entry in (("SN", failed), ("GN", {"name": "GN", "seed": 1, "status": "running"})):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(entry))
    return tmp_path / "runs"


def test_report_from_run_folders(tmp_path, run_folders):
    output = tmp_path / "out"
    run = command("report", "--runs", run_folders, "--baseline", "BN", "--resamples", 20,
                  "--output", output)  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads((output / "report.json").read_text())
    one, two = "RefBN (1 image a batch, i.i.d.)", "RefBN (2 images a batch, i.i.d.)"
    assert list(report["deltas"]) == [one, two]
    assert report["runs"][two]["compared_with"] == "BN (2 images a batch, i.i.d.)"
    assert [f["name"] for f in report["failed"]] == ["GN", "SN"]
    text = (output / "report.html").read_text()
    page = assert_self_contained(text)
    assert page.tags.count("img") >= 3  # ground truth, baseline, other
    assert "data:image/jpeg;base64," in text
    for words in ("training: loss", "training: box AP", "box AP by images a batch", "loss is NaN"):
        assert words in text
    assert "training: mask AP" not in text


def test_pictures_are_of_the_image_that_differs(tmp_path, gt_file, content, write):
    from refbn_d2.evaluation.pictures import differing_images

    truth = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in content["annotations"]
        if not a["iscrowd"]
    ]
    without = [d for d in truth if d["image_id"] != 7]
    assert len(without) < len(truth)
    runs = named_results([f"A={write(without)}", f"B={write(truth)}"])
    groups = compare(runs, gt_file, ["bbox"], "A", 9, 0).groups
    assert differing_images(groups["A"], groups["B"], "bbox") == [(7, pytest.approx(100))]
    assert differing_images(groups["B"], groups["A"], "bbox") == [(7, pytest.approx(-100))]


BAD_COMMANDS = {
    "one resample": (["--resamples", "1"], "at least 2"),
    "unknown baseline": (["--baseline", "GN"], "no such name; there are BN, RefBN"),
    "name twice": (["--results", "BN={a}", "BN={b}"], "the name BN occurs twice"),
    "file twice": (["--results", "BN={a},{a}"], "given twice as a seed of BN"),
    "copy as a seed": (["--results", "BN={a},{copy}", "X={c}"], "is a copy of"),
    "margin": (["--margin", "0"], "--margin 0.0: must be"),
    "primary": (["--primary", "segm", "--iou-type", "bbox"], "--primary segm"),
    "no cluster": (["--cluster", "video"], "image 1 of"),
    "no name": (["--results", "{a}"], "write NAME=file.json"),
    "no file": (["--results", "BN="], "write NAME=file.json"),
    "missing file": (["--results", "BN={a}", "X=none.json"], "none.json: no such file"),
    "missing truth": (["--gt", "none.json"], "none.json: no such file"),
    "no pictures": (["--images", "none"], "--images none: no such folder"),
    "output is a file": (["--output", "{a}"], "is not a folder"),
    "output is too long": (["--output", "x" * 300], "File name too long; choose a shorter one"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_are_one_line_and_write_nothing(
    case, tmp_path, gt_file, files, capsys, monkeypatch
):
    import runpy

    changes, words = BAD_COMMANDS[case]
    output = tmp_path / "out"
    arguments = {
        "--gt": [gt_file],
        "--results": [f"BN={files['a']}", f"RefBN={files['c']}"],
        "--resamples": ["9"],
        "--output": [output],
    }
    for change in changes:
        if change.startswith("--"):
            key, arguments[change] = change, []
        else:
            arguments[key].append(change.format(**files))
    argv = ["compare.py", "report", *(str(v) for k, vs in arguments.items() for v in (k, *vs))]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "tools" / "compare.py"), run_name="__main__")
    assert status.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not output.exists()


def test_a_mistake_is_one_line_of_a_real_process(tmp_path, gt_file):
    run = command("report", "--gt", gt_file, "--results", "A=none.json", "--output", tmp_path / "x")
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == "error: none.json: no such file\n"


def test_an_older_report_survives_a_failure(tmp_path, gt_file, files, monkeypatch):
    (tmp_path / "report.json").write_text("older")
    comparison = compare(named_results([f"A={files['a']}"]), gt_file, ["bbox"], None, 9, 0)
    original = Path.write_text

    def disk_full(self, *args, **kwargs):
        if self.name == "report.html":
            raise OSError("no space left")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_report(comparison, tmp_path)
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "older"


def test_what_a_killed_report_left_goes(tmp_path, gt_file, files):
    (tmp_path / ".report-half").mkdir()
    (tmp_path / ".report-half/report.md").touch()
    comparison = compare(named_results([f"A={files['a']}"]), gt_file, ["bbox"], None, 9, 0)
    write_report(comparison, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"report.json", "report.md", "report.html", ".lock"}
