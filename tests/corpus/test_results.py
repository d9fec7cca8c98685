"""The files that a report reads. A bad file gives no report, and never an incomplete one."""

import functools
import html.parser
import io
import json
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refbn_d2.evaluation.comparison import compare
from refbn_d2.evaluation.report import as_json, check_output, write_report
from refbn_d2.evaluation.runs import (
    Run,
    common_ground_truth,
    find_runs,
    named_results,
    training_log,
)
from tests.corpus.harness import feed
from tests.corpus.test_annotations import DROP, anything, changed
from tests.evaluation import generated

NAN, INF = math.nan, math.inf
G, R, T = "segmentation", "counts", "bbox"


@pytest.fixture(scope="module")
def truth():
    return generated.ground_truth(images=6, seed=3)


@pytest.fixture(scope="module")
def found(truth):
    return generated.detections(truth)


def report(argv) -> None:
    """As tools/compare.py report."""
    check_output(argv["output"])
    runs = named_results(argv["results"]) if "results" in argv else find_runs(argv["runs"])
    gt = argv.get("gt") or common_ground_truth(runs)
    comparison = compare(runs, gt, ("bbox", "segm"), None, 2, 0)
    as_json(comparison)
    if argv.get("write"):  # takes a second, and cannot meet a bad file any more
        write_report(comparison, argv["output"], argv.get("images"))


@pytest.fixture(scope="module")
def feed_report(tmp_path_factory, truth, found):
    folder = tmp_path_factory.mktemp("report")
    good = folder / "good.json"
    good.write_text(json.dumps(found))
    count = iter(range(10_000))

    def function(kind, text, write=False):
        """``text``: of the file, "results" or "truth"."""
        path, gt, output = folder / "bad.json", folder / "gt.json", folder / f"out{next(count)}"
        gt.write_text(json.dumps(truth))
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if kind == "truth":
            gt, path = path, good
        argv = {
            "results": [f"BN={good}", f"RefBN={path}"],
            "gt": gt,
            "output": output,
            "write": write,
        }
        if path == good:
            argv["results"] = argv["results"][:1]
        line = feed(kind, "bad.json", functools.partial(report, argv))
        written = sorted(p.name for p in output.glob("report.*"))
        assert written == (["report.html", "report.json", "report.md"] if write else [])
        return line

    return function


RESULTS = {
    **{
        f"image {v!r}": ((0, "image_id"), v, "image_id")
        for v in (999, -1, "1", None, 1.5, [1], True, {})
    },
    **{
        f"category {v!r}": ((0, "category_id"), v, f"unknown category_id {v}")
        for v in (999, 0, "1", 0.5, [1], False)
    },
    **{
        f"score {v!r}": ((0, "score"), v, "score")
        for v in (NAN, INF, -INF, -0.1, 1.1, 1e300, "1", None, [1], True)
    },
    "huge score": ((0, "score"), 10**400, "score"),
    **{
        f"box {v!r}": ((0, T), v, "bbox")
        for v in (None, [], [1, 2, 3], [1, 2, 3, 4, 5], "1234", 7, {}, [1, 2, -3, 4], [1, 2, 3, -4])
    },
    **{
        f"box with {v!r}": ((0, T, 1), v, "bbox") for v in (NAN, INF, None, "1", [1], True, 10**400)
    },
    **{
        f"mask {v!r}": ((0, G), v, "entry 0: segmentation is not a compressed RLE")
        for v in (None, [], "x", 3, {}, [[1, 2, 3, 4, 5, 6]], {"size": 3})
    },
    **{
        f"runs {v!r}": ((0, G, R), v, f"entry 0: {word}")
        for v, word in (
            (None, "segmentation is not a compressed RLE"),
            (3, "segmentation is not a compressed RLE"),
            ([1, 2], "segmentation is not a compressed RLE"),
            ("", "RLE without counts"),
            ("~", "RLE counts have a character"),
            ("é", "RLE counts have a character"),
            ("o", "RLE counts are cut off"),
            ("0" * 50, "RLE covers 0 pixels, its image has 102400"),
            ("0" * 10**5, "RLE covers 0 pixels, its image has 102400"),
        )
    },
    **{
        f"size {v!r}": ((0, G, "size"), v, "RLE of size")
        for v in (
            None,
            [],
            [320],
            [320, 321],
            [-320, -320],
            [1e9, 1e9],
            "320",
            [10**9, 10**9],
            [NAN, 1],
        )
    },
    **{
        f"without {k}": ((0, k), DROP, f"entry 0: has no {k}")
        for k in ("image_id", "category_id", "score", G)
    },
    "category is nothing": ((0, "category_id"), None, "entry 0: has no category_id"),
    "entry is nothing": ((0,), None, "entry 0"),
    "entry is a list": ((0,), [1], "entry 0"),
    "mask without a box": ((0, T), DROP, "entry 0: has no bbox, but others have"),
    "key that is not COCO's": ((0, "extra"), [1], None),
}


