"""Every seam into detectron2, fvcore and torch: what this package needs of them beside their API.

SEAMS are names that are exchanged for a while, PRIVATE those that are used although they are
private, and DIFFERENCES what detectron2 0.6 lacks of later versions. tests/test_upstream.py fails
where an upstream version no longer has them or no longer looks them up, and where the package uses
a private name that is not listed. One seam is elsewhere: registry.py exchanges the code of
``get_norm``, and the constructor of RetinaNetHead, for good.

Importing this module is also how a part of the package says that it cannot do without detectron2.
"""

import pkgutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, ContextManager, Dict, Iterator
from unittest import mock

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "refbn_d2 needs detectron2, which is not installed. Install it with: pip install "
        "--no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
        "@02b5c4e295e990042a714712c21dc79b731e8833 (or run `make setup`, which also works with "
        "PyPI alone). Without it, only refbn_d2.norms and refbn_d2.evaluation work.",
        name="detectron2",
    ) from None

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import distributed as dist

from .io.atomic import atomic_write

__all__ = [
    "DIFFERENCES",
    "PRIVATE",
    "SEAMS",
    "Private",
    "Seam",
    "create_local_process_group",
    "exchanged",
    "whole_files",
]

# The versions that tests/test_upstream.py has passed with.
_DETECTRON2 = "detectron2 0.6 and 02b5c4e"
_FVCORE = "fvcore 0.1.5"
_PYCOCOTOOLS = "pycocotools 2.0"
_TORCH = "torch 2.14"


@dataclass(frozen=True)
class Seam:
    """A name that is exchanged.

    Attributes:
        user: the upstream function that looks the name up, as "module:name".
        reason: why the exchange is needed.
        versions: those of ``user`` that were tried.
        later_user: as ``user``, where versions of detectron2 later than 0.6 look it up elsewhere.
    """

    user: str
    reason: str
    versions: str = _DETECTRON2
    later_user: str = ""


SEAMS: Dict[str, Seam] = {
    "detectron2.engine.defaults:create_ddp_model": Seam(
        "detectron2.engine.defaults:DefaultTrainer.__init__",
        "it names the GPU of the local rank, which a model on the CPU refuses",
    ),
    "detectron2.config:CfgNode.load_yaml_with_base": Seam(
        "detectron2.config:CfgNode.merge_from_file",
        "it runs the code of Python tags, and reads each file once more",
    ),
    "detectron2.structures:ImageList.from_tensors": Seam(
        "detectron2.modeling.meta_arch.rcnn:GeneralizedRCNN.preprocess_image",
        "it has no argument for the size to pad a share of a batch to",
    ),
    "detectron2.data.build:DatasetCatalog": Seam(
        "detectron2.data.build:get_detection_dataset_dicts",
        "it calls the function of a data set, whose dicts were read and checked before",
    ),
    "detectron2.data.datasets.coco:DatasetCatalog": Seam(
        "detectron2.data.datasets.coco:convert_to_coco_dict",
        "it calls the function of a data set, whose dicts were read and checked before",
    ),
    "detectron2.data.build:load_proposals_into_dataset": Seam(
        "detectron2.data.build:get_detection_dataset_dicts",
        "it unpickles the file, which runs whatever code is in it",
    ),
    "detectron2.data.build:pickle": Seam(
        "detectron2.data.build:load_proposals_into_dataset",
        "what it loads has been read as data, and checked, before",
    ),
    "detectron2.checkpoint.detection_checkpoint:pickle": Seam(
        "detectron2.checkpoint.detection_checkpoint:DetectionCheckpointer._load_file",
        "it runs whatever code is in a .pkl of weights",
    ),
    "detectron2.evaluation.coco_evaluation:COCO": Seam(
        "detectron2.evaluation:COCOEvaluator.__init__",
        "it reads the file once more, and without checks",
    ),
    "detectron2.evaluation.coco_evaluation:COCOeval_opt": Seam(
        "detectron2.evaluation.coco_evaluation:_evaluate_predictions_on_coco",
        "there is no argument for the class that evaluates",
        later_user="detectron2.evaluation:COCOEvaluator._eval_predictions",
    ),
    "detectron2.utils.file_io:PathManager.open": Seam(
        "detectron2.evaluation:COCOEvaluator._eval_predictions",
        "a run that is killed leaves half a results file under the name of a whole one",
    ),
    "PIL.Image:open": Seam(
        "detectron2.data.detection_utils:read_image",
        "it decodes any format, for some of which Pillow starts a program, and any size",
        f"{_DETECTRON2}, Pillow 10 to 13",
    ),
    "pycocotools.coco:COCO": Seam(
        "detectron2.data.datasets.coco:load_coco_json",
        "it reads the file once more, and without checks",
        f"{_DETECTRON2}, {_PYCOCOTOOLS}",
    ),
    "torch:load": Seam(
        "fvcore.common.checkpoint:Checkpointer._load_file",
        "it runs code in a .pth, and does not look at the checksums of its records",
        _FVCORE,
    ),
}


@dataclass(frozen=True)
class Private:
    """A name that is used although upstream calls it private.

    Attributes:
        user: the module of this package that uses it.
        reason: why.
        versions: those that were tried.
    """

    user: str
    reason: str
    versions: str = _TORCH


