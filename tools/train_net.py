#!/usr/bin/env python3
"""Trains or evaluates a detector; detectron2's own command line.

    tools/train_net.py --config-file CONFIG.yaml --num-gpus 8 [--resume] [--eval-only] [KEY VALUE ...]

Without a GPU: --num-gpus 0 MODEL.DEVICE cpu
"""

from detectron2.engine import default_argument_parser, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from refbn_d2.engine import Trainer, setup
from refbn_d2.errors import one_line_errors


def run(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        Trainer.build_checkpointer(cfg, model).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


@one_line_errors
def main():
    args = default_argument_parser(__doc__).parse_args()
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    main()
