"""Measures the cost of norms: time relative to BatchNorm and to memory bandwidth, and memory."""

import copy
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..norms import EvalRefBatchNorm2d, RefBatchNorm2d, ReferenceNorm2d, ref_batch_norm

__all__ = [
    "DETECTOR_SHAPES",
    "RESNET_SHAPES",
    "MeasuringEvalRefBatchNorm2d",
    "PlainRefBatchNorm2d",
    "SyncKernelsBatchNorm2d",
    "compiled_ref_batch_norm",
    "layer_times",
    "model_times",
]

Shape = Tuple[int, int, int, int]

# (channels, height, width) of the norms in the backbone of Mask R-CNN R50-C4, for an image of
# 800 x 1216 pixels.
_BACKBONE = [
    (64, 400, 608),
    (64, 200, 304),
    (256, 200, 304),
    (128, 100, 152),
    (512, 100, 152),
    (256, 50, 76),
    (1024, 50, 76),
]
# The same for res5, which runs on 512 RoIs per image.
_ROI_HEAD = [(512, 7, 7), (2048, 7, 7)]
DETECTOR_SHAPES: Dict[int, List[Shape]] = {
    images: [(images, *s) for s in _BACKBONE] + [(512 * images, *s) for s in _ROI_HEAD]
    for images in (1, 2, 4)
}
RESNET_SHAPES: Dict[int, List[Shape]] = {
    batch: [
        (batch, 64, 112, 112),
        (batch, 64, 56, 56),
        (batch, 256, 56, 56),
        (batch, 512, 28, 28),
        (batch, 1024, 14, 14),
        (batch, 2048, 7, 7),
    ]
    for batch in (32, 128)
}

# Number of tensors that a norm must read or write: forward reads x twice and writes y; backward
# reads x and g twice and writes dx.
_TRAFFIC = {"forward": 3, "backward": 5, "both": 8}


class PlainRefBatchNorm2d(RefBatchNorm2d):
    """RefBN by the paper's formulas, differentiated by autograd: a straightforward baseline."""

    def _normalize(self, x: Tensor) -> Tensor:
        lambda1 = self.pseudo_count / (x.shape[0] + self.pseudo_count)
        mean_b = x.mean(dim=(0, 2, 3))
        var_b = (x - mean_b.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
        mean = (1 - lambda1) * mean_b + lambda1 * self.ref_mean
        var = (1 - lambda1) * var_b + lambda1 * self.ref_var
        x_hat = (x - mean.view(1, -1, 1, 1)) / (var + self.eps).sqrt().view(1, -1, 1, 1)
        return self.weight.view(1, -1, 1, 1) * x_hat + self.bias.view(1, -1, 1, 1)


class SyncKernelsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm in training with the kernels of SyncBatchNorm (on CUDA), on one process."""

    def forward(self, x: Tensor) -> Tensor:
        unused = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        return ref_batch_norm(x, *unused, self.weight, self.bias, 0.0, self.eps)[0]


class MeasuringEvalRefBatchNorm2d(EvalRefBatchNorm2d):
    """EvalRefBN that measures its weight in each training step, which it does in every 16th."""

    def _measures(self) -> bool:
        return True


def compiled_ref_batch_norm(channels: int) -> RefBatchNorm2d:
    """RefBN compiled by torch.compile for one shape, which takes about 10 s."""
    torch._dynamo.reset()  # otherwise torch.compile gives up after eight shapes
    norm = RefBatchNorm2d(channels)
    norm.compile(dynamic=False)
    return norm


def _prepared(build: Callable[[int], nn.Module], x: Tensor) -> nn.Module:
    channels = x.shape[1]
    norm = build(channels)
    if isinstance(norm, ReferenceNorm2d):
        norm.set_reference(torch.zeros(channels), torch.ones(channels), 2, 1)
    return norm.to(x.device).train()


def _seconds(call: Callable[[], Any]) -> float:
    cuda = torch.cuda.is_initialized()
    # With one thread, measure CPU time, which does not depend on other processes' load.
    alone = torch.get_num_threads() == 1 and not cuda
    clock = time.process_time if alone else time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    call()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def _peak_bytes() -> int:
    """Peak memory so far: GPU memory if CUDA is in use, else this process's resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _spread(values: Sequence[float]) -> Dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {"median": quartiles[1], "low": quartiles[0], "high": quartiles[2]}


def _bytes_kept(norm: nn.Module, x: Tensor) -> int:
    """Number of bytes that autograd saves for the backward pass, including those of x."""
    kept: Dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # t itself would create a reference cycle with the graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm(x)
    return sum(kept.values())


def layer_times(
    norms: Dict[str, Callable[[int], nn.Module]],
    shape: Shape,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    repeats: int,
    device: str = "cpu",
) -> Dict[str, Dict[str, Any]]:
    """Times a training step of single layers.

    Each round runs every norm once, in random order.

    Args:
        norms: Constructors by name, each of which takes the number of channels. "BN" is required,
            because the others are compared with it.
        shape: Shape (N, C, H, W) of the input.
        memory_format, dtype, device: Memory format, dtype and device of the input.
        repeats: Number of rounds.

    Returns:
        For each norm and each of ``forward``, ``backward`` and ``both``: ``median``, ``low`` and
        ``high`` (median and quartiles in seconds), ``ratio`` (median over rounds of the time
        divided by BN's time in the same round) and ``floor_ratio`` (median time divided by the time
        of the minimal memory traffic at the measured copy bandwidth). For each norm also
        ``bytes_kept``, the bytes saved for the backward pass.
    """
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=memory_format)
    x.requires_grad_()
    g = torch.randn(shape).to(device, dtype).contiguous(memory_format=memory_format)
    target = torch.empty_like(g)
    layers = {name: _prepared(build, x) for name, build in norms.items()}
    times: Dict[str, Dict[str, List[float]]] = {n: {"forward": [], "backward": []} for n in layers}
    copies, order = [], random.Random(0)
    for round_ in range(-1, repeats):
        copy_ = _seconds(lambda: target.copy_(g))
        if round_ >= 0:
            copies.append(copy_)
        # Random order, because a norm's time depends on the allocator's state after the previous.
        for name, layer in order.sample(list(layers.items()), len(layers)):
            x.grad = None
            outputs: List[Tensor] = []
            forward = _seconds(partial(_apply, layer, x, outputs))
            backward = _seconds(partial(outputs[0].backward, g))
            if round_ >= 0:  # the first round warms up
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
    for t in times.values():
        t["both"] = [f + b for f, b in zip(t["forward"], t["backward"])]
    access = statistics.median(copies) / 2
    return {
        name: {
            "bytes_kept": _bytes_kept(layer, x),
            **{
                what: {
                    **_spread(times[name][what]),
                    "ratio": _median_ratio(times[name][what], times["BN"][what]),
                    "floor_ratio": statistics.median(times[name][what]) / (traffic * access),
                }
                for what, traffic in _TRAFFIC.items()
            },
        }
        for name, layer in layers.items()
    }