PRIVATE: Dict[str, Private] = {
    "detectron2.utils.comm:_LOCAL_PROCESS_GROUP": Private(
        "upstream", "0.6 has no other way to set it than launch()", _DETECTRON2
    ),
    "detectron2.engine.train_loop:TrainerBase._hooks": Private(
        "engine.trainer", "some hooks of upstream's are replaced or run again", _DETECTRON2
    ),
    "detectron2.engine:DefaultTrainer._trainer": Private(
        "engine.trainer", "holds the wrapped model, the loader and the optimizer", _DETECTRON2
    ),
    "detectron2.engine.hooks:EvalHook._func": Private(
        "engine.trainer", "ours evaluates with the same function", _DETECTRON2
    ),
    "detectron2.engine.hooks:EvalHook._period": Private(
        "engine.trainer", "ours evaluates as often", _DETECTRON2
    ),
    "detectron2.evaluation:COCOEvaluator._do_evaluation": Private(
        "evaluation.coco_evaluator", "whether there are annotations to renumber", _DETECTRON2
    ),
    "torch.nn.modules.batchnorm:_NormBase": Private(
        "norms.running", "the base of all norms with running statistics"
    ),
    "torch.nn.modules.batchnorm:_NormBase._check_input_dim": Private(
        "norms.batch_norm_like", "the check that BatchNorm2d makes of its input"
    ),
    "torch.nn.modules.batchnorm:_BatchNorm": Private(
        "norms.fold", "the base of BatchNorm in all dimensions"
    ),
    "torch.nn.modules.conv:_ConvNd": Private("norms.convert", "the base of all convolutions"),
    "torch.nn.modules.instancenorm:_InstanceNorm": Private(
        "norms.convert", "the base of InstanceNorm in all dimensions"
    ),
    "torch.nn:Module._modules": Private("norms.convert", "a shared layer is replaced everywhere"),
    "torch.nn:Module._parameters": Private("norms.convert", "a None among them must stay one"),
    "torch.nn:Module._buffers": Private("norms.convert", "a None among them must stay one"),
    "torch.nn:Module._forward_hooks": Private("norms.fold", "a layer with hooks is not folded"),
    "torch.nn:Module._forward_pre_hooks": Private("norms.fold", "as for _forward_hooks"),
    "torch.nn:Module._load_state_dict_pre_hooks": Private(
        "norms.convert", "those of the old layer are not the new one's"
    ),
    "torch:Tensor._version": Private(
        "norms.batch_norm_like", "tells whether somebody wrote to a buffer in place"
    ),
    "torch.nn.parallel:DistributedDataParallel._active_ddp_module": Private(
        "norms.processes", "no other way to tell whether DDP's forward pass is running"
    ),
    "torch:_C._are_functorch_transforms_active": Private(
        "norms.kernels", "tells whether torch.func differentiates"
    ),
    "torch:_C._len_torch_dispatch_stack": Private(
        "norms.kernels", "tells whether a dispatch mode follows operations"
    ),
    "torch:_C._get_tracing_state": Private("norms.kernels", "tells whether torch.jit traces"),
    "torch:_C._current_graph_task_id": Private(
        "norms.tracing", "what torch.utils.checkpoint goes by, too"
    ),
    "torch.autograd.forward_ad:_current_level": Private(
        "norms.kernels", "tells whether forward-mode differentiation is on"
    ),
    "torch:_dynamo.reset": Private(
        "benchmarks.norm_cost", "torch.compile gives up after eight shapes of input"
    ),
}

# What later versions of detectron2 have and 0.6 has not -> what is done without it, and where.
DIFFERENCES: Dict[str, str] = {
    "detectron2.utils.comm:create_local_process_group": "create_local_process_group() below",
    "detectron2.utils.events:EventStorage.put_scalar(cur_iter)": (
        "engine/hooks/resume.py sets the storage's iteration first, which works in both"
    ),
    "detectron2.engine.train_loop:SimpleTrainer.__init__(gather_metric_period)": (
        "that version asks the loader for its iterator as soon as it is built: the __iter__ of "
        "data/loader.py is a generator, which does nothing before the first batch"
    ),
    "detectron2.engine.defaults:DefaultTrainer.state_dict[_trainer]": (
        "engine/trainer.py adds the optimizer's state under the same key"
    ),
    "detectron2.layers.batch_norm:get_norm[LN]": "registry.py builds LN",
}


@contextmanager
def exchanged(name: str, value: Any) -> Iterator[None]:
    """Makes upstream find ``value`` under a name of SEAMS while the block runs."""
    SEAMS[name]  # an exchange that is not explained there is refused
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    with mock.patch.object(pkgutil.resolve_name(owner), attribute, value):
        yield


@contextmanager
def whole_files() -> Iterator[None]:
    """Within, what upstream writes to local files by PathManager is whole, or not there."""
    upstream_open = PathManager.open

    def open_whole(path: str, mode: str = "r", *args: Any, **kwargs: Any) -> ContextManager[IO]:
        if mode in ("w", "wb") and "://" not in path:
            return atomic_write(path, mode)
        return upstream_open(path, mode, *args, **kwargs)

    with exchanged("detectron2.utils.file_io:PathManager.open", open_whole):
        yield


def create_local_process_group(size: int) -> None:
    """Makes detectron2 know which processes are on one machine; all processes must call it.

    Args:
        size: the number of processes on each machine.
    """
    if hasattr(comm, "create_local_process_group"):
        return comm.create_local_process_group(size)
    for first in range(0, comm.get_world_size(), size):  # release 0.6 does this in launch()
        group = dist.new_group(list(range(first, first + size)))
        if first <= comm.get_rank() < first + size:
            comm._LOCAL_PROCESS_GROUP = group
