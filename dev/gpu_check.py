#!/usr/bin/env python3
"""Tests and measures the norms on a GPU, in less than 8 minutes.

    dev/gpu_check.py --output output/gpu-check      on a GPU (make gpu-check)
    dev/gpu_check.py --device cpu --quick           the same code at tiny sizes, without a GPU

It compares the kernels, activation checkpointing and mixed precision with float64, and measures the
time and memory of layers, of whole detectors and of the loader. It writes gpu_check.json and
gpu_check.md. On a CPU the Triton kernels run under Triton's interpreter, and times mean nothing.

Each part runs in a process of its own, so an illegal memory access or a hang in one part does not
affect the others. The exit status is 1 if a check of correctness fails or a part ends with an
error. A missed target for time or memory is reported as a failure but does not change the exit
status.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from benchmark import DTYPES, FORMATS, MODEL_OPTS
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refbn_d2 import get_config_file
from refbn_d2.benchmarks.norm_cost import DETECTOR_SHAPES, layer_times, model_times
from refbn_d2.errors import UserError, one_line_errors
from refbn_d2.io.atomic import atomic_write
from refbn_d2.norms import RefBatchNorm2d, functional
from refbn_d2.norms.kernels import Kernels
from refbn_d2.norms.kernels.cpu_aten import CpuAten
from refbn_d2.norms.kernels.cuda_aten import CudaAten
from refbn_d2.norms.kernels.formulas import Fallback, Formulas
from refbn_d2.norms.moments import Moments
from refbn_d2.norms.table import NORM_TYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import oracle  # noqa: E402  (of the tests: the paper's equations)
import tiny  # noqa: E402

TIME_LIMIT = 240  # seconds for a part, so that a part that hangs leaves time for the others


class Settings(NamedTuple):
    """The device and the sizes.

    Attributes:
        device: "cuda" or "cpu".
        quick: Whether to use tiny sizes and few repetitions, whose times mean nothing.
    """

    device: str
    quick: bool

    @property
    def judges_cost(self) -> bool:
        """Whether times and memory are compared with their targets."""
        return self.device == "cuda" and not self.quick


class Outcome(NamedTuple):
    """The result of a part.

    Attributes:
        passed: Whether its checks have passed and its targets are met.
        summary: One sentence.
        rows: Table for a reader, with the same keys in each row.
        details: Everything that was measured, for JSON.
    """

    passed: bool
    summary: str
    rows: List[Dict[str, Any]]
    details: Any = None


# The machine.


def describe_machine(settings: Settings) -> Outcome:
    found = {"torch": torch.__version__, "CPU cores": os.cpu_count()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
            driver = answer.stdout.splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            driver = "unknown: nvidia-smi gives no answer"
        found.update(
            {
                "device": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory (GB)": round(properties.total_memory / 1e9, 1),
                "driver": driver,
                "CUDA": torch.version.cuda,
                "cuDNN": torch.backends.cudnn.version(),
                "copy (GB/s)": round(_copy_bandwidth() / 1e9),
            }
        )
    else:
        found["device"] = "cpu"
    rows = [{"what": k, "value": v} for k, v in found.items()]
    return Outcome(True, f"{found['device']}, torch {found['torch']}", rows, found)


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 512 MB on the GPU."""
    source = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * source.numel() / statistics.median(seconds)


# Correctness of the sets of kernels.

