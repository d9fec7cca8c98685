"""The command line of the training tools, which is detectron2's own."""

from typing import Type

from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..config import load_config
from ..config_files import find_config
from ..errors import one_line_errors, quiet_user_errors
from .launcher import start
from .trainer import Trainer, setup

__all__ = ["train_command"]


def _run(args, trainer_class: Type[Trainer]):
    quiet_user_errors()  # this may be a process of its own
    cfg = setup(args)
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        checkpointer = trainer_class.build_checkpointer(cfg, model)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        if cfg.TEST.PRECISE_BN.ENABLED:
            trainer_class.recompute_statistics(cfg, model)
        results = trainer_class.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


@one_line_errors
def train_command(trainer_class: Type[Trainer], usage: str) -> None:
    """Parses the command line and trains or evaluates, in as many processes as it asks for.

    They are started by ``--num-gpus`` and ``--num-machines``, or by torchrun or srun.

    Args:
        trainer_class: what trains.
        usage: the text of ``--help`` above the options' list.
    """
    args = default_argument_parser(usage).parse_args()
    args.config_file = find_config(args.config_file)
    device = load_config(args.config_file, args.opts).MODEL.DEVICE
    start(_run, args, device, (args, trainer_class))
