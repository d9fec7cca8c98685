"""Packages that only a part of refbn_d2 needs, and the extra that brings them."""

import contextlib
from typing import Dict, Iterator

from .errors import UserError

__all__ = ["needs_extra"]

# Module that an extra brings -> what pip installs for it. OpenCV is in no extra: pip would put
# opencv-python-headless over an installed opencv-python, and both own the module cv2.
_INSTALLED_BY: Dict[str, str] = {
    "cv2": "opencv-python-headless",
    "hotcoco": "refbn_d2[report]",
    "jinja2": "refbn_d2[report]",
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
    """Turns the failed import of an optional package into one line with the pip command.

    Args:
        alternative: what else helps, such as "or set TEST.COCO_BACKEND pycocotools".

    Raises:
        UserError: a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        module = (e.name or "").split(".")[0]
        if module not in _INSTALLED_BY:
            raise
        remedy = f"pip install '{_INSTALLED_BY[module]}' {alternative}".rstrip()
        raise UserError(f"{module} is not installed: {remedy}") from None