# Largest allowed error, relative to the largest value. A result is rounded once to its dtype;
# vectors are float32 for each of these dtypes.
TOLERANCE = {"float32": 5e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
# Rows shorter and longer than a tile, too few channels for a tile, one value per channel.
SHAPES = [(4, 3, 5, 7), (1, 3, 1, 1)]
GPU_SHAPES = [(2, 33, 3, 3), (3, 33, 40, 30), (64, 128, 7, 7), (1, 256, 50, 76), (2, 64, 200, 304)]
RESULTS = ("y", "mean", "var", "dx", "dweight", "dbias")
VECTORS = ("mean", "var", "dweight", "dbias")  # float32


@contextlib.contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Makes every norm calculate with ``kernels``."""
    chosen = functional.kernels_for
    functional.kernels_for = lambda x: kernels
    try:
        yield
    finally:
        functional.kernels_for = chosen


def aten_kernels(settings: Settings) -> Kernels:
    """PyTorch's pieces for the device: the default on CUDA."""
    return CudaAten() if settings.device == "cuda" else CpuAten()


def triton_kernels() -> Kernels:
    from refbn_d2.norms.kernels.cuda_triton import CudaTriton  # Triton may not be installed

    return CudaTriton()


def _whole(x: Tensor, reference: Sequence[Tensor], affine: Sequence[Tensor], g: Tensor):
    """The RESULTS of RefBN for a batch that is on one process."""
    y, mean, var = functional.ref_batch_norm(x, *reference, *affine)
    return (y, mean, var, *torch.autograd.grad(y, (x, *affine), g))


def _pieces(x: Tensor, reference: Sequence[Tensor], affine: Sequence[Tensor], g: Tensor):
    """The same, with statistics that are calculated beforehand."""
    y, mean, var = functional.mixed_norm(x, functional.batch_statistics(x), *reference, *affine)
    return (y, mean, var, *torch.autograd.grad(y, (x, *affine), g))


def _parts(x: Tensor, reference: Sequence[Tensor], affine: Sequence[Tensor], g: Tensor):
    """SyncRefBN of three simulated processes: with one sample, with the others, and with none."""
    sizes = [1, x.shape[0] - 1, 0]
    parts = [p.detach().requires_grad_() for p in x.split(sizes)]
    moments = Moments()
    for part in parts:
        moments.add(part)
    dtype = functional.statistics_dtype(x)
    batch = functional.BatchStatistics(
        moments.samples, moments.count, moments.mean.to(dtype), moments.var.to(dtype)
    )

    def each(all_reduce: Callable[[Tensor], object]) -> List[Tuple[Tensor, ...]]:
        results = []
        for part, part_g in zip(parts, g.split(sizes)):
            y, mean, var = functional.mixed_norm(
                part, batch, *reference, *affine, all_reduce=all_reduce
            )
            results.append((y, mean, var, *torch.autograd.grad(y, (part, *affine), part_g)))
        return results

    sums: List[Tensor] = []
    each(lambda t: sums.append(t.clone()))
    total = torch.stack(sums).sum(0)
    y, mean, var, dx, dweight, dbias = zip(*each(lambda t: t.copy_(total)))
    y, dx = (torch.cat([part for part in v if len(part)]) for v in (y, dx))
    return y, mean[0], var[0], dx, sum(dweight), sum(dbias)


WAYS = {"RefBN": _whole, "RefBN, pieces": _pieces, "SyncRefBN, 3 parts": _parts}


def check_kernels(sets: Sequence[Kernels], settings: Settings) -> Outcome:
    """Sets of kernels against the paper's equations in float64."""
    torch.manual_seed(0)
    shapes = SHAPES if settings.quick else SHAPES + GPU_SHAPES
    rows = []
    for kernels in sets:
        with using(kernels):
            for dtype in TOLERANCE:
                for layout in FORMATS:
                    for way, norm in WAYS.items():
                        errors = [_errors(norm, s, dtype, layout, settings.device) for s in shapes]
                        worst = {name: _largest(e[name] for e in errors) for name in RESULTS}
                        rows.append(_row(kernels, way, dtype, layout, worst))
            for layout in FORMATS:
                rows.append(_far_from_zero(kernels, layout, settings.device))
                rows.append(_many_elements(kernels, layout, settings))
    failed = sum(not row["passed"] for row in rows)
    names = " and ".join(kernels.name for kernels in sets)
    return Outcome(not failed, f"{names}: {failed} of {len(rows)} cases wrong", rows)


def _largest(values) -> float:
    """The maximum; infinity if there is a NaN, which max() could skip."""
    return max(math.inf if math.isnan(v) else v for v in values)


def _row(
    kernels: Kernels, case: str, dtype: str, layout: str, errors: Dict[str, float]
) -> Dict[str, Any]:
    allowed = {name: TOLERANCE["float32" if name in VECTORS else dtype] for name in errors}
    return {
        "kernels": kernels.name,
        "case": case,
        "dtype": dtype,
        "layout": layout,
        **{name: errors.get(name) for name in RESULTS},
        "passed": all(error <= allowed[name] for name, error in errors.items()),
    }


def _inputs(shape, dtype: str, layout: str, device: str):
    """x, reference, affine and g; the affine parameters are float32, as under autocast."""
    channels = shape[1]
    x = (torch.randn(shape) * 2 + 3).to(device, DTYPES[dtype])
    g = torch.randn(shape).to(device, DTYPES[dtype])
    x, g = (t.contiguous(memory_format=FORMATS[layout]) for t in (x, g))
    reference = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5
    affine = [torch.randn(channels, device=device).requires_grad_() for _ in range(2)]
    return x.requires_grad_(), reference, affine, g


def _wanted(x: Tensor, reference: Sequence[Tensor], affine: Sequence[Tensor], g: Tensor):
    """The RESULTS that follow from the equations, in float64."""
    exact = [t.detach().double().requires_grad_() for t in (x, *affine)]
    y, mean, var = oracle.ref_bn(exact[0], *(v.double() for v in reference), *exact[1:])
    return (y, mean, var, *oracle.gradients(y, g.double(), *exact))


def _relative_errors(actual, wanted, g: Tensor) -> Dict[str, float]:
    unit = float(g.abs().max())  # scale for gradients whose terms cancel
    return {
        name: oracle.relative_error(a, w, unit if name.startswith("d") else 0.0)
        for name, a, w in zip(RESULTS, actual, wanted)
    }


def _errors(norm: Callable, shape, dtype: str, layout: str, device: str) -> Dict[str, float]:
    inputs = _inputs(shape, dtype, layout, device)
    actual = norm(*inputs)
    errors = _relative_errors(actual, _wanted(*inputs), inputs[-1])
    for name, result in zip(RESULTS, actual):
        wanted = torch.float32 if name in VECTORS else DTYPES[dtype]
        if result.dtype != wanted:
            errors[name] = math.inf
    if not actual[0].is_contiguous(memory_format=FORMATS[layout]):
        errors["y"] = math.inf  # wrong, because the next layer would have to copy it
    return errors


def _far_from_zero(kernels: Kernels, layout: str, device: str) -> Dict[str, Any]:
    """Error of the variance if the mean is 100 standard deviations from zero."""
    x = (torch.randn(3, 20, 20, 40) + 100).to(device).contiguous(memory_format=FORMATS[layout])
    wanted = oracle.moments(x.double(), 0, 2, 3)
    errors = [oracle.relative_error(a, w.flatten()) for a, w in zip(kernels.moments(x), wanted)]
    row = _row(kernels, "mean far from zero", "float32", layout, dict(zip(("mean", "var"), errors)))
    return {**row, "passed": errors[0] < 2e-6 and errors[1] < 1e-4}


def _many_elements(kernels: Kernels, layout: str, settings: Settings) -> Dict[str, Any]:
    """Tests tensors that are too large for int32 indices: 2^30 rows and 2^31 elements.

    x and g repeat a tile, so statistics, outputs and gradients of x are those of the tile.
    """
    pixels, repeats = (8, 2) if settings.quick else (1024, 32)
    dtype, case = "bfloat16", f"{2 * (pixels * repeats) ** 2:,} elements"
    tile, reference, affine, tile_g = _inputs(
        (1, 2, pixels, pixels), dtype, layout, settings.device
    )
    row = _row(kernels, case, dtype, layout, {})
    # Memory for x, g, y, dx and copies of them in bfloat16; formulas need several float32 copies.
    needed = (30 if isinstance(kernels, Formulas) else 10) * 4 * (pixels * repeats) ** 2
    if settings.device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        return {**row, "case": f"{case}: not run, needs {needed / 1e9:.0f} GB of free memory"}
    wanted = _wanted(tile, reference, affine, tile_g)
    x, g = (
        t.detach().repeat(1, 1, repeats, repeats).contiguous(memory_format=FORMATS[layout])
        for t in (tile, tile_g)
    )
    actual = _whole(x.requires_grad_(), reference, affine, g)
    errors = dict.fromkeys(("y", "dx"), 0.0)
    for name, result, of_tile in (("y", actual[0], wanted[0]), ("dx", actual[3], wanted[3])):
        for band in result.split(pixels, 2):
            error = oracle.relative_error(band, of_tile.repeat(1, 1, 1, repeats))
            errors[name] = _largest((errors[name], error))
    errors["mean"] = oracle.relative_error(actual[1], wanted[1])
    for k in (4, 5):  # these results are sums over all repetitions
        unit = float(tile_g.abs().max()) * repeats**2
        errors[RESULTS[k]] = oracle.relative_error(actual[k], wanted[k] * repeats**2, unit)
    row = _row(kernels, case, dtype, layout, errors)
    # A wrong position gives a large error. The rounding of a sum of 2^30 terms is not tested.
    return {**row, "passed": _largest(errors.values()) <= TOLERANCE[dtype]}


# Correctness of what training adds: activation checkpointing and mixed precision.

TRAINING_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


def _network(name: str) -> nn.Sequential:
    """A smooth network of convolutions and norms, in which every term of a norm has an effect."""
    norms = [NORM_TYPES[name].build(c) for c in (16, 8)]
    for norm in norms:
        channels = norm.num_features
        statistics_ = torch.randn(channels) * 0.2, torch.rand(channels) * 0.3 + 0.1
        if isinstance(norm, RefBatchNorm2d):
            norm.set_reference(*statistics_, 100, 4)
        else:
            norm.running_mean.copy_(statistics_[0])
            norm.running_var.copy_(statistics_[1])
            norm.num_batches_tracked.fill_(10**6)  # the step at which BRN's correction is largest
    convolutions = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 8, 3, bias=False)
    return nn.Sequential(convolutions[0], norms[0], nn.SiLU(), convolutions[1], norms[1])