def _apply(layer: nn.Module, x: Tensor, outputs: List[Tensor]) -> None:
    outputs.append(layer(x))


def _median_ratio(values: Sequence[float], yardstick: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, yardstick))


_CHILD = """
import sys
from refbn_d2.benchmarks.norm_cost import _serve
_serve(*sys.argv[1:])
"""


def _scenes(cfg, images: int, size: Tuple[int, int]) -> List[Dict[str, Any]]:
    """Training input: noise images with 8 objects each. The cost does not depend on the pixels."""
    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

    generator = torch.Generator().manual_seed(0)
    height, width = size
    scenes = []
    for _ in range(images):
        corner = torch.rand(8, 2, generator=generator) * 0.6
        boxes = torch.cat([corner, corner + 0.3], 1) * torch.tensor([width, height] * 2)
        instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.arange(8))
        if cfg.INPUT.MASK_FORMAT == "bitmask":
            masks = torch.zeros(8, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(masks)
        else:
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].numpy()
            instances.gt_masks = PolygonMasks([[c] for c in corners])
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        scenes.append({"image": image, "instances": instances, "height": height, "width": width})
    return scenes


def _serve(config: str, images: str, height: str, width: str, *opts: str) -> None:
    """Reads "step" or "inference" lines from standard input, runs each, and prints its cost.

    An output line has the seconds and the peak memory in bytes.
    """
    from detectron2.utils.events import EventStorage

    from ..config import load_config
    from ..engine import Trainer

    cfg = load_config(config, list(opts))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    # Copied before any training step: all norms then have the same statistics and detections.
    frozen = copy.deepcopy(model).eval()
    optimizer = Trainer.build_optimizer(cfg, model)
    batch = _scenes(cfg, int(images), (int(height), int(width)))

    def step() -> None:
        torch.manual_seed(0)
        losses = sum(model(batch).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

    def inference() -> None:
        with torch.no_grad():
            frozen(batch[:1])

    with EventStorage():
        calls = {"inference": inference, "step": step}
        for call in calls.values():
            call()
        print("ready", flush=True)
        for line in sys.stdin:
            print(_seconds(calls[line.strip()]), _peak_bytes(), flush=True)


def model_times(
    config: str,
    norms: Sequence[str],
    images: int,
    size: Tuple[int, int],
    opts: Sequence[str],
    repeats: int,
    keys: Sequence[str] = ("MODEL.RESNETS.NORM",),
) -> Dict[str, Dict[str, Any]]:
    """Times whole models in alternation, each in its own process.

    Args:
        config: Path of the model's config file.
        norms: Values of ``keys``. The others are compared with the first.
        images: Number of images in a training step; inference uses one.
        size: Height and width of an image.
        opts: KEY VALUE pairs that override the config for all norms.
        repeats: Number of rounds.
        keys: Config keys that are set to the norm.

    Returns:
        For each norm and each of ``step`` and ``inference``: ``median``, ``low`` and ``high``
        (median and quartiles in seconds) and ``ratio`` (median over rounds of the time divided by
        the first norm's time in the same round). For each norm also ``peak_bytes`` of memory.
    """
    arguments = [str(v) for v in (images, *size)]
    children = {
        norm: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _CHILD, config, *arguments, *opts]
            + [word for key in keys for word in (key, norm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        for norm in norms
    }
    seconds: Dict[str, Dict[str, List[float]]] = {
        name: {"step": [], "inference": []} for name in children
    }
    peak: Dict[str, int] = {}
    try:
        for child in children.values():
            while child.stdout.readline().strip() != "ready":
                if child.poll() is not None:
                    raise RuntimeError(f"the benchmark process ended: {child.args!r}")
        for _ in range(repeats):
            for name, child in children.items():
                for what, values in seconds[name].items():
                    child.stdin.write(f"{what}\n")
                    child.stdin.flush()
                    time_, bytes_ = child.stdout.readline().split()
                    values.append(float(time_))
                    peak[name] = int(bytes_)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    first = seconds[norms[0]]
    return {
        name: {
            "peak_bytes": peak[name],
            **{
                what: {**_spread(values), "ratio": _median_ratio(values, first[what])}
                for what, values in times.items()
            },
        }
        for name, times in seconds.items()
    }
