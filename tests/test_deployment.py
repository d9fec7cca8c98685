"""Exported models give the model's outputs, also on images of another size than traced."""

import io

import numpy as np
import pytest
import tiny
import torch
from detectron2.structures import Boxes
from detectron2.utils.testing import convert_scripted_instances
from PIL import Image

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.norms import NORM_TYPES, fold_norms

SIZES = [(96, 128), (80, 112)]  # height, width; the first is traced


@pytest.fixture(autouse=True)
def _inference():
    # Without the optimizer, which takes longer than everything else here.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def export_tools():
    reason = "detectron2 0.6 imports caffe2 there, which PyTorch has no more"
    return pytest.importorskip("detectron2.export", reason=reason)


@pytest.fixture(scope="module")
def images(real_data):
    files = sorted((real_data / "coco/val2017").iterdir())
    found = []
    for file, (height, width) in zip(files, SIZES):
        pixels = np.asarray(Image.open(file).convert("RGB").resize((width, height)))
        found.append(torch.tensor(pixels[:, :, ::-1].transpose(2, 0, 1).copy()).float())
    return found


def detector():
    """A small R50-C4 Mask R-CNN, untrained, with statistics that are not those of no norm."""
    options = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0, "MODEL__ROI_HEADS__NUM_CLASSES": 3}
    cfg = load_config(tiny.CONFIG, tiny.opts(**options))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return model.eval()


class Backbone(torch.nn.Module):
    """A tensor in, a tensor out."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)["res4"]


def traced(module, x):
    return torch.jit.trace(module, x)


def scripted(module, x):
    return torch.jit.script(module)


def exported(module, x):
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return torch.export.export(module, (x,), dynamic_shapes=(sizes,)).module()


def onnx(module, x, axes=(2, 3)):
    """An ONNX Runtime session as a function of a tensor."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(
        module,
        (x,),
        file,
        dynamo=False,
        input_names=["image"],
        dynamic_axes={"image": {axis: f"side{axis}" for axis in axes}},
        opset_version=17,  # RoIAlign as detectron2 has it came with 16
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(v) for v in session.run(None, {"image": x.numpy()})]


@pytest.mark.parametrize("export", [traced, exported, onnx])
def test_backbone(export, images):
    check_backbone(export, images)


def test_backbone_by_scripting(images, export_tools):
    check_backbone(scripted, images)


def check_backbone(export, images, exported_module=None, tolerance=0.0):
    """An exported backbone, by default the model's own, against the model's."""
    module = Backbone(detector().backbone).eval()
    run = export(exported_module or module, images[0][None])
    # The ONNX exporter folds norms into convolutions, which rounds.
    tolerance = 1e-5 if export is onnx else tolerance
    for image in images:
        actual, expected = run(image[None]), module(image[None])
        actual = actual[0] if isinstance(actual, list) else actual
        assert actual.shape == expected.shape and expected.std() > 1e-3
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("export", [traced, exported, onnx])
def test_backbone_with_folded_norms(export, images):
    """Exported without a norm left in it, it does what the model did with them."""
    folded = Backbone(fold_norms(detector()).backbone).eval()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    check_backbone(export, images, folded, 1e-5)


def inference(model, inputs):
    return model.inference(inputs, do_postprocess=False)


def check(actual, expected):
    assert len(actual) == len(expected) > 0
    assert torch.equal(actual.pred_classes, expected.pred_classes)
    for name in ("scores", "pred_masks"):
        assert torch.allclose(actual.get(name), expected.get(name), atol=1e-4)
    boxes = actual.pred_boxes.tensor, expected.pred_boxes.tensor
    assert torch.allclose(*boxes, atol=1e-2)  # pixels


@pytest.mark.parametrize("export", [traced, onnx])
def test_detector_by_tracing(export, images, export_tools):
    model = detector()
    adapter = export_tools.TracingAdapter(model, [{"image": images[0]}], inference).eval()
    with export_tools.torchscript_patch.patch_builtin_len():
        run = (
            export(adapter, images[0], axes=(1, 2))
            if export is onnx
            else export(adapter, images[0])
        )
    for image in images:
        (actual,) = adapter.outputs_schema(run(image))
        check(actual, inference(model, [{"image": image}])[0])


def test_detector_by_scripting(images, export_tools):
    model = detector()
    tensors = ("objectness_logits", "scores", "pred_classes", "pred_masks")
    fields = {"proposal_boxes": Boxes, "pred_boxes": Boxes, **dict.fromkeys(tensors, torch.Tensor)}
    run = export_tools.scripting_with_instances(model, fields)
    for image in images:
        (actual,) = run.inference([{"image": image}], do_postprocess=False)
        check(convert_scripted_instances(actual), inference(model, [{"image": image}])[0])


@pytest.mark.parametrize("norm", ["RefBN", "SyncRefBN", "BRN", "MABN"])
def test_a_scripted_norm_evaluates_and_does_not_train(norm):
    """It says so; it does not normalize by something else."""
    layer = NORM_TYPES[norm].build(3).eval()
    layer.running_mean.normal_()
    script, x = torch.jit.script(layer), torch.randn(2, 3, 4, 4)
    assert torch.equal(script(x), layer(x))
    script.train()
    with pytest.raises(torch.jit.Error, match="cannot be run"):
        script(x)
