"""Every seam into detectron2, fvcore and torch: what this package needs of them beside their API.

SEAMS are names that are exchanged for a while, PRIVATE those that are used although they are
private; tests/test_upstream.py fails where an upstream version no longer has them, or no longer
looks them up. One seam is elsewhere: registry.py exchanges the code of ``get_norm`` for good.
What differs in detectron2 0.6: engine/launcher.py (no ``create_local_process_group``),
engine/hooks/resume.py (``put_scalar`` takes no iteration), engine/trainer.py (``state_dict`` lacks
the optimizer), data/loader.py (asks for the iterator early), registry.py (no LN).

Importing this module is also how a part of the package says that it cannot do without detectron2.
"""

import pkgutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator
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

__all__ = ["PRIVATE", "SEAMS", "Seam", "exchanged"]


@dataclass(frozen=True)
class Seam:
    """A name that is exchanged.

    Attributes:
        user: the upstream function that looks the name up, as "module:name".
        reason: why the exchange is needed.
    """

    user: str
    reason: str


# All are the same in detectron2 0.6 and at the commit that setup installs.
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
    "torch:load": Seam(
        "fvcore.common.checkpoint:Checkpointer._load_file",
        "it runs code in a .pth, and does not look at the checksums of its records",
    ),
}

# "module:name" -> why it is used although upstream calls it private.
PRIVATE: Dict[str, str] = {
    "detectron2.utils.comm:_LOCAL_PROCESS_GROUP": "0.6 has no other way to set it than launch()",
    "detectron2.engine.defaults:DefaultTrainer._trainer": "holds the wrapped model and the loader",
    "torch.nn.modules.batchnorm:_NormBase": "the base of all norms with running statistics",
    "torch.nn.modules.batchnorm:_BatchNorm": "the base of BatchNorm in all dimensions",
}


@contextmanager
def exchanged(name: str, value: Any) -> Iterator[None]:
    """Makes upstream find ``value`` under a name of SEAMS while the block runs."""
    SEAMS[name]  # an exchange that is not explained there is refused
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    with mock.patch.object(pkgutil.resolve_name(owner), attribute, value):
        yield