def _train(net: nn.Module, x: Tensor, g: Tensor, call: Callable) -> List[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = call(net, x)
    (y * g).sum().backward()
    return [y, x.grad, *(p.grad for p in net.parameters())]


def check_training(settings: Settings) -> Outcome:
    """RefBN and BRN under checkpoint() and autocast against float64 without either, on the CPU."""
    device = settings.device
    calls: Dict[str, Callable] = {"none": lambda net, x: net(x)}
    for reentrant in (False, True):
        calls[f"use_reentrant={reentrant}"] = lambda net, x, r=reentrant: checkpoint(
            net, x, use_reentrant=r
        )
    rows = []
    for name in ("RefBN", "BRN"):
        torch.manual_seed(0)
        net, x, g = _network(name), torch.randn(4, 3, 24, 24), torch.randn(4, 8, 20, 20)
        wanted = _train(copy.deepcopy(net).double(), x.double(), g.double(), calls["none"])
        for dtype, tolerance in TRAINING_TOLERANCE.items():
            for how, call in calls.items():
                copy_ = copy.deepcopy(net).to(device)
                # TF32 has the precision of float16.
                with torch.backends.cudnn.flags(allow_tf32=False):
                    with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
                        actual = _train(copy_, x.to(device), g.to(device), call)
                errors = [oracle.relative_error(a.cpu(), w) for a, w in zip(actual, wanted)]
                wide = all(v.dtype == torch.float32 for v in actual[1:])
                rows.append(
                    {
                        "norm": name,
                        "autocast": "no" if dtype == "float32" else dtype,
                        "checkpointing": how,
                        "y": errors[0],
                        "gradients": _largest(errors[1:]),
                        "passed": wide and _largest(errors) <= tolerance,
                    }
                )
    failed = sum(not row["passed"] for row in rows)
    return Outcome(not failed, f"{failed} of {len(rows)} cases wrong", rows)


# Cost of layers.


class BatchNormWithoutCudnn2d(nn.BatchNorm2d):
    """BatchNorm with PyTorch's own kernels in both passes; the forward pass decides which run."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(x)


def ref_bn_on(kernels: Kernels) -> Callable[[int], nn.Module]:
    """Returns a RefBN that calculates with ``kernels``."""

    class RefBatchNormOnKernels2d(RefBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            with using(kernels):
                return super().forward(x)

    return RefBatchNormOnKernels2d


def _layers(norms: Dict[str, Callable[[int], nn.Module]], settings: Settings):
    """Rows of geometric means over the shapes of R50-C4 with two images, and all measurements."""
    shapes = [(2, 3, 5, 7)] if settings.quick else DETECTOR_SHAPES[2]
    rows, details = [], []
    for dtype in ("float32", "bfloat16"):
        for layout, memory_format in FORMATS.items():
            results = []
            for shape in shapes:
                times = layer_times(
                    norms,
                    shape,
                    memory_format,
                    DTYPES[dtype],
                    3 if settings.quick else 15,
                    settings.device,
                )
                results.append(times)
                details.append({"shape": shape, "dtype": dtype, "layout": layout, "norms": times})
            for name in norms:
                ratios = {
                    what: statistics.geometric_mean(r[name][what]["ratio"] for r in results)
                    for what in ("forward", "backward", "both")
                }
                path = _autograd_node(norms[name], shapes[0], memory_format, dtype, settings.device)
                floor = statistics.geometric_mean(r[name]["both"]["floor_ratio"] for r in results)
                rows.append(
                    {
                        "norm": name,
                        "dtype": dtype,
                        "layout": layout,
                        **ratios,
                        "worst": max(r[name]["both"]["ratio"] for r in results),
                        "of copy bandwidth": 1 / floor,
                        "backward by": path,
                    }
                )
    return rows, details


def _autograd_node(build, shape, memory_format, dtype: str, device: str) -> str:
    """Name of the autograd node, which shows whether BatchNorm calls cuDNN."""
    x = torch.randn(shape).to(device, DTYPES[dtype]).contiguous(memory_format=memory_format)
    return build(shape[1]).to(device)(x).grad_fn.name()


# Targets relative to BatchNorm's time; docs/performance.md has the same targets for the CPU.
LAYER_TARGET = {"NCHW": 1.0, "channels_last": 1.05}


def measure_layers(settings: Settings) -> Outcome:
    """BatchNorm with and without cuDNN, and RefBN on PyTorch's kernels and on formulas."""
    name = aten_kernels(settings).name
    norms = {
        "BN": nn.BatchNorm2d,
        "BN, no cuDNN": BatchNormWithoutCudnn2d,
        f"RefBN, {name}": ref_bn_on(aten_kernels(settings)),
        "RefBN, formulas": ref_bn_on(Fallback()),
    }
    rows, details = _layers(norms, settings)
    ours = [r for r in rows if r["norm"] == f"RefBN, {name}"]
    passed = all(r["both"] <= LAYER_TARGET[r["layout"]] for r in ours)
    worst = max(r["both"] for r in ours)
    summary = f"RefBN takes at most {worst:.2f} of BN's time, as a mean over shapes"
    return Outcome(passed or not settings.judges_cost, summary, rows, details)


def measure_triton(settings: Settings) -> Outcome:
    """The Triton kernels against PyTorch's: layers, then a step of R50-FPN with each."""
    aten, triton = aten_kernels(settings), triton_kernels()
    norms = {"BN": nn.BatchNorm2d, "aten": ref_bn_on(aten), "Triton": ref_bn_on(triton)}
    rows, details = _layers(norms, settings)
    both = {
        name: statistics.geometric_mean(r["both"] for r in rows if r["norm"] == name)
        for name in ("aten", "Triton")
    }
    steps = {}
    for name, value in (("aten", "0"), ("Triton", "1")):
        os.environ["REFBN_TRITON"] = value  # read by the process that model_times starts
        times = _detector("R50-FPN", ["RefBN"], settings)
        steps[name] = times["RefBN"]["step"]["median"]
    # A step is measured, too, because in a step the GPU may or may not wait for launches.
    layers, step = both["Triton"] / both["aten"], steps["Triton"] / steps["aten"]
    faster = layers < 1 and step < 1
    summary = f"Triton takes {layers:.2f} of the time of aten in layers, {step:.3f} in R50-FPN"
    measured = {"layers": details, "steps": steps, "triton_is_faster": faster}
    return Outcome(True, summary, rows, measured)


# Cost of detectors.

_EVERYWHERE = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
# Config, and the keys that a norm is set in.
DETECTORS = {
    "R50-C4": ("COCO-InstanceSegmentation/Base-live-1x.yaml", ["MODEL.RESNETS.NORM"]),
    "R50-FPN": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_refbn.yaml",
        [f"MODEL.{part}.NORM" for part in _EVERYWHERE],
    ),
}
STEP_TARGET, MEMORY_TARGET = 1.01, 1.01  # relative to BatchNorm's


