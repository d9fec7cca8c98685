"""Backbones of timm for detectors. Importing this package registers them with detectron2."""

from .timm_backbone import TimmBackbone, build_timm_backbone, build_timm_fpn_backbone

__all__ = ["TimmBackbone", "build_timm_backbone", "build_timm_fpn_backbone"]
