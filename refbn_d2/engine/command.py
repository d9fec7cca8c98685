"""The command line of the training tools, with detectron2's options."""

from argparse import Namespace
from typing import Type

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..config import load_config, register_datasets
from ..config_files import find_config
from ..data.checks import class_names, set_num_classes
from ..errors import one_line_errors, quiet_user_errors
from ..log import get_logger
from .launcher import start
from .run_folder import check_path, output_errors, run_folder
from .trainer import Trainer, setup

__all__ = ["train", "train_command"]

logger = get_logger(__name__)


def _run(args, cfg: CfgNode, trainer_class: Type[Trainer]):
    quiet_user_errors()  # needed here too, because this may run in a new process
    register_datasets(cfg)
    cfg = set_num_classes(cfg, args.eval_only)
    if args.eval_only:
        with output_errors(cfg.OUTPUT_DIR):
            return _evaluate(setup(args, cfg), args.resume, trainer_class)
    with run_folder(cfg, args.resume) as notes:
        cfg = setup(args, cfg)
        for note in notes:
            logger.info(note)
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def _evaluate(cfg: CfgNode, resume: bool, trainer_class: Type[Trainer]):
    trainer_class.check_data(cfg, train=False)
    model = trainer_class.build_model(cfg)
    checkpointer = trainer_class.build_checkpointer(cfg, model)
    checkpointer.classes = class_names(cfg, cfg.DATASETS.TEST)
    checkpointer.load_to_evaluate(cfg.MODEL.WEIGHTS, resume=resume)
    if cfg.TEST.PRECISE_BN.ENABLED:
        trainer_class.recompute_statistics(cfg, model)
    results = trainer_class.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(trainer_class.test_with_augmentation(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(trainer_class: Type[Trainer], args: Namespace) -> None:
    """Trains or evaluates in one or several processes.

    Processes are started according to ``--num-gpus`` and ``--num-machines``, or by torchrun or
    srun.

    Args:
        trainer_class: Class of the trainer.
        args: Command line, parsed by detectron2's ``default_argument_parser``.

    Raises:
        UserError: If something is wrong that the user can correct.
        SystemExit: If a signal stopped it after it has saved (128 + signal).
    """
    args.config_file = find_config(args.config_file)
    cfg = load_config(args.config_file, args.opts)
    check_path(cfg.OUTPUT_DIR)
    start(_run, args, cfg.MODEL.DEVICE, (args, cfg, trainer_class))


@one_line_errors
def train_command(trainer_class: Type[Trainer], usage: str) -> None:
    """Parses the command line and calls :func:`train`; a user's error is one line.

    Args:
        trainer_class: Class of the trainer.
        usage: Text of ``--help`` above the list of options.
    """
    train(trainer_class, default_argument_parser(usage).parse_args())
