"""Mask R-CNN R50-FPN with RefBN in each place, for detectron2's tools/lazyconfig_train_net.py.

The same detector as COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_refbn.yaml. It uses the configs
of detectron2's model zoo, which are missing if detectron2 was installed from PyPI.
"""

from detectron2.model_zoo import get_config

import refbn_d2  # noqa: F401  (registers the norm types)

dataloader = get_config("common/data/coco.py").dataloader
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = get_config("common/optim.py").SGD
train = get_config("common/train.py").train
model = get_config("common/models/mask_rcnn_fpn.py").model

# Has BatchNorm's own statistics, from which a norm that trains can start. For BGR pixels that are
# not divided by a standard deviation.
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 90000
model.pixel_std = [1.0, 1.0, 1.0]
# Freezing a stage turns its norms into FrozenBN, whatever norm says.
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = "RefBN"
model.backbone.bottom_up.stages.norm = "RefBN"
model.backbone.norm = "RefBN"
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = "RefBN"
model.roi_heads.mask_head.conv_norm = "RefBN"
