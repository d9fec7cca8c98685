"""detectron2's DefaultTrainer with a reference, exact resuming and errors that name the remedy."""

import os
import weakref
from typing import Any, Dict, Iterator, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    create_ddp_model,
    default_setup,
    hooks,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from torch.utils.data import Dataset, RandomSampler, Sampler

from ..config import apply_norm_config, load_config
from ..data.checks import check_test_sets, check_train_set, class_names
from ..data.errors import naming_the_file
from ..data.grouped_sampler import GroupedTrainingSampler, image_groups
from ..data.loader import TrainLoader
from ..data.sets import load_test_set, make_coco_file
from ..errors import UserError
from ..log import get_logger
from ..norms import MovingAverageBatchNorm2d
from ..rng import forked_rng
from ..statistics.inference import recompute_statistics
from ..statistics.reference import capture_reference, reference_layers
from ..upstream import exchanged, whole_files
from .building import check_names, config_errors
from .checkpoint import Checkpointer
from .evaluators import build_evaluator
from .hooks import (
    EvalHook,
    ExactResume,
    ProgressBar,
    ReferenceHook,
    StatisticsHook,
    WeightCentralization,
)
from .metrics import MetricsWriter, ProgressPrinter
from .run_folder import check_exists, output_errors
from .signals import StopOnSignal

__all__ = ["Trainer", "setup"]

logger = get_logger(__name__)


def setup(args, cfg: Optional[CfgNode] = None) -> CfgNode:
    """Loads the config of the command line, and sets up logging and seeds.

    An evaluation writes its log and config to the subfolder of its results, so that those of the
    training are kept.

    Args:
        args: Command line, parsed by detectron2's ``default_argument_parser``.
        cfg: Config that the command line names, if it is already loaded.

    Raises:
        UserError: If the config is invalid.
    """
    if cfg is None:
        cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    log_cfg = cfg.clone()
    log_cfg.defrost()
    if args.eval_only:
        log_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference")
    default_setup(log_cfg, args)
    return cfg