def _detector(name: str, norms: Sequence[str], settings: Settings) -> Dict[str, Dict[str, Any]]:
    config, keys = DETECTORS[name]
    images, size, repeats = (1, (64, 96), 2) if settings.quick else (2, (800, 1216), 12)
    opts = tiny.opts() if settings.quick else []
    opts += ["MODEL.DEVICE", settings.device, *MODEL_OPTS]
    return model_times(get_config_file(config), norms, images, size, opts, repeats, keys)


def measure_detectors(settings: Settings) -> Outcome:
    """A training step of whole detectors from random weights on generated images."""
    rows, details = [], {}
    for detector in DETECTORS:
        times = details[detector] = _detector(detector, ["BN", "RefBN"], settings)
        for norm, t in times.items():
            rows.append(
                {
                    "detector": detector,
                    "norm": norm,
                    "images": 1 if settings.quick else 2,
                    "step (s)": t["step"]["median"],
                    "low": t["step"]["low"],
                    "high": t["step"]["high"],
                    "of BN": t["step"]["ratio"],
                    "inference (s)": t["inference"]["median"],
                    "peak memory (MB)": round(t["peak_bytes"] / 2**20),
                    "memory, of BN": t["peak_bytes"] / times["BN"]["peak_bytes"],
                }
            )
    ours = [r for r in rows if r["norm"] == "RefBN"]
    met = [r["of BN"] <= STEP_TARGET and r["memory, of BN"] <= MEMORY_TARGET for r in ours]
    summary = "; ".join(
        f"{r['detector']}: {r['of BN']:.3f} of BN's time, {r['memory, of BN']:.3f} of its memory"
        for r in ours
    )
    return Outcome(all(met) or not settings.judges_cost, summary, rows, details)


