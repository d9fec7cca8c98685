"""Runs a trained detector on images or videos: draws predictions and writes COCO results.

    refbn-d2 predict --weights output/model_final.pth --output predictions photos/*.jpg
    refbn-d2 predict --weights bn/model_final.pth refbn/model_final.pth --output compared photos/

IMAGES are files, folders, patterns or videos. The default of --config-file is the config.yaml that
training wrote beside the weights. With two weights files the predictions of both models are drawn
side by side: objects that only one model found in colour, objects that both found in grey.
"""

import argparse
import filecmp
import glob
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from tqdm import tqdm

from ..config import load_config
from ..config_files import find_config
from ..data.errors import naming_the_file
from ..engine.predictor import Predictor, coco_results, draw, have_counterpart
from ..errors import UserError, one_line_errors
from ..evaluation.printable import printable
from ..io.atomic import atomic_write

__all__ = ["main"]

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
_IMAGES |= {".pbm", ".pgm", ".pnm", ".ppm"}
_VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
RESULTS = "coco_instances_results.json"


class Frame(NamedTuple):
    """An image file or a frame of a video.

    Attributes:
        name: file name of the picture to write, without suffix.
        file: path of the file; for a frame of a video with "#" and its number appended.
        image: pixels, (H, W, 3), uint8, BGR.
    """

    name: str
    file: str
    image: np.ndarray


def find_files(arguments: List[str]) -> List[Path]:
    """Returns the image and video files of the arguments, which are files, folders or patterns.

    Raises:
        UserError: if there is no file for an argument.
    """
    files: Dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if os.path.isdir(path):
            found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in _IMAGES | _VIDEOS]
        else:
            found = [Path(p) for p in sorted(glob.glob(argument, recursive=True))]
            found = [path] if os.path.lexists(path) else found
        found = [p for p in found if p.is_file()]  # a pipe may never end
        if not found:
            what = "has no images" if os.path.lexists(path) else "no such file or folder"
            raise UserError(f"{argument}: {what}")
        files.update(dict.fromkeys(found))
    return list(files)


def _open_video(path: Path) -> cv2.VideoCapture:
    if printable(str(path)) != str(path):  # OpenCV crashes if a name is not UTF-8
        raise UserError(f"{path}: OpenCV cannot open a file of this name: rename it")
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise UserError(f"{path}: OpenCV cannot open this video")
    return video


def count_frames(path: Path) -> int:
    """Returns the number of pictures in a file; that of a video may be inexact."""
    if path.suffix.lower() not in _VIDEOS:
        return 1
    return max(1, int(_open_video(path).get(cv2.CAP_PROP_FRAME_COUNT)))


# The errors of this reader name the file. It only accepts formats that Pillow decodes itself.
_read = naming_the_file(lambda d: read_image(d["file_name"], format="BGR"))


def frames(path: Path) -> Iterator[Frame]:
    """Yields the pictures in a file.

    Raises:
        UserError: if the file is not an image, or is a video that OpenCV cannot open.
    """
    if path.suffix.lower() not in _VIDEOS:
        yield Frame(path.stem, str(path), np.ascontiguousarray(_read({"file_name": str(path)})))
        return
    video = _open_video(path)
    number = 0
    while True:
        read, image = video.read()
        if not read:
            return
        yield Frame(f"{path.stem}_{number:06d}", f"{path}#{number}", image)
        number += 1


def load_models(args: argparse.Namespace) -> List[Predictor]:
    """Builds one predictor for each weights file."""
    models = []
    for weights in args.weights:
        config = args.config_file or Path(weights).parent / "config.yaml"
        if not args.config_file and not config.is_file():
            raise UserError(
                f"{config}: no such file; give the config of {weights} with --config-file"
            )
        models.append(Predictor(load_config(find_config(str(config)), args.opts), weights))
    return models


