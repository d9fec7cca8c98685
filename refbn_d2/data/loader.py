"""A training loader whose batches depend on a seed only.

A resumed run can therefore continue with the batch at which it was interrupted.
"""

import itertools
import os
import signal
import threading
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple, Union

import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..rng import derived_seed, forked_rng, seed_rng

__all__ = ["TrainLoader"]


class _Seeded(Dataset):
    """Loads an image with a random seed that depends only on its position in the stream."""

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset = dataset
        self._key = seed, comm.get_rank()

    def __getitem__(self, item: Tuple[int, int]) -> Any:
        position, index = item
        seed = derived_seed(*self._key, position)
        if get_worker_info() is not None:  # no other code uses a worker process's random state
            seed_rng(seed)
            return self._dataset[index]
        with forked_rng(seed):
            return self._dataset[index]


def _only_its_parent_ends_it(worker: int) -> None:
    """Makes a worker process ignore SIGTERM, SIGINT and SIGHUP unless its parent sends SIGTERM.

    A scheduler or a terminal sends these signals to all processes of a run. The trainer then
    finishes its step before it stops, and needs the worker until then.
    """
    if hasattr(signal, "sigwaitinfo"):  # without it, the sender of a signal is unknown
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class TrainLoader:
    """Infinite iterable over the batches of this process, by default lists of mapped dicts.

    Iterate over it only once; its workers run until the end of the run.

    It works like detectron2's loader: the same samplers, batches of one orientation, augmentation
    in the mapper. The batches, however, depend only on ``seed``, for example not on the number of
    workers. Batches before ``start`` are skipped without loading their images.

    Args:
        dicts: Dataset dicts with "width" and "height", as a sequence or a Dataset.
        sampler: Function that takes the data set and a seed and returns this process's sampler,
            an infinite stream of indices.
        mapper: Function that converts a dataset dict to model input.
        batch_size: Number of images per batch on this process.
        group_by_orientation: Whether wide images and other images are in separate batches.
        num_workers: Number of worker processes that load images; 0 to load in this process.
        seed: Random seed, >= 0, the same on every process.
        collate_fn: Function that converts a list of mapped dicts to a batch, in the worker.
        pin_memory: Whether tensors in the batches are copied to pinned memory.

    Attributes:
        seed: Random seed; may be changed before iteration starts.
        start: Number of batches to skip, 0 by default; may be changed before iteration starts.
    """

    def __init__(
        self,
        dicts: Union[Dataset, Sequence[Dict[str, Any]]],
        sampler: Callable[[Dataset, int], Sampler],
        mapper: Callable[[Dict[str, Any]], Any],
        batch_size: int,
        group_by_orientation: bool,
        num_workers: int,
        seed: int,
        collate_fn: Callable[[List[Any]], Any] = trivial_batch_collator,
        pin_memory: bool = False,
    ):
        dataset: Any = dicts  # the type Dataset declares neither a length nor an integer index
        if not isinstance(dataset, Dataset):
            dataset = DatasetFromList(list(dataset), copy=False)
        # Computed in advance, so that skipping batches need not load the dicts.
        self._bucket = None
        if group_by_orientation:
            dicts_in_order = (dataset[n] for n in range(len(dataset)))
            self._bucket = [d["width"] > d["height"] for d in dicts_in_order]
        self._dataset = dataset
        self._sampler = sampler
        self._mapper = mapper
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._collate_fn = collate_fn
        self._pin_memory = pin_memory
        self.seed = seed
        self.start = 0

    def _batches(self) -> Iterator[List[Tuple[int, int]]]:
        """Yields batches of (position in the stream, index of the image)."""
        buckets: Dict[bool, List[Tuple[int, int]]] = {False: [], True: []}
        for position, index in enumerate(self._sampler(self._dataset, self.seed)):
            bucket = buckets[self._bucket is not None and self._bucket[index]]
            bucket.append((position, index))
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()

    def __iter__(self) -> Iterator[List[Any]]:
        # A generator, because detectron2 0.6 creates the iterator before `start` is set for a
        # resumed run. The body runs only when the first batch is requested.
        yield from DataLoader(
            _Seeded(MapDataset(self._dataset, self._mapper), self.seed),
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self._num_workers,
            collate_fn=self._collate_fn,
            pin_memory=self._pin_memory,
            worker_init_fn=_only_its_parent_ends_it,
            # Without its own generator, DataLoader would draw from the one of the training step.
            generator=torch.Generator(),
        )