# The loader.


def measure_loader(settings: Settings) -> Outcome:
    """Images per second of the ImageNet loader, from generated JPEG files of 500 x 375 pixels."""
    from benchmark_loader import make_data_set, throughput

    from refbn_d2.data.image_folder import register_image_folders

    batch_size, batches = (4, 2) if settings.quick else (128, 10)
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for k in range(4 if settings.quick else 50):
            # Enlarged noise, because files with pixel noise would be much larger than photos.
            noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            noise.resize((500, 375), Image.BICUBIC).save(photos / f"{k}.jpg", quality=95)
        make_data_set(photos, Path(folder))
        register_image_folders("benchmark", folder)
        for workers in (0, 1) if settings.quick else (0, 1, os.cpu_count()):
            per_second, _ = throughput(workers, batch_size, batches)
            rows.append({"workers": workers, "images/s": round(per_second, 1)})
    best = max(row["images/s"] for row in rows)
    return Outcome(best > 0, f"up to {best:,.0f} images/s", rows)


# All parts.


class Part(NamedTuple):
    title: str
    run: Callable[[Settings], Outcome]


PARTS = {
    "machine": Part("The machine", describe_machine),
    "kernels_aten": Part(
        "Correctness of PyTorch's kernels", lambda s: check_kernels([aten_kernels(s)], s)
    ),
    "kernels_triton": Part(
        "Correctness of the Triton kernels", lambda s: check_kernels([triton_kernels()], s)
    ),
    "kernels_formulas": Part(
        "Correctness of the formulas", lambda s: check_kernels([Formulas(), Fallback()], s)
    ),
    "training": Part("Activation checkpointing and mixed precision", check_training),
    "layers": Part("Layers against BatchNorm", measure_layers),
    "triton": Part("Triton against PyTorch's kernels", measure_triton),
    "detectors": Part("A training step of Mask R-CNN", measure_detectors),
    "loader": Part("The loader", measure_loader),
}
CORRECTNESS = {"training", *(name for name in PARTS if name.startswith("kernels"))}