@pytest.mark.parametrize("case", RESULTS)
def test_results(case, feed_report, found):
    path, value, word = RESULTS[case]
    line = feed_report("results", json.dumps(changed(found, path, value)))
    assert line is None if word is None else word in line


# Name -> (content of the file, a word of the error; if it is JSON: of results, truth and run.json).
TEXTS = {
    "empty": ("", "the file is empty"),
    "blank": ("\n", "the file is empty"),
    "dict": (
        "{}",
        ("must be a list, this is a dict", "has no list of images", "a run needs a name"),
    ),
    "number": ("3", ("must be a list, this is a int", "but a int", "is not a run, but a int")),
    "nothing": ("null", ("this is a NoneType", "but a NoneType", "is not a run, but a NoneType")),
    "text": ('"x"', ("must be a list, this is a str", "but a str", "is not a run, but a str")),
    "numbers": ("[1, 2]", ("entry 0: is a int", "no COCO ground truth, but a list", "not a run")),
    "lists": ("[[]]", ("entry 0: is a list", "no COCO ground truth, but a list", "not a run")),
    "deep": ("[" * 100_000, "not JSON, or cut off (maximum recursion depth"),
    "deep and closed": ("[" * 100_000 + "]" * 100_000, "cut off (maximum recursion depth"),
    "not JSON": ("AP = 37", "not JSON, or cut off (Expecting value: line 1 column 1"),
    "two": ("[][]", "not JSON, or cut off (Extra data: line 1 column 3"),
    "comma": ("[{}, ]", "not JSON, or cut off ("),  # the rest depends on the version of Python
    "digits without end": ("[" + "9" * 5000 + "]", "value has 5000 digits"),
    "binary": (bytes(range(256)), "cannot be read ('utf-8' codec"),
    "zeros": (bytes(100), "not JSON, or cut off (Expecting value: line 1 column 1"),
    "UTF-16": ("[]".encode("utf-16"), "cannot be read ('utf-8' codec"),
    "byte order mark": (b"\xef\xbb\xbf[]", "Unexpected UTF-8 BOM"),
    "pickle": (b"\x80\x04cos\nmkdir\n(Vran\ntR.", "cannot be read ('utf-8' codec"),
}


def text_and_word(case, kind):
    text, word = TEXTS[case]
    return text, word if isinstance(word, str) else word[("results", "truth", "run").index(kind)]


@pytest.mark.parametrize("kind", ["results", "truth"])
@pytest.mark.parametrize("case", TEXTS)
def test_texts(case, kind, feed_report):
    text, word = text_and_word(case, kind)
    assert word in feed_report(kind, text)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["results", "truth"])
def test_truncated(kind, share, feed_report, found, truth):
    text = json.dumps(found if kind == "results" else truth)
    assert "cut off" in feed_report(kind, text[: int(len(text) * share)])


def test_the_unchanged_files_work(feed_report, found, truth):
    assert feed_report("results", json.dumps(found), write=True) is None
    assert feed_report("results", "[]", write=True) is None
    assert feed_report("truth", json.dumps(truth)) is None


