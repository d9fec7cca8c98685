"""A trainer for image classifiers, derived from the trainer for detectors."""

from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch.utils.data import DataLoader, default_collate

from ..data import crops, image_folder, mnist
from ..data.errors import dataset_errors, naming_the_file
from ..engine import Trainer
from ..errors import UserError
from .checkpoint import ClassifierCheckpointer
from .evaluator import ClassificationEvaluator
from .hooks import TrainingProgress

__all__ = ["ClassificationTrainer"]

for data_set in (crops, image_folder, mnist):
    data_set.register()


class ClassificationTrainer(Trainer):
    """Trainer for data sets whose dicts have a "label" instead of "annotations".

    The metadata of a data set contains its ``mapper`` class. The class is called with ``is_train``;
    the instance converts a dict to one with "image", uint8 (C, H, W), "label" and "image_id".
    """

    @classmethod
    def check_data(cls, cfg: CfgNode, train: bool = True) -> None:
        for name in (*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if train else ())):
            _dicts(cfg, name)

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model, **checkpointables) -> ClassifierCheckpointer:
        return ClassifierCheckpointer(model, cfg.OUTPUT_DIR, **checkpointables)

    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool):
        (name, *_) = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        mapper = MetadataCatalog.get(name).get("mapper")
        if mapper is None:
            raise UserError(f"data set {name} has no labels of images: it is not for a classifier")
        return naming_the_file(mapper(is_train))

    @classmethod
    def _train_dicts(cls, cfg: CfgNode) -> List[Dict[str, Any]]:
        return [d for name in cfg.DATASETS.TRAIN for d in _dicts(cfg, name)]

    @classmethod
    def _separates_orientations(cls, cfg: CfgNode) -> bool:
        return False  # the mapper gives all images the same size, and dicts need not have one

    @classmethod
    def loader_options(cls, cfg: CfgNode) -> Dict[str, Any]:
        return {"collate_fn": default_collate, "pin_memory": torch.cuda.is_available()}

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Builds a loader with the batch size of training; detectron2's has single images."""
        dataset = DatasetFromList(_dicts(cfg, dataset_name), copy=False)
        return DataLoader(
            MapDataset(dataset, cls.build_mapper(cfg, False)),
            batch_size=max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()),
            sampler=InferenceSampler(len(dataset)),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            **cls.loader_options(cfg),
        )

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> ClassificationEvaluator:
        return ClassificationEvaluator()

    def build_hooks(self):
        hooks = super().build_hooks()
        place = next(k for k, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(place, TrainingProgress(self.cfg.SOLVER.IMS_PER_BATCH))
        return hooks


def _dicts(cfg: CfgNode, name: str) -> List[Dict[str, Any]]:
    with dataset_errors([name]):
        dicts = DatasetCatalog.get(name)
    if not all("label" in d for d in dicts):
        raise UserError(f"data set {name} has no labels of images: it is not for a classifier")
    num_classes = 1 + max(d["label"] for d in dicts)
    if num_classes != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        raise UserError(
            f"data set {name} has {num_classes} classes, MODEL.CLASSIFIER.NUM_CLASSES is "
            f"{cfg.MODEL.CLASSIFIER.NUM_CLASSES}"
        )
    return dicts