def _run_part(name: str, settings: Settings, output: Path) -> Dict[str, Any]:
    """Runs a part in a process of its own. If it fails in any way, the error is the result."""
    file, log, start = output / f"{name}.json", output / f"{name}.log", time.perf_counter()
    for earlier in (file, log):
        earlier.unlink(missing_ok=True)
    command = [sys.executable, os.path.abspath(sys.argv[0]), *_options(settings)]
    command += ["--output", str(output), "--part", name]
    environment = dict(os.environ)
    if settings.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    try:
        process = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, timeout=TIME_LIMIT
        )
        if process.returncode == 0:
            result = json.loads(file.read_text())
        else:
            log.write_text(process.stderr)
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            result = _error(f"{last} (exit status {process.returncode}; see {log.name})")
    except subprocess.TimeoutExpired:
        result = _error(f"not done after {TIME_LIMIT} s")
    file.unlink(missing_ok=True)
    return {"title": PARTS[name].title, "seconds": time.perf_counter() - start, **result}


def _options(settings: Settings) -> List[str]:
    return ["--device", settings.device] + ["--quick"] * settings.quick


def _error(message: str) -> Dict[str, Any]:
    return {"status": "error", "summary": message, "rows": [], "details": None}


def _write_part(name: str, settings: Settings, output: Path) -> None:
    outcome = PARTS[name].run(settings)
    status = "pass" if outcome.passed else "fail"
    result = {"status": status, **outcome._asdict()}
    del result["passed"]
    with atomic_write(str(output / f"{name}.json")) as f:
        json.dump(result, f)


