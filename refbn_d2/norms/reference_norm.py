"""ReferenceNorm2d, the base of every norm that holds a reference."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..log import get_logger
from .batch_norm_like import BatchNormLike2d, BufferNote, holds, note
from .functional import BatchStatistics, batch_statistics, statistics_dtype
from .moments import Gather, Moments
from .processes import agreement_group, all_gather, warn_of_own_references

__all__ = ["ReferenceNorm2d"]

logger = get_logger(__name__)

_REFERENCE_KEYS = ("ref_mean", "ref_var", "ref_captured", "ref_size")


class _HostNotes:
    """What the host remembers about the device buffer ``ref_captured``, to avoid reading it.

    Attributes:
        captured: Note of the buffer, made when it was last known to be 1. The buffer is
            authoritative: when it has changed, the note no longer holds and is ignored.
        looked: Whether a training step has read the buffer before.
    """

    def __init__(self):
        self.captured: Optional[BufferNote] = None
        self.looked = False


class ReferenceNorm2d(BatchNormLike2d):
    """A BatchNorm2d that also holds the statistics of one fixed reference batch.

    It has BatchNorm's parameters and buffers under BatchNorm's names, and loads a
    BatchNorm state dict without an error (it then has no reference). Evaluation is BatchNorm's: one
    affine map per channel by the running statistics.

    Subclasses define in :meth:`_normalize` how a training batch is normalized by the reference.

    **State.** The buffers contain the whole state of the reference. Everything that writes them, in
    place or by replacing the tensors, sets or drops the reference: a state dict, a distributed
    checkpoint, an average of models, DistributedDataParallel's broadcast, a replica of
    DataParallel, ``torch.func.functional_call``.

    A training step must not wait for the device to read ``ref_captured``. The host therefore
    remembers the version of the buffer (``Tensor._version``, which is known on the host) at which
    the layer had a reference. While the version is the same, a step uses the reference. If it
    differs, the first such step of a layer reads the buffer once; in later steps the device selects
    the reference or the batch statistics (``torch.where``).

    Writes through ``tensor.data`` do not change the version. After such a write that *drops* the
    reference, call :meth:`drop_reference`. Under ``torch.compile`` only ``load_state_dict`` and
    :meth:`drop_reference` can drop a reference that the layer has used.

    Buffers:
        ref_mean: Mean of the reference batch, shape (num_features,) (eq. 11).
        ref_var: Biased variance of the reference batch, shape (num_features,) (eq. 12).
        ref_captured: Floating-point scalar, 1 if the layer has a reference, else 0. It is not a
            bool, as it was in version 0.1, so that models can be averaged; an average of 1/2 or
            more counts as captured.
        ref_size: Floating-point scalar, number of samples in the reference batch; 0 if unknown.
    """

    _fallback_logged = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        *,
        device=None,
        dtype=None,
        **kwargs,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, **factory, **kwargs)
        self.register_buffer("ref_mean", torch.zeros(num_features, **factory))
        self.register_buffer("ref_var", torch.ones(num_features, **factory))
        self.register_buffer("ref_captured", torch.zeros((), **factory))
        self.register_buffer("ref_size", torch.zeros((), **factory))
        self._notes = _HostNotes()
        # Set while norms.capture() runs.
        self._moments: Optional[Moments] = None

    @property
    def has_reference(self) -> bool:
        """Whether the layer has a reference. Reading the buffer waits for its device."""
        return bool(self.ref_captured >= 0.5)

    @torch.no_grad()
    def set_reference(
        self, mean: Tensor, var: Tensor, count: Optional[int] = None, size: int = 0
    ) -> None:
        """Sets the reference.

        Args:
            mean: Mean of the reference batch, shape (num_features,) (eq. 11).
            var: Biased variance of the reference batch, shape (num_features,) (eq. 12).
            count: Number of elements per channel in the reference batch; None if unknown.
            size: Number of samples (images, RoIs) in the reference batch; 0 if unknown.

        Raises:
            ValueError: If :meth:`check_reference` rejects ``count`` or ``size``.
        """
        self.check_reference(count, size)
        self.ref_mean.copy_(mean)
        self.ref_var.copy_(var)
        self.ref_size.fill_(size)
        self.ref_captured.fill_(1)
        self._note_captured()

    def check_reference(self, count: Optional[int], size: int) -> None:
        """Raises a ValueError if a reference from so few values would be unusable.

        Args:
            count: Number of elements per channel in the reference batch; None if unknown.
            size: Number of samples in the reference batch; 0 if unknown.
        """
        if count == 1:
            raise ValueError(
                f"{self!r}: a reference needs more than 1 value per channel, got 1; "
                "use a larger reference batch"
            )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "ref_captured" in self._buffers:  # the base class calls this before they exist
            self.drop_reference()

    @torch.no_grad()
    def drop_reference(self) -> None:
        """Removes the reference, as if none had been captured."""
        self.ref_mean.zero_()
        self.ref_var.fill_(1)
        self.ref_size.zero_()
        self.ref_captured.zero_()
        self._notes.captured = None

    def _note_captured(self) -> None:
        if not torch.compiler.is_compiling():
            self._notes.captured = note(self.ref_captured)

    def _is_noted(self) -> bool:
        """Whether the host knows, without waiting for the device, that there is a reference."""
        if torch.compiler.is_compiling():
            return self._notes.captured is not None
        return holds(self._notes.captured, self.ref_captured)

    def _by_running_stats(self) -> bool:
        return self._moments is None and not self.training and self.running_mean is not None

    @torch.jit.unused
    def _forward_by_batch(self, x: Tensor) -> Tensor:
        self._check_channels(x)
        if self._moments is not None:
            return self._capture(x)
        if not self._is_noted():
            self._provide_reference(x)
        if x.numel() == 0:
            return self._affine(x)
        return self._normalize(x)

    def _check_channels(self, x: Tensor) -> None:
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels, got an input of shape {tuple(x.shape)}"
            )

    def _normalize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _affine(self, x: Tensor, mean: Optional[Tensor] = None, var: Optional[Tensor] = None):
        """gamma (x - mean) / sqrt(var + eps) + beta. For empty x the gradients are zeros."""
        mean = self.ref_mean if mean is None else mean.to(self.ref_mean.dtype)
        var = self.ref_var if var is None else var.to(self.ref_var.dtype)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    def _capture(self, x: Tensor) -> Tensor:
        self._moments.add(x)
        return self._affine(x, self._moments.mean, self._moments.var)

    @torch.no_grad()
    def _provide_reference(self, x: Tensor) -> None:
        """Takes the statistics of x as the reference if the layer has none."""
        count = x.numel() // x.shape[1]
        held, group = None, None
        if not torch.compiler.is_compiling():
            group = agreement_group() if self.training else None
            # Reading the buffer waits for the device. If training has read it before and the note
            # still does not match, something rewrites the buffer, perhaps in every step. Then read
            # it only if the host needs the answer: for a collective call, or for an error about a
            # batch with too few values.
            if not (self._notes.looked and self.training and group is None and count > 1):
                held = self._read()
                self._notes.looked = True
        if held is None:
            if self.training and count > 0:
                self._choose_reference(batch_statistics(x))
        elif held:
            self._note_captured()
        elif group is not None:
            self._take_together(x, all_gather(group))
        elif count > 0:
            self._take_reference(batch_statistics(x))
            warn_of_own_references()

    def _read(self) -> Optional[bool]:
        """:attr:`has_reference`, or None if the buffer has no values (meta device, tracing)."""
        try:
            return self.has_reference
        except RuntimeError:
            return None

    def _choose_reference(self, batch: BatchStatistics) -> None:
        """Sets the reference to the batch's statistics if there is none, decided on the device."""
        held = self.ref_captured >= 0.5
        for buffer, value in ((self.ref_mean, batch.mean), (self.ref_var, batch.var)):
            buffer.copy_(torch.where(held, buffer, value.to(buffer.dtype)))
        size = torch.full_like(self.ref_size, batch.samples)
        self.ref_size.copy_(torch.where(held, self.ref_size, size))
        self.ref_captured.fill_(1)
        self._note_captured()

    def _take_together(self, x: Tensor, gather: Gather) -> None:
        """Takes the first batches of all processes together as the reference of each process."""
        moments = Moments(gather)
        moments.add(x)
        if moments.count > 0:
            dtype = statistics_dtype(x)
            mean, var = moments.mean.to(dtype), moments.var.to(dtype)
            self._take_reference(BatchStatistics(moments.samples, moments.count, mean, var))

    def _take_reference(self, batch: BatchStatistics) -> None:
        """Takes a training batch as the reference, because none was captured before training."""
        if not self.training:
            raise ValueError(
                f"{self!r}: no reference is captured, and evaluation without running statistics "
                "needs one; capture a reference batch, or set track_running_stats=True"
            )
        if batch.count == 1:
            raise ValueError(
                f"{self!r}: no reference is captured, and this batch cannot become one because it "
                "has only 1 value per channel; capture a reference batch before training"
            )
        if not ReferenceNorm2d._fallback_logged:
            ReferenceNorm2d._fallback_logged = True
            logger.warning(
                "No reference was captured before training: each layer takes the first batch it "
                "sees as its reference. To choose the reference batch, call "
                "refbn_d2.capture_reference(model, batch) before training."
            )
        self.set_reference(batch.mean, batch.var, batch.count, batch.samples)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._notes.captured = None
        # num_batches_tracked is not required, because old checkpoints do not have it.
        names = (*self._parameters, *self._buffers)
        names = [n for n in names if n not in (*_REFERENCE_KEYS, "num_batches_tracked")]
        wanted = [prefix + n for n in names if getattr(self, n) is not None]
        found = [state_dict[k] for k in wanted if k in state_dict]
        if any(prefix + k in state_dict for k in _REFERENCE_KEYS):
            self._complete_version_0_1(state_dict, prefix)
        elif not wanted:  # the layer has no BatchNorm state, so the state dict need not mention it
            state_dict.update({prefix + k: getattr(self, k) for k in _REFERENCE_KEYS})
        elif len(found) == len(wanted):
            # A BatchNorm checkpoint. Drop the reference, which belongs to the previous weights.
            for k in _REFERENCE_KEYS:
                empty = torch.ones_like if k == "ref_var" else torch.zeros_like
                state_dict[prefix + k] = empty(getattr(self, k), device=found[0].device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _complete_version_0_1(self, state_dict, prefix: str) -> None:
        """Converts a state dict of version 0.1 in place.

        There ref_captured was a bool, and only VBN had ref_size, as an integer.
        """
        captured = state_dict.get(prefix + "ref_captured")
        if captured is None:
            return
        dtype = self.ref_captured.dtype
        state_dict[prefix + "ref_captured"] = captured.to(dtype)
        size = state_dict.get(prefix + "ref_size", torch.zeros_like(captured))
        state_dict[prefix + "ref_size"] = size.to(dtype)

    def __getstate__(self):
        # The notes refer to the tensors of this object; a copy has different tensors.
        return {k: v for k, v in self.__dict__.items() if k != "_notes"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._notes = _HostNotes()

    def extra_repr(self) -> str:
        held = {True: "captured", False: "not captured", None: "unknown"}[self._read()]
        return f"{super().extra_repr()}, reference={held}"
