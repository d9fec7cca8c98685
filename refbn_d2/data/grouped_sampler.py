"""A training sampler whose batches are not i.i.d., the situation for which RefBN is intended."""

import itertools
import warnings
from collections import Counter
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from detectron2.utils import comm
from torch.utils.data import Sampler

from ..errors import UserError

__all__ = ["GroupedTrainingSampler", "image_groups"]


def image_groups(dataset_dicts: Iterable[Dict[str, Any]], field: str = "") -> List[int]:
    """Returns the group of each image.

    Args:
        dataset_dicts: Dicts in detectron2's standard data set format.
        field: Key of a dict that contains the group. By default "group" or "style" if an image has
            it, else the category with the most objects in the image; images without objects form
            one group.

    Returns:
        Indices of the groups, from 0, in the sorted order of their names.

    Raises:
        UserError: If an image lacks the field, or has a list or dict there.
    """
    fields = [field] if field else ["group", "style"]

    def key(d: Dict[str, Any]) -> Any:
        image = f"image {d.get('file_name', d.get('image_id'))}"
        for name in fields:
            if d.get(name) is not None:
                try:
                    hash(d[name])
                except TypeError:
                    raise UserError(
                        f"{image} has a {type(d[name]).__name__} as {name!r}, by which images are "
                        "grouped: give text or a number, or name another field with "
                        "DATALOADER.GROUP_FIELD"
                    ) from None
                return d[name]
        if field:
            raise UserError(
                f"{image} has no {field!r}, by which DATALOADER.GROUP_FIELD groups the images"
            )
        categories = Counter(a["category_id"] for a in d.get("annotations", []))
        return categories.most_common(1)[0][0] if categories else -1

    keys = [key(d) for d in dataset_dicts]
    number = {k: i for i, k in enumerate(sorted(set(keys), key=lambda k: (str(type(k)), k)))}
    return [number[k] for k in keys]


class GroupedTrainingSampler(Sampler):
    """Infinite sampler where images in the same batch tend to belong to the same group.

    Every epoch is a permutation of the images. A random fraction ``strength`` of its positions
    holds images sorted by group; the other images stay shuffled. The permutation is divided into
    batches, and the batches are shuffled. Hence about ``strength`` of the images in a batch share a
    group, and successive batches are independent. With strength 0 batches are i.i.d., as from
    TrainingSampler; with strength 1 almost every batch has one group. For batches of one image the
    strength has no effect. Images that do not fill a last batch are omitted in that epoch.

    Args:
        groups: Group of each image, an integer >= 0.
        strength: Fraction of the images that are sorted by group, in [0, 1].
        batch_size: Number of images in the global batch, over all processes.
        seed: Random seed, the same on every process; None for a random seed that all processes
            share.

    Raises:
        ValueError: If ``strength`` is not in [0, 1], or if there are fewer images than
            ``batch_size``.
    """

    def __init__(
        self, groups: Sequence[int], strength: float, batch_size: int, seed: Optional[int] = None
    ):
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        if batch_size > len(groups):
            raise ValueError(
                f"a batch of {batch_size} needs at least as many images, got {len(groups)}: reduce "
                "the batch size"
            )
        if strength > 0 and len(set(groups)) < 2:
            warnings.warn(
                "all images are of one group: the batches of GroupedTrainingSampler are i.i.d., "
                f"whatever its strength (here {strength})",
                stacklevel=2,
            )
        self._groups = torch.as_tensor(groups)
        self._strength = strength
        self._batch_size = batch_size
        self._seed = comm.shared_random_seed() if seed is None else int(seed)

    def __iter__(self) -> Iterator[int]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        yield from itertools.islice(self._infinite(), rank, None, world_size)

    def _infinite(self) -> Iterator[int]:
        g = torch.Generator().manual_seed(self._seed)
        n = len(self._groups)
        while True:
            order = torch.randperm(n, generator=g)
            slots = torch.rand(n, generator=g) < self._strength
            members = order[slots]
            order[slots] = members[torch.argsort(self._groups[members], stable=True)]
            batches = order[: n - n % self._batch_size].view(-1, self._batch_size)
            yield from batches[torch.randperm(len(batches), generator=g)].flatten().tolist()