def default_kernels(results: Dict[str, Dict[str, Any]], settings: Settings) -> Optional[str]:
    """A sentence on which set should be the default on CUDA; None if this was not measured."""
    if not {"kernels_triton", "triton"} <= results.keys():
        return None
    if not settings.judges_cost:
        return "undecided: that takes a GPU and full sizes"
    if results["kernels_triton"]["status"] != "pass":
        return "cuda_aten: the Triton kernels are not right"
    measured = results["triton"]["details"]
    if measured is None:
        return "cuda_aten: the Triton kernels could not be timed"
    if measured["triton_is_faster"]:
        return "cuda_triton: right, and faster both in layers and in a training step"
    return "cuda_aten: the Triton kernels are not faster both in layers and in a training step"


def is_failure(name: str, result: Dict[str, Any]) -> bool:
    """Whether this result makes the exit status 1."""
    return result["status"] == "error" or (name in CORRECTNESS and result["status"] == "fail")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


def _table(rows: List[Dict[str, Any]]) -> List[str]:
    if not rows:
        return []
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[_cell(v) for v in row.values()] for row in rows]
    return ["", *(f"| {' | '.join(line)} |" for line in cells)]


def markdown(report: Dict[str, Any]) -> str:
    lines = ["# GPU check", ""]
    if report["quick"]:
        lines += ["A rehearsal at tiny sizes: its times mean nothing.", ""]
    lines += [f"`{report['command']}`", "", "| part | result | seconds | |", "|---|---|---:|---|"]
    for r in report["parts"].values():
        lines.append(
            f"| {r['title']} | {r['status']} | {r['seconds']:.0f} | {_cell(r['summary'])} |"
        )
    if report["default_kernels"]:
        lines += ["", f"Default on CUDA: {report['default_kernels']}."]
    for r in report["parts"].values():
        lines += ["", f"## {r['title']}: {r['status']}", "", r["summary"], *_table(r["rows"])]
    return "\n".join(lines) + "\n"


def _save(report: Dict[str, Any], output: Path) -> None:
    with atomic_write(str(output / "gpu_check.json")) as f:
        json.dump(report, f, indent=1)
    with atomic_write(str(output / "gpu_check.md")) as f:
        f.write(markdown(report))


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/gpu-check"), help="folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to try the code itself; always so on a CPU",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args()
    settings = Settings(args.device, args.quick or args.device == "cpu")
    if args.part:
        _write_part(args.part, settings, args.output)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no GPU (see nvidia-smi for the driver); "
            "--device cpu --quick runs the same code without one"
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--output {args.output}: {e.strerror}; name another folder") from None
    report = {
        "command": " ".join(["dev/gpu_check.py", *_options(settings)]),
        "device": args.device,
        "quick": settings.quick,
        "default_kernels": None,
        "parts": {},
    }
    results = report["parts"]
    for name in dict.fromkeys(args.only):
        result = results[name] = _run_part(name, settings, args.output)
        report["default_kernels"] = default_kernels(results, settings)
        _save(report, args.output)  # after each part, so that no measurement is lost
        print(f"{result['status']:5} {name:17} {result['seconds']:4.0f} s  {result['summary']}",
              flush=True)  # fmt: skip
    if report["default_kernels"]:
        print(f"default on CUDA: {report['default_kernels']}")
    print(args.output / "gpu_check.md")
    sys.exit(any(is_failure(name, result) for name, result in results.items()))


if __name__ == "__main__":
    main()
