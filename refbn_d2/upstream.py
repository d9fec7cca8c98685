"""Names of detectron2, fvcore and torch that this package replaces, or uses although private.

SEAMS are names that are replaced temporarily, PRIVATE are private names that are used, and
DIFFERENCES are features of later versions of detectron2 that 0.6 lacks. tests/test_upstream.py
fails if an upstream version lacks one of these names or no longer looks it up, or if the package
uses a private name that is not listed. Two permanent replacements are elsewhere: registry.py
replaces the code of ``get_norm`` and the constructor of RetinaNetHead.

Parts of the package that need detectron2 import this module, which raises a clear error if it is
not installed.
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

# Versions with which tests/test_upstream.py has passed.
_DETECTRON2 = "detectron2 0.6 and 02b5c4e"
_FVCORE = "fvcore 0.1.5"
_PYCOCOTOOLS = "pycocotools 2.0"
_TORCH = "torch 2.14"


@dataclass(frozen=True)
class Seam:
    """A name that is replaced temporarily.

    Attributes:
        user: upstream function that looks the name up, as "module:name".
        reason: reason for the replacement; "it" is ``user``.
        versions: versions of ``user`` that were tested.
        later_user: the same as ``user``, if versions of detectron2 after 0.6 look the name up in
            another function.
    """

    user: str
    reason: str
    versions: str = _DETECTRON2
    later_user: str = ""


SEAMS: Dict[str, Seam] = {
    "detectron2.engine.defaults:create_ddp_model": Seam(
        "detectron2.engine.defaults:DefaultTrainer.__init__",
        "it passes the GPU of the local rank, which is an error for a model on the CPU",
    ),
    "detectron2.config:CfgNode.load_yaml_with_base": Seam(
        "detectron2.config:CfgNode.merge_from_file",
        "it executes the code of Python tags, and reads each file a second time",
    ),
    "detectron2.structures:ImageList.from_tensors": Seam(
        "detectron2.modeling.meta_arch.rcnn:GeneralizedRCNN.preprocess_image",
        "it has no argument for the size to which the images of a part of a batch are padded",
    ),
    "detectron2.data.build:DatasetCatalog": Seam(
        "detectron2.data.build:get_detection_dataset_dicts",
        "it loads a data set again, whose dicts were already read and checked",
    ),
    "detectron2.data.datasets.coco:DatasetCatalog": Seam(
        "detectron2.data.datasets.coco:convert_to_coco_dict",
        "it loads a data set again, whose dicts were already read and checked",
    ),
    "detectron2.data.datasets.pascal_voc:np": Seam(
        "detectron2.data.datasets.pascal_voc:load_voc_instances",
        "it uses np.str, which NumPy 1.24 and later lack",
    ),
    "detectron2.data.build:load_proposals_into_dataset": Seam(
        "detectron2.data.build:get_detection_dataset_dicts",
        "it unpickles the file, which executes code in it",
    ),
    "detectron2.data.build:pickle": Seam(
        "detectron2.data.build:load_proposals_into_dataset",
        "it unpickles the file, whose content was already read and checked without executing code",
    ),
    "detectron2.checkpoint.detection_checkpoint:pickle": Seam(
        "detectron2.checkpoint.detection_checkpoint:DetectionCheckpointer._load_file",
        "it unpickles a .pkl of weights, which executes code in it",
    ),
    "detectron2.evaluation.coco_evaluation:COCO": Seam(
        "detectron2.evaluation:COCOEvaluator.__init__",
        "it reads the file a second time, without checks",
    ),
    "detectron2.evaluation.coco_evaluation:COCOeval_opt": Seam(
        "detectron2.evaluation.coco_evaluation:_evaluate_predictions_on_coco",
        "it has no argument for the class that evaluates",
        later_user="detectron2.evaluation:COCOEvaluator._eval_predictions",
    ),
    "detectron2.utils.file_io:PathManager.open": Seam(
        "detectron2.evaluation:COCOEvaluator._eval_predictions",
        "if the run is killed meanwhile, it leaves an incomplete results file",
    ),
    "PIL.Image:open": Seam(
        "detectron2.data.detection_utils:read_image",
        "it decodes images of any size and format; for some formats Pillow starts a program",
        f"{_DETECTRON2}, Pillow 10 to 13",
    ),
    "pycocotools.coco:COCO": Seam(
        "detectron2.data.datasets.coco:load_coco_json",
        "it reads the file a second time, without checks",
        f"{_DETECTRON2}, {_PYCOCOTOOLS}",
    ),
    "torch:load": Seam(
        "fvcore.common.checkpoint:Checkpointer._load_file",
        "it executes code in a .pth, and does not verify the checksums of its records",
        _FVCORE,
    ),
}


@dataclass(frozen=True)
class Private:
    """A private name of upstream that this package uses.

    Attributes:
        user: module of this package that uses it.
        reason: reason for its use.
        versions: upstream versions that were tested.
    """

    user: str
    reason: str
    versions: str = _TORCH


PRIVATE: Dict[str, Private] = {
    "detectron2.utils.comm:_LOCAL_PROCESS_GROUP": Private(
        "upstream", "in 0.6 only launch() can set it otherwise", _DETECTRON2
    ),
    "detectron2.engine.train_loop:TrainerBase._hooks": Private(
        "engine.trainer", "some of upstream's hooks are replaced or called again", _DETECTRON2
    ),
    "detectron2.engine:DefaultTrainer._trainer": Private(
        "engine.trainer", "contains the wrapped model, the loader and the optimizer", _DETECTRON2
    ),
    "detectron2.engine.hooks:EvalHook._func": Private(
        "engine.trainer", "the hook that replaces it calls the same function", _DETECTRON2
    ),
    "detectron2.engine.hooks:EvalHook._period": Private(
        "engine.trainer", "the hook that replaces it has the same period", _DETECTRON2
    ),
    "detectron2.evaluation:COCOEvaluator._do_evaluation": Private(
        "evaluation.coco_evaluator", "tells whether there are annotations to renumber", _DETECTRON2
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
    "torch.nn:Module._parameters": Private("norms.convert", "values that are None are preserved"),
    "torch.nn:Module._buffers": Private("norms.convert", "values that are None are preserved"),
    "torch.nn:Module._non_persistent_buffers_set": Private(
        "norms.convert", "what is no part of the state dict must not become one"
    ),
    "torch.nn:Module._forward_hooks": Private("norms.fold", "a layer with hooks is not folded"),
    "torch.nn:Module._forward_pre_hooks": Private("norms.fold", "as for _forward_hooks"),
    "torch.nn:Module._load_state_dict_pre_hooks": Private(
        "norms.convert", "the new layer must not get those of the old layer"
    ),
    "torch:Tensor._version": Private(
        "norms.batch_norm_like", "tells whether a buffer was changed in place"
    ),
    "torch.nn.parallel:DistributedDataParallel._active_ddp_module": Private(
        "norms.processes", "no other way to tell whether DDP's forward pass is running"
    ),
    "torch:_C._are_functorch_transforms_active": Private(
        "norms.kernels", "tells whether torch.func differentiates"
    ),
    "torch:_C._len_torch_dispatch_stack": Private(
        "norms.kernels", "tells whether a dispatch mode intercepts operations"
    ),
    "torch:_C._get_tracing_state": Private("norms.kernels", "tells whether torch.jit traces"),
    "torch:_C._current_graph_task_id": Private(
        "norms.tracing", "tells whether a backward pass is running, as in torch.utils.checkpoint"
    ),
    "torch.autograd.forward_ad:_current_level": Private(
        "norms.kernels", "tells whether forward-mode differentiation is on"
    ),
    "torch:_dynamo.reset": Private(
        "benchmarks.norm_cost", "torch.compile stops compiling after eight input shapes"
    ),
}

# Feature of later versions of detectron2 that 0.6 lacks -> how and where this package handles that.
DIFFERENCES: Dict[str, str] = {
    "detectron2.utils.comm:create_local_process_group": "create_local_process_group() below",
    "detectron2.utils.events:EventStorage.put_scalar(cur_iter)": (
        "engine/hooks/resume.py sets the storage's iteration first, which works in both"
    ),
    "detectron2.engine.train_loop:SimpleTrainer.__init__(gather_metric_period)": (
        "0.6 creates the loader's iterator before training: the __iter__ of data/loader.py is a "
        "generator, which does nothing before the first batch"
    ),
    "detectron2.engine.defaults:DefaultTrainer.state_dict[_trainer]": (
        "engine/trainer.py adds the optimizer's state under the same key"
    ),
    "detectron2.layers.batch_norm:get_norm[LN]": "registry.py builds LN",
}


@contextmanager
def exchanged(name: str, value: Any) -> Iterator[None]:
    """Context manager that replaces a name of SEAMS by ``value``."""
    SEAMS[name]  # a KeyError for a name that is not listed there
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    with mock.patch.object(pkgutil.resolve_name(owner), attribute, value):
        yield


@contextmanager
def whole_files() -> Iterator[None]:
    """Context manager in which upstream writes local files atomically through PathManager."""
    upstream_open = PathManager.open

    def open_whole(path: str, mode: str = "r", *args: Any, **kwargs: Any) -> ContextManager[IO]:
        if mode in ("w", "wb") and "://" not in path:
            return atomic_write(path, mode)
        return upstream_open(path, mode, *args, **kwargs)

    with exchanged("detectron2.utils.file_io:PathManager.open", open_whole):
        yield


def create_local_process_group(size: int) -> None:
    """Tells detectron2 which processes are on the same machine. All processes must call this.

    Args:
        size: number of processes on each machine.
    """
    if hasattr(comm, "create_local_process_group"):
        return comm.create_local_process_group(size)
    for first in range(0, comm.get_world_size(), size):  # release 0.6 does this in launch()
        group = dist.new_group(list(range(first, first + size)))
        if first <= comm.get_rank() < first + size:
            comm._LOCAL_PROCESS_GROUP = group