def _picture(
    models: List[Predictor], image: np.ndarray, titles: List[str], threshold: float
) -> Tuple[np.ndarray, List[Any]]:
    """Returns the picture with predictions of all models, and all detections of each model."""
    outputs = [model(image) for model in models]
    found = [o.get("instances") for o in outputs]
    shown = [dict(o) for o in outputs]
    for s in shown:
        if "instances" in s:
            s["instances"] = s["instances"][s["instances"].scores >= threshold]
    shared: List[Any] = [None] * len(models)
    if len(models) == 2 and all("instances" in s for s in shown):
        pair = [s["instances"] for s in shown]
        shared = [have_counterpart(pair[0], pair[1]), have_counterpart(pair[1], pair[0])]
    panels = [draw(image, s, m.metadata, c) for s, m, c in zip(shown, models, shared)]
    if len(panels) > 1:
        panels = [_titled(p, printable(title)) for p, title in zip(panels, titles)]
    return np.hstack(panels), found


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    bar = np.full((28, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, title, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([bar, image])


def _titles(weights: List[str]) -> List[str]:
    """Returns short names of the weights files: the parts of their paths that differ."""
    paths = [Path(w).resolve().parts for w in weights]
    titles = [
        "_".join(p for p in parts if not all(p in other for other in paths)) for parts in paths
    ]
    distinct = len(set(titles)) == len(titles) and all(titles)
    return titles if distinct else [str(n) for n in range(1, len(weights) + 1)]


@one_line_errors
def main() -> None:
    """Entry point.

    Raises:
        UserError: if arguments are invalid; if the output cannot be written; or, after all other
            images were processed, if images cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, patterns")
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="FILE", help="one model, or two to compare"
    )
    parser.add_argument("--config-file", help="default: config.yaml beside the weights")
    parser.add_argument("--output", type=Path, required=True, help="folder of the predictions")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="minimum score of the detections to draw (default: %(default)s); the results file "
        "has all detections",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ... to override the config"
    )
    args = parser.parse_args()
    if len(args.weights) > 2:
        raise UserError(f"--weights names {len(args.weights)} files: use one, or two to compare")
    if not 0 <= args.score_threshold <= 1:
        raise UserError(f"--score-threshold {args.score_threshold}: use a score from 0 to 1")
    files = find_files(args.images)
    if args.output.resolve() in [file.resolve().parent for file in files]:
        raise UserError(
            f"--output {args.output} has images to predict on, which would be overwritten: use "
            "another folder"
        )
    models = load_models(args)
    try:
        unread = _predict(args, files, models)
    except OSError as e:
        file = e.filename2 or e.filename or args.output
        raise UserError(f"{file} cannot be written: {e.strerror}; use another --output") from None
    if unread:
        raise UserError(f"{len(unread)} of {len(files)} files: {'; '.join(unread)}")


def _predict(args: argparse.Namespace, files: List[Path], models: List[Predictor]) -> List[str]:
    """Writes the pictures and the results; returns the errors of files that cannot be used."""
    args.output.mkdir(parents=True, exist_ok=True)
    ids, titles = _image_ids(models[0].image_ids, files), _titles(args.weights)
    results: List[List[Dict[str, Any]]] = [[] for _ in models]
    unread: List[str] = []
    names: Set[str] = set()
    known = models[0].image_ids.values()
    next_id = 1 + max((i for i in known if isinstance(i, int)), default=0)
    # disable=None: no progress bar unless stderr is a terminal.
    with tqdm(total=sum(map(count_frames, files)), unit="image", disable=None) as bar:
        for file in files:
            try:
                for frame in frames(file):
                    picture, found = _picture(models, frame.image, titles, args.score_threshold)
                    image_id = ids.get(file)
                    if image_id is None:
                        image_id, next_id = next_id, next_id + 1
                    for model, instances, entries in zip(models, found, results):
                        if instances is not None:
                            for r in coco_results(instances, image_id, model.metadata):
                                entries.append({**r, "file_name": frame.file})
                    names.add(name := _free_name(frame.name, names))
                    content = cv2.imencode(".png", picture)[1].tobytes()
                    (args.output / f"{name}.png").write_bytes(content)
                    bar.update()
            except UserError as e:
                unread.append(str(e) if str(file) in str(e) else f"{file}: {e}")
    for title, entries in zip(titles, results):
        name = RESULTS if len(models) == 1 else f"{title}_{RESULTS}"
        with atomic_write(str(args.output / name)) as f:
            json.dump(entries, f)
        print(printable(str(args.output / name)))
    print(printable(f"{len(names)} pictures in {args.output}"))
    return unread


def _free_name(name: str, taken: Set[str]) -> str:
    """Numbers a name that is taken: files of different folders may have the same one."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _image_ids(known: Dict[Path, Any], files: List[Path]) -> Dict[Path, Any]:
    """Returns the ids of the files that are images of the data set, or copies of them.

    Args:
        known: Path -> id of the images of the data set, some of which may not be here.
        files: The files to predict on.
    """
    by_name: Dict[str, List[Path]] = {}
    for path in known:
        by_name.setdefault(path.name, []).append(path)
    given = Counter(file.name for file in files)
    ids = {}
    for file in files:
        originals = by_name.get(file.name, [])
        if file.resolve() in known:
            ids[file] = known[file.resolve()]
        elif len(originals) == given[file.name] == 1 and _is_copy(file, originals[0]):
            ids[file] = known[originals[0]]
    return ids


def _is_copy(file: Path, original: Path) -> bool:
    """Whether a file of the same name has the same content, as far as can be seen here."""
    return not original.is_file() or filecmp.cmp(file, original, shallow=False)
