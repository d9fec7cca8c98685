"""A training loader whose batches are a function of a seed, so that a resumed run can go on with
the batch at which it was interrupted."""

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
    """Loads an image with random numbers that depend on its position in the stream alone."""

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset = dataset
        self._key = seed, comm.get_rank()

    def __getitem__(self, item: Tuple[int, int]) -> Any:
        position, index = item
        seed = derived_seed(*self._key, position)
        if get_worker_info() is not None:  # nobody else draws here: no state to put back
            seed_rng(seed)
            return self._dataset[index]
        with forked_rng(seed):
            return self._dataset[index]


def _only_its_parent_ends_it(worker: int) -> None:
    """Makes a worker process deaf to a notice that a scheduler or a terminal sends to all of them.

    The trainer finishes its step before it stops, and needs the worker until then.
    """
    if hasattr(signal, "sigwaitinfo"):  # else nobody can tell who sent it
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class TrainLoader:
    """Yields the batches of this process, by default lists of mapped dataset dicts, without end.

    There is one pass, hence its workers stay until the run ends.

    The images, their batches and their augmentation are what detectron2's loader would give: its
    samplers, batches of one orientation, the mapper's random numbers. But they depend on ``seed``
    and on nothing else, least of all on the number of workers. Batches before ``start`` are
    skipped without loading an image.

    Args:
        dicts: dataset dicts with "width" and "height"; a Dataset of them is used as it is.
        sampler: makes the endless stream of this process's indices, given the dataset and a seed.
        mapper: makes model input of a dataset dict.
        batch_size: of this process.
        group_by_orientation: whether wide images and all others go into batches of their own.
        num_workers: processes that load images; 0 for none.
        seed: >= 0, the same on every process.
        collate_fn: makes a batch of a list of mapped dicts, in the worker.
        pin_memory: whether batches, as far as they are tensors, wait in memory that a GPU can read.

    Attributes:
        seed, start: may be set until the first batch is asked for.
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
        # Known for all images beforehand, or skipping batches would mean loading dicts.
        self._bucket = None
        if group_by_orientation:
            self._bucket = [d["width"] > d["height"] for d in dicts]
        if not isinstance(dicts, Dataset):
            dicts = DatasetFromList(list(dicts), copy=False)
        self._dataset = dicts
        self._sampler = sampler
        self._mapper = mapper
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._collate_fn = collate_fn
        self._pin_memory = pin_memory
        self.seed = seed
        self.start = 0

    def _batches(self) -> Iterator[List[Tuple[int, int]]]:
        """Batches of (position in the stream, index of the image)."""
        buckets: Dict[bool, List[Tuple[int, int]]] = {False: [], True: []}
        for position, index in enumerate(self._sampler(self._dataset, self.seed)):
            bucket = buckets[self._bucket is not None and self._bucket[index]]
            bucket.append((position, index))
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()

    def __iter__(self) -> Iterator[List[Any]]:
        # A generator: release 0.6 of detectron2 asks for the iterator before it knows about resume.
        yield from DataLoader(
            _Seeded(MapDataset(self._dataset, self._mapper), self.seed),
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self._num_workers,
            collate_fn=self._collate_fn,
            pin_memory=self._pin_memory,
            worker_init_fn=_only_its_parent_ends_it,
            # Without one of its own it draws from the generator of the training step.
            generator=torch.Generator(),
        )