A, P, C = "annotations", "images", "categories"
TRUTHS = {
    **{
        f"{k} {v!r}": ((k,), v, f"it has no list of {k}")
        for k in (A, P, C)
        for v in (None, {}, "x")
    },
    **{
        f"{k} {v!r}": ((k,), v, f"{k}[0] is {v[0]!r}, no object with an id")
        for k in (A, P, C)
        for v in ([1], [None], [[]])
    },
    **{f"{k} without an id": ((k,), [{}], f"{k}[0] has no integer id") for k in (A, P, C)},
    **{
        f"{k} id {v!r}": ((k, 0, "id"), v, f"{k}[0] has no integer id, but {v!r}, a {type}")
        for k in (A, P, C)
        for v, type in (("1", "str"), (1.5, "float"), ([1], "list"), (True, "bool"))
    },
    **{f"{k} id is nothing": ((k, 0, "id"), None, f"{k}[0] has no integer id") for k in (A, P, C)},
    **{f"{k} id twice": ((k, 0, "id"), 2, f"id 2 occurs twice in {k}") for k in (A, P, C)},
    **{
        f"height {v!r}": ((P, 0, "height"), v, f"image 1: height {v!r:.40} is not a whole number")
        for v in (0, -1, 1.5, "9", NAN, True, 10**400)
    },
    "height is nothing": ((P, 0, "height"), None, "image 1 has no height"),
    "width is left out": ((P, 0, "width"), DROP, "image 1 has no width"),
    **{
        f"{word} {v!r}": ((A, 0, f"{word}_id"), v, f"annotation 1 is of unknown {word} {v}")
        for word in ("image", "category")
        for v in (99, "1", [1], {}, True)
    },
    **{
        f"{key} is nothing": ((A, 0, key), None, f"annotation 1 has no {key}")
        for key in ("image_id", "category_id")
    },
    **{
        f"box {v!r}": ((A, 0, T), v, "bbox")
        for v in (None, [], [1, 2, 3], "1", [NAN] * 4, [1, 2, -1, 3])
    },
    **{f"area {v!r}": ((A, 0, "area"), v, "area") for v in (None, NAN, -1, "1", [1], INF)},
    **{f"crowd {v!r}": ((A, 0, "iscrowd"), v, "iscrowd") for v in ("1", 2, -1, [0], {}, NAN)},
    **{
        f"mask {v!r}": ((A, 0, G), v, "annotation 1 has no segmentation; leave segm out")
        for v in (None, [], {})
    },
    **{
        f"mask {v!r}": ((A, 0, G), v, f"annotation 1: {word}")
        for v, word in (
            ("x", "segmentation 'x' is neither a list of polygons nor"),
            (5, "segmentation 5 is neither a list of polygons nor"),
            ([[]], "polygon [] is not x, y, x, y"),
            ([1, 2], "segmentation [1, 2] is not a list of polygons"),
            ([[1, NAN] * 3], "polygon [1, nan, 1, nan, 1, nan] is not all finite"),
        )
    },
    **{
        f"runs {v!r}": ((A, 0, G, R), v, f"annotation 1: {word}")
        for v, word in (
            (None, "segmentation {'size': [320, 320], 'counts': None} is neither"),
            (5, "segmentation {'size': [320, 320], 'counts': 5} is neither"),
            ("", "RLE without counts"),
            ("~~", "RLE counts have a character"),
            ([1], "RLE counts [1] do not add up to the image's 102400"),
            ([-1, 102401], "RLE counts [-1, 102401] do not add up"),
            (["a"], "RLE counts ['a'] do not add up"),
        )
    },
    "category without a name": ((C, 0, "name"), DROP, None),
    "category whose name is a list": ((C, 0, "name"), [1], "is not text"),
    "name of an image is a number": ((P, 0, "file_name"), 3, "is not text"),
}