def _ddp(model, **kwargs):
    # Upstream passes the GPU of the local rank as device, which is an error for a model on the CPU.
    device = next(model.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    return create_ddp_model(model, device_ids=device_ids, **kwargs)


class Trainer(DefaultTrainer):
    """DefaultTrainer for RefBN, which can be interrupted at any moment and resumes exactly.

    It captures the reference before the first step. Hooks, writers, checkpoints and evaluation are
    based on detectron2's.

    Attributes:
        metrics: Writer of metrics.json; None on all processes but the main one.
    """

    metrics: Optional[MetricsWriter] = None

    def __init__(self, cfg: CfgNode):
        self.check_data(cfg)
        with exchanged("detectron2.engine.defaults:create_ddp_model", _ddp):
            super().__init__(cfg)
        self.checkpointer = self.build_checkpointer(
            cfg, self._trainer.model, trainer=weakref.proxy(self)
        )
        self.checkpointer.classes = class_names(cfg, cfg.DATASETS.TRAIN)
        for hook in self._hooks:
            if hasattr(hook, "checkpointer"):  # PeriodicCheckpointer still has upstream's
                hook.checkpointer = self.checkpointer

    @classmethod
    def check_data(cls, cfg: CfgNode, train: bool = True) -> None:
        """Reads and checks the data, so that errors occur before the first step.

        Args:
            cfg: Config of the run.
            train: Whether the model will be trained, not only evaluated.

        Raises:
            UserError: If a file is missing or invalid, or if classes, config, training data and
                test data do not match.
        """
        if train:
            cls._train_dicts(cfg)
        cls._check_evaluation(cfg, train)

    @classmethod
    def _check_evaluation(cls, cfg: CfgNode, train: bool = False) -> None:
        check_test_sets(cfg, train)
        for name in cfg.DATASETS.TEST:
            cls.build_evaluator(cfg, name)

    def resume_or_load(self, resume: bool = True) -> None:
        """Same as upstream, but also truncates metrics.json to the resumed iteration.

        Raises:
            UserError: If weights cannot be loaded; see :class:`Checkpointer`.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.start_iter = self.iter + 1 if self.checkpointer.resumed_from else 0
        if resume and comm.is_main_process():
            self.metrics.rewind(self.start_iter)
            kept = self.cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP
            for hook in self._hooks:
                if isinstance(hook, hooks.PeriodicCheckpointer) and kept > 0:
                    earlier = self.checkpointer.earlier_checkpoints(self.start_iter)
                    hook.recent_checkpoints = earlier[-kept:]

    def save_final(self) -> None:
        """Writes model_final.pth if the run was interrupted after the last step but before it."""
        if os.path.basename(self.checkpointer.resumed_from) != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self.iter)

    def run_step(self) -> None:
        """Runs one iteration.

        Raises:
            UserError: If the loss or a value that it depends on is not finite.
        """
        try:
            super().run_step()
        except FloatingPointError as e:
            reason = " ".join(str(e).split()).rstrip(".")
            raise UserError(
                f"training diverged at iteration {self.iter}: {reason}; "
                f"{self.checkpointer.last_good()}. Start again with a lower SOLVER.BASE_LR (now "
                f"{self.cfg.SOLVER.BASE_LR}), or resume with SOLVER.CLIP_GRADIENTS.ENABLED True"
            ) from e

    def before_train(self) -> None:
        with output_errors(self.cfg.OUTPUT_DIR):
            super().before_train()

    def after_step(self) -> None:
        if comm.is_main_process():
            check_exists(self.cfg.OUTPUT_DIR)
        with output_errors(self.cfg.OUTPUT_DIR):
            super().after_step()

    def after_train(self) -> None:
        with output_errors(self.cfg.OUTPUT_DIR):
            super().after_train()

    def state_dict(self) -> Dict[str, Any]:
        # detectron2 0.6 omits the optimizer; later versions do the same as this line.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._groups]
        super().load_state_dict(state_dict)
        # If mixed precision was off before, the checkpoint has no state of the gradient scaler.
        self._trainer.load_state_dict({**self._trainer.state_dict(), **state_dict["_trainer"]})
        # The checkpoint contains the learning rates, momentum and weight decay of the interrupted
        # run. Restore those of the current config, which may differ.
        for group, setting in zip(self._groups, settings):
            group.update(setting)
        if isinstance(self.scheduler, LRMultiplier):
            self.scheduler.base_lrs = [setting["initial_lr"] for setting in settings]
            for group, lr in zip(self._groups, self.scheduler.get_lr()):
                group["lr"] = lr

    @property
    def _groups(self) -> List[Dict[str, Any]]:
        return self._trainer.optimizer.param_groups

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model, **checkpointables) -> Checkpointer:
        """Builds the checkpointer with which both training and ``--eval-only`` load weights."""
        return Checkpointer(model, cfg.OUTPUT_DIR, **checkpointables)

    @classmethod
    def build_model(cls, cfg: CfgNode):
        check_names(cfg)
        with config_errors("the model"):
            model = super().build_model(cfg)
        return apply_norm_config(model, cfg)

    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool):
        """Builds the function that maps a dataset dict to model input; its errors name the file."""
        return naming_the_file(DatasetMapper(cfg, is_train))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Builds a loader like detectron2's that can continue at any iteration."""
        batch_size, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
        if batch_size < 1 or rest:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}: use a multiple of the number "
                f"of processes, {comm.get_world_size()}"
            )
        grouped = cfg.DATALOADER.SAMPLER_TRAIN == "GroupedTrainingSampler"
        return TrainLoader(
            cls._train_dicts(cfg),
            lambda dataset, seed: cls._build_sampler(cfg, dataset, seed),
            cls.build_mapper(cfg, True),
            batch_size,
            # Grouping by orientation would break up the batches of GroupedTrainingSampler.
            cls._separates_orientations(cfg) and not grouped,
            cfg.DATALOADER.NUM_WORKERS,
            cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            **cls.loader_options(cfg),
        )

    @classmethod
    def _separates_orientations(cls, cfg: CfgNode) -> bool:
        """Whether wide images and other images are in separate batches."""
        return cfg.DATALOADER.ASPECT_RATIO_GROUPING

    @classmethod
    def loader_options(cls, cfg: CfgNode) -> Dict[str, Any]:
        """Further arguments of the training loader."""
        return {}

    @classmethod
    def _build_sampler(cls, cfg: CfgNode, dataset: Dataset, seed: int) -> Sampler:
        """Builds the sampler DATALOADER.SAMPLER_TRAIN for ``dataset``."""
        if cfg.DATALOADER.SAMPLER_TRAIN == "GroupedTrainingSampler":
            groups = image_groups(dataset, cfg.DATALOADER.GROUP_FIELD)
            if cfg.DATALOADER.GROUPING_STRENGTH > 0 and len(set(groups)) < 2:
                raise UserError(
                    f"DATALOADER.GROUPING_STRENGTH is {cfg.DATALOADER.GROUPING_STRENGTH}, but all "
                    f"images of {', '.join(cfg.DATASETS.TRAIN)} are of one group: name a field of "
                    "the images with DATALOADER.GROUP_FIELD, or set the strength to 0"
                )
            try:
                return GroupedTrainingSampler(
                    groups,
                    cfg.DATALOADER.GROUPING_STRENGTH,
                    cfg.SOLVER.IMS_PER_BATCH,
                    seed,
                )
            except ValueError as e:
                names = ", ".join(cfg.DATASETS.TRAIN)
                raise UserError(f"data set {names}: {e} (SOLVER.IMS_PER_BATCH)") from None
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = seed
        with forked_rng(seed):  # several samplers of detectron2 ignore SEED and draw a random seed
            loader = build_detection_train_loader(
                cfg, dataset=dataset, mapper=lambda d: d, aspect_ratio_grouping=False
            )
        return loader.dataset.sampler

    @classmethod
    def _train_dicts(cls, cfg: CfgNode) -> Sequence[Dict[str, Any]]:
        """Returns the training data, which each process reads only once.

        Raises:
            UserError: If the data are invalid; see :func:`check_train_set`.
        """
        return check_train_set(cfg).dicts

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(
            load_test_set(cfg, dataset_name).dicts,
            mapper=cls.build_mapper(cfg, False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if not output_folder and len(cfg.DATASETS.TEST) > 1:  # their files have the same names
            folder = os.path.join(folder, dataset_name)
        if MetadataCatalog.get(dataset_name).get("evaluator_type") == "coco":
            make_coco_file(cfg, dataset_name, folder)
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: CfgNode, model, evaluators=None) -> Dict[str, Any]:
        """Same as upstream, but a killed evaluation leaves no half-written results files."""
        with whole_files():
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model) -> Dict[str, Any]:
        """Evaluates with TEST.AUG, detectron2's test-time augmentation of R-CNNs.

        Returns:
            The same as ``test``, with "_TTA" appended to each name, as in detectron2's
            tools/train_net.py.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    @classmethod
    def load_reference_batch(cls, cfg: CfgNode) -> List[Dict[str, Any]]:
        """Loads the reference batch B_fix: one global batch with the training augmentation.

        Every process gets the same batch, because images and augmentations depend only on
        MODEL.REFBN.REFERENCE.SEED.

        Raises:
            UserError: If the training data have too few images.
        """
        reference = cfg.MODEL.REFBN.REFERENCE
        num_images = reference.NUM_IMAGES or cfg.SOLVER.IMS_PER_BATCH
        with forked_rng(reference.SEED):
            loader = cls.build_reference_loader(cfg, num_images)
            batch = next(iter(loader), None)
        if batch is None:
            raise UserError(
                f"{', '.join(cfg.DATASETS.TRAIN)}: fewer than {num_images} images of one "
                "orientation for the reference batch; lower MODEL.REFBN.REFERENCE.NUM_IMAGES"
            )
        return batch

    @classmethod
    def build_reference_loader(cls, cfg: CfgNode, num_images: int):
        """Builds a loader of batches of ``num_images`` images, in an order by torch's RNG only."""
        dataset = cls._train_dicts(cfg)
        return build_detection_train_loader(
            dataset,
            mapper=cls.build_mapper(cfg, True),
            sampler=RandomSampler(dataset),
            total_batch_size=num_images * comm.get_world_size(),
            aspect_ratio_grouping=cls._separates_orientations(cfg),
            num_workers=0,
        )

    @classmethod
    def recompute_statistics(cls, cfg: CfgNode, model) -> None:
        """Recomputes the inference statistics from TEST.PRECISE_BN.NUM_ITER training batches.

        If no norm has a reference, as with weights of BatchNorm, it is captured as in training.
        """
        references = [m.has_reference for m in reference_layers(model).values()]
        if references and not any(references):
            batch = cls.load_reference_batch(cfg)
            capture_reference(model, batch, cfg.MODEL.REFBN.REFERENCE.SEED)
            logger.info("Captured the reference from %d images", len(batch))
        loader = cls.build_train_loader(cfg)
        count = recompute_statistics(model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)
        logger.info("Recomputed the statistics of %d norms", count)

    def build_writers(self):
        writers = super().build_writers()
        path = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
        for n, writer in enumerate(writers):
            if isinstance(writer, JSONWriter):
                writer.close()
                writers[n] = self.metrics = MetricsWriter(path)
            elif isinstance(writer, CommonMetricPrinter):
                writers[n] = ProgressPrinter(self.max_iter)
        return writers

    def build_hooks(self):
        return list(self._hooks_of_a_run())

    def _hooks_of_a_run(self) -> Iterator[HookBase]:
        """Yields our hooks and detectron2's, some of which are replaced, in their order."""
        cfg = self.cfg
        if any(isinstance(m, MovingAverageBatchNorm2d) for m in self.model.modules()):
            # Before the hooks that run the model or save its weights.
            yield WeightCentralization()
        if reference_layers(self.model):
            reference = cfg.MODEL.REFBN.REFERENCE
            yield ReferenceHook(
                lambda: self.load_reference_batch(cfg),
                reference.SEED,
                reference.REFRESH_PERIOD,
                cfg.OUTPUT_DIR,
            )
        if isinstance(self._trainer.data_loader, TrainLoader):
            yield ExactResume(self._trainer.data_loader)
        for hook in super().build_hooks():
            if isinstance(hook, hooks.PreciseBN):
                # PreciseBN does not handle mixed statistics, and its results differ by process.
                yield StatisticsHook(
                    cfg.TEST.EVAL_PERIOD, lambda: self.recompute_statistics(cfg, self.model)
                )
            elif isinstance(hook, hooks.EvalHook):
                yield EvalHook(hook._period, hook._func)
                if cfg.TEST.AUG.ENABLED:
                    yield EvalHook(0, lambda: self.test_with_augmentation(cfg, self.model))
            else:
                if isinstance(hook, hooks.PeriodicCheckpointer):
                    hook.max_to_keep = cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP or None
                yield hook
        yield StopOnSignal(self.checkpointer)
        if comm.is_main_process():
            yield ProgressBar()
