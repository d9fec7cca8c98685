"""Installs the package into an environment of one's own: pip install -e ."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="refbn_d2",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "refbn_d2/__init__.py").read_text())[1],
    description="Reference-batch normalization for detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["refbn_d2", "refbn_d2.*"]),
    package_data={"refbn_d2.evaluation": ["*.j2"], "refbn_d2.norms.kernels": ["*.cpp"]},
    python_requires=">=3.9",
    # detectron2 is not on PyPI under its own name; `import refbn_d2` says how to install it.
    install_requires=[
        "torch>=2.1",
        "torchvision",
        "numpy",
        "opencv-python-headless",
        "pycocotools>=2.0.2",
        "fvcore>=0.1.5,<0.1.6",
        "hotcoco>=1.3,<2",
        "scipy",
        "scikit-learn",
        "jinja2",
        "matplotlib",
        "rich",
        "tqdm",
        "setuptools<81",  # detectron2 imports pkg_resources
    ],
    extras_require={
        "dev": ["pytest", "hypothesis", "ruff", "onnx", "onnxruntime", "safetensors"],
    },
)
