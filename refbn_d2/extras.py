"""Optional packages, which only parts of refbn_d2 need, and the extras that install them."""

import contextlib
from typing import Dict, Iterator

from .errors import UserError

__all__ = ["needs_extra"]

# Optional module -> what to install with pip. OpenCV is not part of an extra: pip would install
# opencv-python-headless although opencv-python, which has the same module cv2, is installed.
_INSTALLED_BY: Dict[str, str] = {
    "cv2": "opencv-python-headless",
    "hotcoco": "refbn_d2[report]",
    "jinja2": "refbn_d2[report]",
    "lvis": "lvis",
    "matplotlib": "refbn_d2[report]",
    "rich": "refbn_d2[report]",
    "scipy": "refbn_d2[report]",
    "submitit": "refbn_d2[slurm]",
    "sklearn": "refbn_d2[quick]",
    "safetensors": "refbn_d2[pretrained]",
    "timm": "refbn_d2[pretrained]",
}


@contextlib.contextmanager
def needs_extra(alternative: str = "") -> Iterator[None]:
    """Context manager that reports the failed import of an optional package with a pip command.

    Args:
        alternative: another remedy, such as "or set TEST.COCO_BACKEND pycocotools".

    Raises:
        UserError: if a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        module = (e.name or "").split(".")[0]
        if module not in _INSTALLED_BY:
            raise
        remedy = f"pip install '{_INSTALLED_BY[module]}' {alternative}".rstrip()
        raise UserError(f"{module} is not installed: {remedy}") from None
