"""GroupedTrainingSampler: every image once per epoch, and the share of a batch from one group."""

import itertools
from collections import Counter

import pytest
from detectron2.utils import comm

from refbn_d2.data.grouped_sampler import GroupedTrainingSampler, image_groups
from refbn_d2.errors import UserError

GROUPS = [n % 4 for n in range(160)]


def _epochs(strength, seed=0, epochs=5, batch=4, groups=GROUPS):
    sampler = GroupedTrainingSampler(groups, strength, batch, seed)
    indices = list(itertools.islice(sampler, epochs * (len(groups) // batch) * batch))
    return [indices[k : k + batch] for k in range(0, len(indices), batch)]


def _purity(batches):
    """Mean share of a batch that its commonest group has."""
    shares = [Counter(GROUPS[i] for i in b).most_common(1)[0][1] / len(b) for b in batches]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_every_epoch_is_a_permutation(strength):
    batches = _epochs(strength)
    for epoch in range(5):
        indices = [i for b in batches[epoch * 40 : (epoch + 1) * 40] for i in b]
        assert sorted(indices) == list(range(160))
    assert batches[:40] != batches[40:80]


def test_strength_is_the_share_of_a_group():
    # Four images of four groups drawn at random, all 256 cases counted.
    cases = itertools.product(range(4), repeat=4)
    chance = sum(max(Counter(c).values()) / 4 for c in cases) / 256
    purity = [_purity(_epochs(s)) for s in (0.0, 0.5, 1.0)]
    assert purity[0] == pytest.approx(chance, abs=0.05)
    assert purity[2] > 0.95 and purity[0] < purity[1] < purity[2]


def test_processes_share_the_batches(monkeypatch):
    whole = [i for b in _epochs(0.7, epochs=2) for i in b]
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        sampler = GroupedTrainingSampler(GROUPS, 0.7, 4, 0)
        parts.append(list(itertools.islice(sampler, len(whole) // 2)))
    assert [i for pair in zip(*parts) for i in pair] == whole


def test_seeds():
    assert _epochs(0.5, seed=1) == _epochs(0.5, seed=1) != _epochs(0.5, seed=2)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match="strength"):
        GroupedTrainingSampler(GROUPS, strength, 4, 0)


def test_a_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="batch of 161 needs at least as many images, got 160"):
        GroupedTrainingSampler(GROUPS, 0.5, 161, 0)


def test_groups_are_styles_or_main_categories():
    def with_categories(*ids):
        return {"annotations": [{"category_id": i} for i in ids]}

    dicts = [with_categories(3, 7, 7), with_categories(7), with_categories(3), with_categories()]
    a, b, c, d = image_groups(dicts)
    assert a == b and len({a, c, d}) == 3
    assert image_groups([{"style": "x"}, {"style": "y"}, {"style": "x"}]) == [0, 1, 0]


def test_groups_by_a_field():
    dicts = [{"camera": c, "group": 1, "annotations": [{"category_id": 0}]} for c in "bab"]
    assert image_groups(dicts) == [0, 0, 0]
    assert image_groups(dicts, "camera") == [1, 0, 1]
    with pytest.raises(UserError, match="image 5.jpg has no 'site', by which .*GROUP_FIELD"):
        image_groups([{"site": 1}, {"file_name": "5.jpg"}], "site")


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, ([1],)])
def test_a_group_that_is_a_container(value):
    with pytest.raises(UserError, match="image 5.jpg has a .* as 'group', .*text or a number"):
        image_groups([{"group": "x"}, {"file_name": "5.jpg", "group": value}])


def test_one_group_is_said():
    with pytest.warns(UserWarning, match="all images are of one group"):
        GroupedTrainingSampler([0] * 8, 0.5, 4, 0)
