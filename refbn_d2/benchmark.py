"""Measuring what a norm costs: time against BatchNorm and the memory bandwidth, bytes kept."""

import resource
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from .norms import RefBatchNorm2d, ReferenceNorm2d

__all__ = ["DETECTOR_SHAPES", "RESNET_SHAPES", "PlainRefBatchNorm2d", "layer_times", "model_steps"]

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

# A training step of a norm must read x twice and write y, then read x and g twice and write dx.
_TRAFFIC = 8


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


def _prepared(build: Callable[[int], nn.Module], channels: int) -> nn.Module:
    norm = build(channels)
    if isinstance(norm, ReferenceNorm2d):
        norm.set_reference(torch.zeros(channels), torch.ones(channels), 2, 1)
    return norm.train()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _spread(values: Sequence[float]) -> Dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {"median": quartiles[1], "low": quartiles[0], "high": quartiles[2]}


def _bytes_kept(norm: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps for backward, x's own included."""
    kept: Dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm(x)
    return sum(kept.values())


def layer_times(
    norms: Dict[str, Callable[[int], nn.Module]],
    shape: Shape,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    repeats: int,
) -> Dict[str, Dict[str, Any]]:
    """Times a training step of single layers, interleaved: every round measures each norm once.

    Args:
        norms: constructors that take the number of channels, by name; "BN" is the yardstick.
        shape: (N, C, H, W) of the input.
        memory_format, dtype: of the input.
        repeats: rounds.

    Returns:
        For each norm ``forward``, ``backward``, ``both`` (seconds: median and quartiles), ``ratio``
        (median over rounds of ``both`` against BN of the same round), ``floor_ratio`` (``both``
        against the least traffic at the measured copy bandwidth) and ``bytes_kept``.
    """
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    g = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    target = torch.empty_like(g)
    layers = {name: _prepared(build, shape[1]) for name, build in norms.items()}
    times: Dict[str, Dict[str, List[float]]] = {n: {"forward": [], "backward": []} for n in layers}
    copies = []
    for round_ in range(-1, repeats):
        copy = _seconds(lambda: target.copy_(g))
        if round_ >= 0:
            copies.append(copy)
        for name, layer in layers.items():
            x.grad = None
            outputs: List[Tensor] = []
            forward = _seconds(lambda layer=layer, outputs=outputs: outputs.append(layer(x)))
            backward = _seconds(lambda outputs=outputs: outputs[0].backward(g))
            if round_ >= 0:  # the first round warms up
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
    floor = statistics.median(copies) / 2 * _TRAFFIC
    both = {n: [f + b for f, b in zip(t["forward"], t["backward"])] for n, t in times.items()}
    return {
        name: {
            "forward": _spread(times[name]["forward"]),
            "backward": _spread(times[name]["backward"]),
            "both": _spread(both[name]),
            "ratio": statistics.median(a / b for a, b in zip(both[name], both["BN"])),
            "floor_ratio": statistics.median(both[name]) / floor,
            "bytes_kept": _bytes_kept(layer, x),
        }
        for name, layer in layers.items()
    }


_STEP = """
import sys
from refbn_d2.benchmark import _serve_steps
_serve_steps(*sys.argv[1:])
"""


def _serve_steps(config: str, *opts: str) -> None:
    """Runs a training step for each line on standard input and prints its seconds."""
    from detectron2.utils.events import EventStorage

    from .config import load_config
    from .engine import Trainer

    cfg = load_config(config, list(opts))
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    batch = Trainer.load_reference_batch(cfg)

    def step() -> None:
        losses = sum(model(batch).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

    with EventStorage():
        step()
        print("ready", flush=True)
        for _ in sys.stdin:
            seconds = _seconds(step)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(seconds, peak, flush=True)


def model_steps(
    configs: Dict[str, str], opts: Sequence[str], repeats: int
) -> Dict[str, Dict[str, Any]]:
    """Times training steps of whole models on the CPU, interleaved, each in a process of its own.

    Args:
        configs: config files by name; the first is the yardstick.
        opts: KEY VALUE pairs for all.
        repeats: steps of each.

    Returns:
        For each name ``step`` (seconds: median and quartiles), ``ratio`` (median over rounds
        against the first of the same round) and ``peak_bytes`` of resident memory.
    """
    children = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _STEP, config, "MODEL.DEVICE", "cpu", *opts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, config in configs.items()
    }
    seconds: Dict[str, List[float]] = {name: [] for name in children}
    peak: Dict[str, int] = {}
    try:
        for child in children.values():
            while child.stdout.readline().strip() != "ready":
                if child.poll() is not None:
                    raise RuntimeError(f"the benchmark process ended: {child.args}")
        for _ in range(repeats):
            for name, child in children.items():
                child.stdin.write("\n")
                child.stdin.flush()
                step, bytes_ = child.stdout.readline().split()
                seconds[name].append(float(step))
                peak[name] = int(bytes_)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    first = seconds[next(iter(configs))]
    return {
        name: {
            "step": _spread(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first)),
            "peak_bytes": peak[name],
        }
        for name, values in seconds.items()
    }
