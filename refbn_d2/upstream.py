"""Every seam into detectron2, fvcore and torch: what this package needs of them beside their API.

Importing this module is also how a part of the package says that it cannot do without detectron2.
"""

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