@pytest.mark.parametrize("case", TRUTHS)
def test_ground_truth(case, feed_report, truth):
    path, value, word = TRUTHS[case]
    line = feed_report("truth", json.dumps(changed(truth, path, value)))
    assert line is None if word is None else word in line


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(place=st.sampled_from([v[0] for v in RESULTS.values()]), value=anything)
def test_random_results(feed_report, found, place, value):
    feed_report("results", json.dumps(changed(found, place, value)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(place=st.sampled_from([v[0] for v in TRUTHS.values()]), value=anything)
def test_random_ground_truth(feed_report, truth, place, value):
    feed_report("truth", json.dumps(changed(truth, place, value)))


# Keys of run.json; "finished" where nothing else is said.
RUNS = {
    **{f"name {v!r}": ({"name": v}, f"name {v!r} is not text") for v in (3, [], {}, True)},
    **{f"without a name, {v!r}": ({"name": v}, "a run needs a name") for v in (None, "")},
    **{
        f"seed {v!r}": ({"seed": v}, f"seed {v!r} is not a whole number")
        for v in ("1", 1.5, [], True, NAN)
    },
    "without a seed": ({"seed": None}, "a run needs a seed"),
    **{
        f"batch {v!r}": ({"ims_per_batch": v}, f"ims_per_batch {v!r} is not a whole number")
        for v in ("2", 1.5, [], True)
    },
    **{
        f"grouping {v!r}": ({"grouping": v}, f"grouping {v!r} is not a finite number")
        for v in ("0", [], True, NAN, INF)
    },
    **{
        f"grouping {v!r}": ({"grouping": v}, f"grouping {v!r} is not within 0 and 1")
        for v in (-0.5, 2)
    },
    **{
        f"iid {v!r}": ({"grouping": None, "iid": v}, f"iid {v!r} is not a finite number")
        for v in ("yes", [], NAN)
    },
    **{
        f"iid {v!r}": ({"grouping": None, "iid": v}, f"iid {v!r} is not within 0 and 1")
        for v in (3, -1)
    },
    **{f"gt {v!r}": ({"gt": v}, f"gt {v!r} is not text") for v in (3, [], {}, True)},
    **{
        f"gt {v!r}": ({"gt": v}, "no ground truth; give the right one with --gt")
        for v in ("", None)
    },
    "gt 'nowhere.json'": ({"gt": "nowhere.json"}, "nowhere.json: no such file"),
    "gt with a zero byte": ({"gt": "a\0b"}, "a\0b: no such file"),
    **{
        f"images {v!r}": ({"image_root": v}, f"image_root {v!r} is not text")
        for v in (3, [], {}, True)
    },
    **{f"status {v!r}": ({"status": v}, "has finished") for v in (None, "failed", 3, [], {})},
}


def write_run(folder, truth, found, **changes):
    (folder / "inference").mkdir(parents=True)
    (folder.parent / "gt.json").write_text(json.dumps(truth))
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(found))
    run = {"name": "BN", "seed": 1, "status": "finished", "gt": str(folder.parent / "gt.json")}
    (folder / "run.json").write_text(json.dumps({**run, **changes}))


def feed_runs(tmp_path, name="run.json"):
    argv = {"runs": tmp_path, "output": tmp_path / "report"}
    line = feed("run folders", name, functools.partial(report, argv))
    assert not (tmp_path / "report").exists()
    return line


@pytest.mark.parametrize("case", RUNS)
def test_run_json(case, tmp_path, truth, found):
    changes, word = RUNS[case]
    write_run(tmp_path / "run", truth, found, **changes)
    assert word in feed_runs(tmp_path, "" if case.startswith(("gt", "status")) else "run.json")


@pytest.mark.parametrize("case", TEXTS)
def test_run_json_of_something_else(case, tmp_path, truth, found):
    write_run(tmp_path / "run", truth, found)
    text, word = text_and_word(case, "run")
    (tmp_path / "run/run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert word in feed_runs(tmp_path)


def test_run_folders_as_a_whole(tmp_path, truth, found):
    assert "has a run.json" in feed_runs(tmp_path, str(tmp_path))
    write_run(tmp_path / "run", truth, found)
    write_run(tmp_path / "copy", truth, found)
    assert "are both BN with seed 1" in feed_runs(tmp_path, str(tmp_path))
    (tmp_path / "copy/inference/coco_instances_results.json").unlink()
    (tmp_path / "copy/run.json").write_text('{"name": "GN", "seed": 1, "status": "finished"}')
    assert feed_runs(tmp_path, "") is None  # reported as a run without results


METRICS = [
    "",
    "{",
    "null",
    "[]",
    "3",
    '{"iteration": "x"}',
    '{"iteration": null, "total_loss": 1}',
    '{"iteration": 1e999, "total_loss": 1}',
    '{"iteration": [1], "total_loss": 1}',
    '{"iteration": 3, "total_loss": "low"}',
    '{"iteration": 3, "total_loss": NaN}',
    '{"iteration": 3, "total_loss": [1]}',
    '{"iteration": 3, "total_loss": true}',
    '{"iteration": ' + "9" * 5000 + "}",
    "[" * 100_000,
    "\x00\x00",
]


@pytest.mark.parametrize("line", METRICS, ids=range(len(METRICS)))
def test_a_damaged_line_of_metrics_is_left_out(line, tmp_path):
    good = '{"iteration": 19, "total_loss": 1.5}'
    path = tmp_path / "metrics.json"
    path.write_text(f"{good}\n{line}\n{good}\n")
    curves = {}
    assert feed("metrics", "", lambda: curves.update(training_log(path))) is None
    assert curves["total_loss"] == [[19, 1.5], [19, 1.5]]


def encoded(kind, width=generated.SIDE, height=generated.SIDE):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 320 320\n%%EndComments\nshowpage\n%%EOF\n"
# Content of every image, and a word of the note that stands in the pictures' place.
PICTURES = {
    **{kind: (encoded(kind), None) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")},
    "missing": (None, "no such file"),
    "empty": (b"", "cannot be read"),
    "text": (b"404 not found", "cannot be read"),
    "EPS": (EPS, "cannot be read"),
    "another size": (encoded("PNG", width=50), "320 x 50 pixels"),
    "bomb": (png_header(60_000, 60_000), "cannot be read"),
    "large": (png_header(12_000, 12_000), "12000 x 12000 pixels"),
    "no pixels": (png_header(320, 320), "cannot be read"),
    **{
        f"cut off {kind}": (encoded(kind)[:2000], "cannot be read")
        for kind in ("JPEG", "PNG", "TIFF", "WEBP")
    },
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(case, tmp_path, truth, found, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    content, word = PICTURES[case]
    for image in truth["images"] if content is not None else ():
        (tmp_path / image["file_name"]).write_bytes(content)
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "a.json").write_text(json.dumps(found))
    (tmp_path / "b.json").write_text(json.dumps(found[::2]))
    argv = {
        "results": [f"BN={tmp_path / 'a.json'}", f"RefBN={tmp_path / 'b.json'}"],
        "gt": tmp_path / "gt.json", "output": tmp_path / "out", "write": True, "images": tmp_path,
    }  # fmt: skip
    assert feed("pictures", "", functools.partial(report, argv)) is None
    notes = json.loads((tmp_path / "out/report.json").read_text())["notes"]
    page = (tmp_path / "out/report.html").read_text()
    if word is None:
        assert notes == [] and "data:image/jpeg;base64," in page
    else:
        assert notes and all(word in note and ".png" in note for note in notes)
        assert "data:image/" not in page and word in page


HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
HOSTILE = {
    "HTML": HTML, "attribute": '" onload=alert(1) x="', "CDATA": "]]><script>alert(1)</script>",
    "TeX": r"a $\foo$ b", "half TeX": "x$_$", "rich": "BN [/x]", "rich style": "[red]BN[/red]",
    "underscore": "_hidden", "lines": "a\nb\r\n# c", "control": "a\x00\x1b]0;x\x07b",
    "surrogate": "\ud800x", "long": "x" * 5000, "right to left": "\u202eabc", "pipe": "a|b",
    "backslash": "a\\", "empty": "", "emoji": "🐶", "comment": "<!--", "braces": "{{ 7 * 7 }}",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_names(case, tmp_path, truth, found):
    """As the name of a norm, of a protocol, of a category and as the end of a failed run."""
    name = HOSTILE[case]
    named = json.loads(json.dumps(truth))
    named["categories"][0]["name"] = name
    (tmp_path / "gt.json").write_text(json.dumps(named))
    (tmp_path / "a.json").write_text(json.dumps(found))
    (tmp_path / "b.json").write_text(json.dumps(found[::2]))
    runs = [
        Run("BN", 1, tmp_path / "a.json", protocol=name),
        Run(name or "none", 1, tmp_path / "b.json", protocol=name),
        Run("X", 1, tmp_path / "x.json", error=f"it ended: {name}"),
    ]
    comparison = compare(runs, tmp_path / "gt.json", ("bbox", "segm"), None, 2, 0)
    write_report(comparison, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    for raw in ("<script", "<img src=x", "\x1b", "\u202e"):
        assert raw not in page and raw not in text
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: events.extend(
        key for key, _ in attributes if key.startswith("on")
    )
    events: list = []
    parser.feed(page)
    assert events == []
    assert case != "braces" or name in page
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["failed"][0]["error"] == f"it ended: {name}"
    assert name in content["categories"]["BN"]["bbox"]
