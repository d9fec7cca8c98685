#!/usr/bin/env python3
"""Measures how many images per second the ImageNet loader loads on this machine.

    dev/benchmark_loader.py datasets/coco/train2017 --workers 1 2

PHOTOS is any folder with photos. 200 of them are scaled to 500 pixels, which is usual in ImageNet,
in a temporary folder.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

from PIL import Image

from refbn_d2 import get_config_file
from refbn_d2.classification import ClassificationTrainer
from refbn_d2.config import load_config
from refbn_d2.data.image_folder import register_image_folders
from refbn_d2.errors import UserError, one_line_errors

CONFIG = "ImageNet/resnet50_90epochs_refbn.yaml"
NUM_PHOTOS, NUM_IMAGES = 200, 20000


def make_data_set(photos: Path, root: Path) -> float:
    """Writes a data set of one class, with many names for few files; returns mean size in kB."""
    folder = root / "train" / "photos"
    folder.mkdir(parents=True)
    files = sorted(photos.glob("*.jpg"))[:NUM_PHOTOS]
    if not files:
        raise UserError(f"{photos}: no .jpg file in it")
    for k, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        image.thumbnail((500, 500))
        image.save(folder / f"{k}.jpg", quality=95)
    sizes = [f.stat().st_size for f in folder.iterdir()]
    for k in range(len(files), NUM_IMAGES):
        os.link(folder / f"{k % len(files)}.jpg", folder / f"{k}.jpg")
    return sum(sizes) / len(sizes) / 1000


def throughput(num_workers: int, batch_size: int, batches: int):
    """Images per second, and images per second of CPU time of this process."""
    opts = ["DATALOADER.NUM_WORKERS", num_workers, "SOLVER.IMS_PER_BATCH", batch_size]
    opts += ["DATASETS.TRAIN", "('benchmark_train',)", "MODEL.CLASSIFIER.NUM_CLASSES", 1]
    cfg = load_config(
        get_config_file(CONFIG), [*map(str, opts), "SOLVER.AMP.ENABLED", "False", "SEED", "0"]
    )
    loader = iter(ClassificationTrainer.build_train_loader(cfg))
    for _ in itertools.islice(loader, 1 + 2 * num_workers):  # start the workers
        pass
    start, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(loader, batches):
        pass
    images = batches * batch_size
    return images / (time.perf_counter() - start), images / (time.process_time() - cpu)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", metavar="PHOTOS", type=Path)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, os.cpu_count()])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_data_set(args.photos, Path(folder))
        register_image_folders("benchmark", folder)
        print(f"files of {size:.0f} kB on average")
        _, per_core = throughput(0, args.batch_size, args.batches)
        print(f"no workers: {per_core:,.0f} images per second of one core")
        for n in args.workers:
            per_second, _ = throughput(n, args.batch_size, args.batches)
            print(f"{n} workers: {per_second:,.0f} images/s, {per_second / n:,.0f} each")


if __name__ == "__main__":
    main()
