"""Measuring what a norm costs: time against BatchNorm and the memory bandwidth, bytes kept."""

import copy
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..norms import RefBatchNorm2d, ReferenceNorm2d, ref_batch_norm

__all__ = [
    "DETECTOR_SHAPES",
    "RESNET_SHAPES",
    "PlainRefBatchNorm2d",
    "SyncKernelsBatchNorm2d",
    "compiled_ref_batch_norm",
    "layer_times",
    "model_times",
]

Shape = Tuple[int, int, int, int]

# Channels, height, width of the norms of Mask R-CNN R50-C4 at 800 x 1216: the backbone, an image.
_BACKBONE = [
    (64, 400, 608),
    (64, 200, 304),
    (256, 200, 304),
    (128, 100, 152),
    (512, 100, 152),
    (256, 50, 76),
    (1024, 50, 76),
]
# res5 on 512 RoIs of an image.
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

# A norm must read x twice and write y, then read x and g twice and write dx.
_TRAFFIC = {"forward": 3, "backward": 5, "both": 8}


class PlainRefBatchNorm2d(RefBatchNorm2d):
    """RefBN as the paper writes it, left to autograd: what a first implementation costs."""

    def _normalize(self, x: Tensor) -> Tensor:
        lambda1 = self.pseudo_count / (x.shape[0] + self.pseudo_count)
        mean_b = x.mean(dim=(0, 2, 3))
        var_b = (x - mean_b.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
        mean = (1 - lambda1) * mean_b + lambda1 * self.ref_mean
        var = (1 - lambda1) * var_b + lambda1 * self.ref_var
        x_hat = (x - mean.view(1, -1, 1, 1)) / (var + self.eps).sqrt().view(1, -1, 1, 1)
        return self.weight.view(1, -1, 1, 1) * x_hat + self.bias.view(1, -1, 1, 1)


class SyncKernelsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm in training on the kernels that SyncBatchNorm uses on CUDA; one process."""

    def forward(self, x: Tensor) -> Tensor:
        unused = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        return ref_batch_norm(x, *unused, self.weight, self.bias, 0.0, self.eps)[0]


def compiled_ref_batch_norm(channels: int) -> RefBatchNorm2d:
    """RefBN as torch.compile makes it, for one shape; compiling takes some 10 s each."""
    torch._dynamo.reset()  # or it stops to compile after eight shapes
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
    # With one thread, the time of the CPU: what else runs on the machine does not lengthen it.
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
    """Of memory so far: of the GPU if it is in use, else resident memory of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _spread(values: Sequence[float]) -> Dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {"median": quartiles[1], "low": quartiles[0], "high": quartiles[2]}


def _bytes_kept(norm: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps for backward, x's own included."""
    kept: Dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # t holds the graph, which would hold t, for ever

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
    """Times a training step of single layers: in every round each norm once, in random order.

    Args:
        norms: constructors that take the number of channels, by name; "BN" is the yardstick.
        shape: (N, C, H, W) of the input.
        memory_format, dtype, device: of the input.
        repeats: rounds.

    Returns:
        For each norm, for ``forward``, ``backward`` and ``both``: ``median``, ``low`` and ``high``
        (seconds, quartiles), ``ratio`` (median over rounds, against BN of the same round) and
        ``floor_ratio`` (against the least traffic at the measured copy bandwidth). Further
        ``bytes_kept`` for backward.
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
        # The allocator's state after one norm decides how another finds it: none is always first.
        for name, layer in order.sample(list(layers.items()), len(layers)):
            x.grad = None
            outputs: List[Tensor] = []
            forward = _seconds(lambda layer=layer, outputs=outputs: outputs.append(layer(x)))
            backward = _seconds(lambda outputs=outputs: outputs[0].backward(g))
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


def _median_ratio(values: Sequence[float], yardstick: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, yardstick))


_CHILD = """
import sys
from refbn_d2.benchmarks.norm_cost import _serve
_serve(*sys.argv[1:])
"""


def _scenes(cfg, images: int, size: Tuple[int, int]) -> List[Dict[str, Any]]:
    """Training input of noise with 8 objects each: the arithmetic does not depend on the data."""
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
    """Runs what each line on standard input says, a step or an inference; prints its seconds."""
    from detectron2.utils.events import EventStorage

    from ..config import load_config
    from ..engine import Trainer

    cfg = load_config(config, list(opts))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    # Before any step the statistics of all norms are the same: so are the detections.
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
    """Times whole models, interleaved, each in a process of its own.

    Args:
        config: config file of the model.
        norms: values of ``keys``; the first is what the others are divided by.
        images: of a training step; inference is of one.
        size: height and width of an image.
        opts: KEY VALUE pairs for all.
        repeats: rounds.
        keys: of the config, which a norm is set in.

    Returns:
        For each norm, for ``step`` and ``inference``: ``median``, ``low``, ``high`` (seconds,
        quartiles) and ``ratio`` (median over rounds, against the first of the same round). Further
        ``peak_bytes`` of memory.
    """
    arguments = [str(v) for v in (images, *size)]
    children = {
        norm: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _CHILD, config, *arguments, *opts]
            + [word for key in keys for word in (key, norm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for norm in norms
    }
    seconds = {name: {"step": [], "inference": []} for name in children}
    peak: Dict[str, int] = {}
    try:
        for child in children.values():
            while child.stdout.readline().strip() != "ready":
                if child.poll() is not None:
                    raise RuntimeError(f"the benchmark process ended: {child.args}")
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
