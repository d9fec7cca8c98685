"""Adds a data set in COCO format under a name, and shows the content of a data set.

    refbn-d2 data add cells --json train.json --images train --val-json val.json --val-images val
    refbn-d2 data show cells --output cells.html

``add`` checks the files and writes NAME.yaml: a config with DATASETS.REGISTER and the keys that
follow from the data. Train with this config, or use it as a _BASE_. ``show`` also finds NAME.yaml.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..config import load_config
from ..config_files import find_config
from ..data.sets import DataSet, load_test_set
from ..errors import UserError, one_line_errors
from ..evaluation.printable import printable
from ..io.atomic import atomic_write, write_errors

__all__ = ["main"]


@one_line_errors
def main() -> None:
    """Entry point of ``refbn-d2 data``."""
    args = _arguments()
    args.run(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="add|show")
    add = commands.add_parser("add", help="write NAME.yaml for files in COCO format")
    add.add_argument("name", help="name of the data set; its parts are NAME_train and NAME_val")
    add.add_argument("--json", type=Path, required=True, help="training annotations")
    add.add_argument("--images", type=Path, required=True, help="folder of the training images")
    add.add_argument("--val-json", type=Path, help="validation annotations")
    add.add_argument("--val-images", type=Path, help="folder of the validation images")
    add.add_argument(
        "--base",
        default="Pretrained/mask_rcnn_lite0_fpn.yaml",
        help='config of the model, a path or a shipped name (default: %(default)s); "" for none',
    )
    add.add_argument("--output", type=Path, help="file to write; default: NAME.yaml")
    add.set_defaults(run=_add)
    show = commands.add_parser("show", help="write a page about a data set")
    show.add_argument("name", help="name of a registered or added data set, or a config file")
    show.add_argument("--output", type=Path, required=True, help="page to write, .html")
    show.add_argument("--samples", type=int, default=12, help="number of images to draw")
    show.set_defaults(run=_show)
    return parser.parse_args()


def _add(args: argparse.Namespace) -> None:
    if (args.val_json is None) != (args.val_images is None):
        raise UserError("--val-json and --val-images belong together: give both or none")
    if "/" in args.name:
        raise UserError(f"{args.name}: the name has a slash; name another folder with --output")
    output = args.output or Path(f"{args.name}.yaml")
    if os.path.lexists(output):
        raise UserError(f"{output} exists already: remove it, or name another file with --output")
    parts = {f"{args.name}_train": (args.json, args.images)}
    if args.val_json:
        parts[f"{args.name}_val"] = args.val_json, args.val_images
    for json_file, images in parts.values():
        if not json_file.is_file():
            raise UserError(f"{json_file}: no such file")
        if not images.is_dir():
            raise UserError(f"{images}: no such folder")
    folder = output.absolute().parent
    register = {
        name: {"JSON": os.path.relpath(j, folder), "IMAGES": os.path.relpath(i, folder)}
        for name, (j, i) in parts.items()
    }
    datasets: Dict[str, Any] = {"REGISTER": register, "TRAIN": [f"{args.name}_train"]}
    datasets["TEST"] = list(parts)[1:]
    content: Dict[str, Any] = {"VERSION": 2, "DATASETS": datasets}
    if args.base:
        content = {"_BASE_": os.path.abspath(find_config(args.base)), **content}
    _write(output, content)
    try:
        cfg = load_config(str(output))
        content.update(_keys_of(cfg, list(parts)))
        summaries = [line for name in parts for line in _summary(cfg, name)]
        _write(output, content)
    except BaseException:
        output.unlink()
        raise
    print("\n".join(summaries))
    print(printable(f"wrote {output}; train with: refbn-d2 train --config-file {output}"))


def _write(path: Path, content: Dict[str, Any]) -> None:
    with write_errors(path, "name another file with --output"), atomic_write(str(path)) as f:
        f.write("# Written by refbn-d2 data add.\n")
        yaml.safe_dump(content, f, sort_keys=False)


def _keys_of(cfg: CfgNode, names: Sequence[str]) -> Dict[str, Any]:
    """Returns the config keys that follow from the data.

    Raises:
        UserError: if the parts have different classes.
    """
    sets = [load_test_set(cfg, name) for name in names]
    classes = [MetadataCatalog.get(name).thing_classes for name in names]
    for name, other in zip(names[1:], classes[1:]):
        if other != classes[0]:
            first, file = (cfg.DATASETS.REGISTER[n].JSON for n in (names[0], name))
            differing = sorted(set(other) ^ set(classes[0])) or ["their order"]
            raise UserError(
                f"the categories of {file} ({len(other)}) are not those of {first} "
                f"({len(classes[0])}): {', '.join(differing[:5])}"
            )
    number = {"NUM_CLASSES": len(classes[0])}
    found = sets[0].contents
    return {
        "MODEL": {
            "MASK_ON": not any(data.contents.without_mask for data in sets),
            "ROI_HEADS": number,
            "RETINANET": dict(number),
        },
        "INPUT": {"MASK_FORMAT": "bitmask" if found.with_rle else "polygon"},
    }


def _files_exist(data: DataSet, name: str) -> None:
    missing = [d["file_name"] for d in data.dicts if not os.path.isfile(d["file_name"])]
    if missing:
        raise UserError(f"{name}: {len(missing)} images do not exist, the first is {missing[0]}")


def _counts(name: str, data: DataSet) -> Tuple[Counter, Counter, List[int], List[float]]:
    """Counts objects and measures boxes.

    Returns:
        The number of objects of each class, the number of images of each group, the number of
        objects in each image, and the square root of each box's area.
    """
    classes = MetadataCatalog.get(name).thing_classes
    per_class: Counter = Counter({c: 0 for c in classes})
    groups: Counter = Counter()
    per_image, sizes = [], []
    for d in data.dicts:
        objects = [a for a in d["annotations"] if not a.get("iscrowd", 0)]
        per_image.append(len(objects))
        per_class.update(classes[a["category_id"]] for a in objects)
        for a in objects:
            _, _, width, height = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS)
            sizes.append((width * height) ** 0.5)
        if "group" in d:
            groups[str(d["group"])] += 1
    return per_class, groups, per_image, sizes


def _summary(cfg: CfgNode, name: str) -> List[str]:
    data = load_test_set(cfg, name)
    _files_exist(data, name)
    per_class, groups, per_image, sizes = _counts(name, data)
    middle = sorted(sizes)[len(sizes) // 2] if sizes else 0
    empty = per_image.count(0)
    lines = [
        f"{name}: {len(per_image)} images, {sum(per_image)} objects (median size "
        f"{middle:.0f} pixels), at most {max(per_image)} in an image",
        "  classes: " + ", ".join(f"{c} {n}" for c, n in per_class.most_common(20)),
    ]
    if groups:
        lines.append("  groups: " + ", ".join(f"{g} {n}" for g, n in groups.most_common(20)))
    if empty:
        lines.append(
            f"  {empty} images without objects: training leaves them out, unless "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        )
    if data.contents.without_mask:
        lines.append(f"  {len(data.contents.without_mask)} images have objects without a mask")
    return [printable(line) for line in lines]


def _show(args: argparse.Namespace) -> None:
    from ..data.page import write_page

    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: use a number from 0")
    file = next((f for f in (args.name, f"{args.name}.yaml") if os.path.isfile(f)), "")
    cfg = load_config(file)
    used = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    names = list(cfg.DATASETS.REGISTER or used) if file else [args.name]
    if not names or names[0] not in DatasetCatalog.list():
        raise UserError(
            f"{file}: has no data sets in DATASETS"
            if file
            else f"{args.name}: neither a data set nor a file, and no {args.name}.yaml"
        )
    parts = []
    for name in names:
        data = load_test_set(cfg, name)
        if not MetadataCatalog.get(name).get("thing_classes"):
            raise UserError(f"{name}: has no classes of objects (thing_classes) to show")
        _files_exist(data, name)
        parts.append((name, data, _summary(cfg, name), _counts(name, data)))
    with write_errors(args.output, "name another file with --output"):
        write_page(args.output, parts, args.samples)
    print(printable(f"wrote {args.output}"))
