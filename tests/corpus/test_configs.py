"""Config and matrix files: YAML is read as data, and expands to no more than a fixed size."""

import functools

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from refbn_d2.config import load_config
from refbn_d2.experiments.matrix import load_matrix
from tests.corpus.harness import feed

# Creates the folder "ran" if it is executed in any way.
EVIL = [
    "!!python/object/apply:os.mkdir ['ran']",
    "!!python/object/apply:os.system ['mkdir ran']",
    "!!python/object/new:os.mkdir ['ran']",
    "!!python/object/apply:subprocess.check_call [['mkdir', 'ran']]",
    '!!python/object/apply:builtins.eval [\'__import__("os").mkdir("ran")\']',
    "!!python/object/apply:builtins.exec ['import os; os.mkdir(\"ran\")']",
    "!!python/object/apply:pathlib.Path.mkdir [!!python/object/apply:pathlib.Path ['ran']]",
    "!!python/object/new:type {args: [x, [], {}], listitems: !!python/name:os.mkdir}",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!python/bytes eA==",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['ran']",
    "!unknown x",
    "!!nosuch x",
]


def laughs(value: str, depth: int) -> str:
    """Aliases of aliases: ten lines that stand for 10 ** depth values."""
    lines = [f"- &a0 {value}"]
    lines += [f"- &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, depth)]
    return "\n".join(lines)


def indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def laughing_keys(depth: int) -> str:
    lines = ["A0: &a0 {X: 1}"]
    for k in range(1, depth):
        lines.append(f"A{k}: &a{k} {{{', '.join(f'K{n}: *a{k - 1}' for n in range(10))}}}")
    return "\n".join(lines)


# Name -> (content, a word of the error; None: loads as documented).
CONFIGS = {
    **{
        f"evil value {n}": (f"MODEL:\n  WEIGHTS: {e}\n", "not plain YAML")
        for n, e in enumerate(EVIL)
    },
    **{f"evil key {n}": (f"? {e}\n: 1\n", "not plain YAML") for n, e in enumerate(EVIL[:5])},
    **{f"evil document {n}": (f"{e}\n", "not plain YAML") for n, e in enumerate(EVIL[:5])},
    "laughs": (laughs("lol", 12), "aliases expand"),
    "laughs as a value": ("DATASETS:\n  TRAIN:\n" + indented(laughs("lol", 12)), "aliases expand"),
    "laughing keys": (laughing_keys(12), "aliases expand"),
    "value that contains itself": ("DATASETS:\n  TRAIN: &a [*a]\n", "aliases expand"),
    "node that contains itself": ("MODEL: &a\n  X: *a\n", "aliases expand"),
    "aliases that are fine": (
        "SOLVER:\n  STEPS: &s [30, 40]\nTEST:\n  AUG: {MIN_SIZES: *s}\n",
        None,
    ),
    "deep list": ("DATASETS: " + "[" * 5000, "nested too deeply"),
    "deep closed list": ("DATASETS: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep mapping": ("\n".join(" " * k + "A:" for k in range(1200)), "nested too deeply"),
    "deep literal": ("SEED: '" + "(" * 5000 + ")" * 5000 + "'", "config key: SEED"),
    "long chain of signs": ("SEED: '" + "-" * 900_000 + "1'", "SEED is a text of more than"),
    "long sum": ("SEED: '" + "1+" * 20_000 + "1'", "SEED is a text of more than"),
    "large file": ("SEED: 1\n#" + "x" * 2_000_000, "characters"),
    "many keys": ("\n".join(f"K{k}: 1" for k in range(150_000)), "characters"),
    "empty": ("", "NoneType"),
    "only a comment": ("# nothing\n", "NoneType"),
    "text": ("MODEL", "a str"),
    "number": ("3", "a int"),
    "list": ("- SEED: 1", "a list"),
    "two documents": ("SEED: 1\n---\nSEED: 2\n", "another document"),
    "cut off": ("MODEL: [1, 2\n", "not plain YAML"),
    "cut off in a text": ("MODEL: {WEIGHTS: 'abc\n", "not plain YAML"),
    "tab": ("MODEL:\n\tWEIGHTS: x\n", "not plain YAML"),
    "unknown alias": ("SEED: *nowhere\n", "undefined alias"),
    "unhashable key": ("? [1, 2]\n: 3\n", "unhashable"),
    "number as key": ("1: 2\n", "1 is no key"),
    "null as key": ("null: 2\n", "None is no key"),
    "number as key in a section": ("MODEL: {3: 2}\n", "3 in MODEL is no key"),
    "merge with a text": ("<<: SEED\n", "not plain YAML"),
    "not UTF-8": (b"MODEL:\n  WEIGHTS: \xff\xfe\xfa\n", "utf-8"),
    "UTF-16": ("SEED: 1".encode("utf-16"), "utf-8"),
    "zero bytes": (b"SEED: 1\x00\x00\n", "not plain YAML"),
    "binary": (bytes(range(256)) * 4, "utf-8"),
    "JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "utf-8"),
    "impossible date": ("SEED: 2001-99-99\n", "not plain YAML"),
    "date": ("SEED: 2001-01-01\n", "SEED"),
    "number of 9,999 digits": ("SEED: " + "9" * 9999, "value has 9999 digits"),
    "number of 9,999 hexadecimal digits": ("SEED: 0x" + "f" * 9999, "digits"),
    "sexagesimal number": ("SEED: " + ":".join(["59"] * 300_000), "SEED"),
    "tagged sexagesimal number": ("SEED: !!int " + ":".join(["59"] * 300_000), "not a number"),
    "base on the web": ("_BASE_: http://localhost:9/base.yaml\n", "is not on this machine"),
    "base in a bucket": ("_BASE_: [s3://x/base.yaml]\n", "is not on this machine"),
    "dot as number": ("SEED: ._\n", "with values (-1 vs. ._) for config key: SEED"),
    "set": ("DATASETS: {TRAIN: !!set {a, b}}\n", "Key DATASETS.TRAIN with value <class 'set'>"),
    "binary tag": ("SEED: !!binary aGVsbG8=\n", "Key SEED with value <class 'bytes'>"),
    "base that is missing": ("_BASE_: nowhere.yaml\n", "nowhere.yaml: no such file"),
    "base is itself": ("_BASE_: bad.yaml\n", "back to itself"),
    "bases are itself": ("_BASE_: [bad.yaml, bad.yaml]\n", "back to itself"),
    "base is a number": ("_BASE_: 3\n", "_BASE_ is 3"),
    "base is a mapping": ("_BASE_: {a: 1}\n", "_BASE_ is"),
    "base is nothing": ("_BASE_:\n", "_BASE_ is None"),
    "base has no end": ("_BASE_: /dev/zero\n", "/dev/zero: no such file"),
    "base is a folder": ("_BASE_: .\n", "no such file"),
    "base of a user who is not there": ("_BASE_: ~nobody-here/x.yaml\n", "no such file"),
    "section is a number": ("MODEL: 3\n", "MODEL is 3: it is a section"),
    "section is a list": ("MODEL: [1]\n", "MODEL is [1]: it is a section"),
    "section is nothing": ("MODEL:\n", "MODEL is empty: it is a section"),
    "value is a section": ("SEED: {A: 1}\n", "SEED is a section: it takes a value such as -1"),
    "unknown key": ("MODEL:\n  REFBM:\n    PSEUDO_COUNT: 1.0\n", "did you mean MODEL.REFBN"),
    "key of a method": ("MODEL:\n  __class__: 1\n", "__class__"),
    "key of the class": ("__immutable__: true\n", "__immutable__"),
    "text for a number": ("SEED: many\n", "SEED"),
    "list for a number": ("SEED: [1]\n", "SEED"),
    "text for a list": ("DATASETS: {TRAIN: 3}\n", "TRAIN"),
    "NaN": ("MODEL: {REFBN: {PSEUDO_COUNT: .nan}}\n", "PSEUDO_COUNT"),
    "infinity": ("MODEL: {REFBN: {PSEUDO_COUNT: .inf}}\n", "PSEUDO_COUNT"),
    "negative": ("MODEL: {REFBN: {PSEUDO_COUNT: -1.0}}\n", "PSEUDO_COUNT"),
    "negative seed": ("SEED: -7\n", "SEED"),
    "seed beyond 32 bits": ("SEED: 99999999999\n", "SEED"),
    "grouping beyond 1": ("DATALOADER: {GROUPING_STRENGTH: 2.0}\n", "GROUPING_STRENGTH"),
    "version of the future": ("VERSION: 99\n", "v99"),
    "version as text": ("VERSION: new\n", "VERSION is 'new': use 2"),
    "code in a text": ("MODEL:\n  WEIGHTS: \"__import__('os').mkdir('ran')\"\n", None),
}

GOOD_MATRIX = {"DETECTOR": "base.yaml", "NORMS": ["BN", "RefBN"]}


def matrix(**changes) -> str:
    merged = {**GOOD_MATRIX, **changes}
    return "\n".join(f"{key}: {value}" for key, value in merged.items() if value is not None)


MATRICES = {
    "good": (matrix(), None),
    **{
        f"evil {n}": (matrix(OPTS=f"[SEED, {e}]"), "not plain YAML") for n, e in enumerate(EVIL[:8])
    },
    "laughs": (laughs("1", 12), "aliases expand"),
    "empty": ("", "DETECTOR and NORMS"),
    "text": ("BN", "DETECTOR and NORMS"),
    "cut off": ("NORMS: [BN", "not plain YAML"),
    "binary": (b"\xff\xfe\x00", "utf-8"),
    "without a detector": (matrix(DETECTOR=None), "DETECTOR and NORMS"),
    "unknown key": (matrix(NORM="BN"), "DETECTOR and NORMS"),
    "detector is a number": (matrix(DETECTOR=3), "DETECTOR is 3"),
    "detector is a list": (matrix(DETECTOR="[a, b]"), "DETECTOR is"),
    "detector is missing": (matrix(DETECTOR="x_{norm}.yaml"), "does not exist"),
    "detector asks for an attribute": (matrix(DETECTOR='"{norm.__class__}"'), "does not exist"),
    "detector with an open brace": (matrix(DETECTOR='"{"'), "does not exist"),
    "classifier is missing": (matrix(CLASSIFIER="x_{norm}.yaml"), "does not exist"),
    "norms are a text": (matrix(NORMS="BN"), "NORMS is 'BN'"),
    "norms are a number": (matrix(NORMS=3), "NORMS is 3"),
    "norms are nothing": (matrix(NORMS="null"), "NORMS is None"),
    "norm is a number": (matrix(NORMS="[3]"), "NORMS is [3]"),
    "norm without a type": (matrix(NORMS="[{name: x}]"), "NORMS is"),
    "norm whose type is a list": (matrix(NORMS="[{norm: [BN]}]"), "NORMS is"),
    "name is a number": (matrix(NORMS="[{norm: BN, name: 3}]"), "NORMS is"),
    "pretrained is a mapping": (matrix(NORMS="[{norm: BN, pretrained: {}}]"), "NORMS is"),
    "seeds are a number": (matrix(SEEDS=3), "SEEDS is 3"),
    "seeds are text": (matrix(SEEDS="[a]"), "SEEDS is"),
    "seed is a truth value": (matrix(SEEDS="[true]"), "SEEDS is"),
    "seed is negative": (matrix(SEEDS="[-1]"), "SEEDS is"),
    "batch of none": (matrix(IMS_PER_BATCH="[0]"), "IMS_PER_BATCH is"),
    "negative batch": (matrix(IMS_PER_BATCH="[-2]"), "IMS_PER_BATCH is"),
    "grouping beyond 1": (matrix(GROUPING_STRENGTH="[1.5]"), "GROUPING_STRENGTH is"),
    "grouping is NaN": (matrix(GROUPING_STRENGTH="[.nan]"), "GROUPING_STRENGTH is"),
    "options are a mapping": (matrix(OPTS="{SEED: 1}"), "options are"),
    "options are odd": (matrix(OPTS="[SEED]"), "SEED"),
    "option that is unknown": (matrix(OPTS="[SEDE, 1]"), "SEDE"),
    "options write elsewhere": (matrix(OPTS="[OUTPUT_DIR, elsewhere]"), "use --output"),
    "billions of runs": (
        matrix(SEEDS=list(range(3000)), IMS_PER_BATCH=list(range(1, 3000))),
        "runs",
    ),
    "two of the same name": (matrix(NORMS="[BN, BN]"), "same protocol, name"),
}


def write(folder, content, name="bad.yaml"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, word = CONFIGS[case]
    line = feed("configs", "bad.yaml", functools.partial(load_config, write(tmp_path, content)))
    assert line is None if word is None else word in line
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("evil", EVIL[:5])
def test_evil_base(evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, f"MODEL:\n  WEIGHTS: {evil}\n")
    leaf = write(tmp_path, "_BASE_: bad.yaml\nSEED: 1\n", "leaf.yaml")
    assert "not plain YAML" in feed("configs", "bad.yaml", functools.partial(load_config, leaf))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", MATRICES)
def test_matrices(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, f"_BASE_: {tiny.CONFIG}\n", "base.yaml")
    content, word = MATRICES[case]
    path = write(tmp_path, content)
    # The last few are mistakes in options, which the configs find.
    name = "" if case in ("options are odd", "option that is unknown") else "bad.yaml"
    line = feed("matrices", name, functools.partial(load_matrix, path))
    assert line is None if word is None else word in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "../../x", ".hidden", "a/../../b"])
def test_a_name_in_a_matrix_is_no_path(name, tmp_path):
    write(tmp_path, f"_BASE_: {tiny.CONFIG}\n", "base.yaml")
    norms = f"[{{norm: BN, name: '{name}'}}]"
    (cell,) = load_matrix(write(tmp_path, matrix(NORMS=norms)))
    for folder, depth in ((cell.folder, 3), (cell.classifier_folder, 3)):
        whole = (tmp_path / "output" / folder).resolve()
        assert len(whole.relative_to(tmp_path / "output").parts) == depth


VALID = "_BASE_: base.yaml\nSEED: 3\nMODEL:\n  RESNETS: {NORM: RefBN}\nSOLVER: {STEPS: [30, 40]}\n"


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(VALID)),
            st.integers(0, 5),
            st.text("&*!|>%@`'\"{}[]:?-#, \n\t\x00~.1eé", max_size=4),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_config_with_random_damage(tmp_path_factory, damage):
    content = VALID
    for place, length, text in damage:
        content = content[:place] + text + content[place + length :]
    folder = tmp_path_factory.mktemp("yaml")
    write(folder, "SEED: 1\n", "base.yaml")
    path = write(folder, content)
    feed("configs", "", functools.partial(load_config, path))
