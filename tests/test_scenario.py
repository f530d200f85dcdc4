from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgp.rng import derive_seed, make_generator
from pgp.scenario import (
    class_order,
    split_by_class,
    split_by_domain,
    split_by_group,
    stratified_folds,
    stratified_holdout,
)


def labels(count, classes, seed):
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.data())
def test_tasks_partition_the_images(classes, data):
    tasks = data.draw(st.integers(1, classes))
    train, test = labels(60, classes, seed=1), labels(30, classes, seed=2)
    order = class_order(classes, data.draw(st.integers(0, 99)))
    scenario = split_by_class(train, test, tasks, order)
    assert len(scenario) == tasks
    assert [task.index for task in scenario.tasks] == list(range(tasks))
    assert [label for task in scenario.tasks for label in task.classes] == order
    for part, all_labels in (("train", train), ("test", test)):
        indices = [getattr(task, part) for task in scenario.tasks]
        assert sorted(torch.cat(indices).tolist()) == list(range(len(all_labels)))
        for task, own in zip(scenario.tasks, indices, strict=True):
            assert set(all_labels[own].tolist()) <= set(task.classes)


@pytest.mark.parametrize(("classes", "tasks", "sizes"), [(7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (4, 4, [1] * 4)])
def test_the_first_tasks_take_what_is_left_over(classes, tasks, sizes):
    some = torch.arange(classes)
    scenario = split_by_class(some, some, tasks, list(range(classes)))
    assert [len(task.classes) for task in scenario.tasks] == sizes


def test_seen_classes_come_in_the_order_of_learning():
    some = torch.arange(5)
    scenario = split_by_class(some, some, 2, [4, 0, 3, 1, 2])
    assert (scenario.seen_classes(0), scenario.seen_classes(1)) == ((4, 0, 3), (4, 0, 3, 1, 2))


@pytest.mark.parametrize("tasks", [0, 6])
def test_there_are_no_more_tasks_than_classes(tasks):
    with pytest.raises(ValueError, match=f"between 1 and 5 tasks.*got {tasks}"):
        split_by_class(torch.arange(5), torch.arange(5), tasks, list(range(5)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_named_tasks_partition_the_images(sizes, seed):
    order, train, test = class_order(sum(sizes), seed), labels(60, sum(sizes), seed=1), labels(30, sum(sizes), seed=2)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    groups = [(f"t{size}", order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    scenario = split_by_group(train, test, groups)
    assert [(task.name, list(task.classes)) for task in scenario.tasks] == groups
    for part, count in (("train", 60), ("test", 30)):
        assert sorted(torch.cat([getattr(task, part) for task in scenario.tasks]).tolist()) == list(range(count))
    even = split_by_class(train, test, len(sizes), order)
    same = split_by_group(train, test, [("", task.classes) for task in even.tasks])
    assert all(torch.equal(a.train, b.train) for a, b in zip(even.tasks, same.tasks, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_domains_partition_the_images_and_share_their_classes(classes, domains, seed):
    whole, where, tested = labels(60, classes, seed), labels(60, domains, seed + 1), labels(30, domains, seed + 2)
    scenario = split_by_domain(whole, where, tested, [(f"d{d}", [d]) for d in class_order(domains, seed)])
    for part, count in (("train", 60), ("test", 30)):
        assert sorted(torch.cat([getattr(task, part) for task in scenario.tasks]).tolist()) == list(range(count))
    for task in scenario.tasks:
        assert set(where[task.train].tolist()) | set(tested[task.test].tolist()) <= {int(task.name[1:])}
        assert set(task.classes) == set(whole[task.train].tolist())
    seen = scenario.seen_classes(len(scenario) - 1)
    assert len(set(seen)) == len(seen)
    assert set(seen) == set(whole.tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_share_of_each_class_is_held_out(sizes, share, seed):
    strata = torch.cat([torch.full((size,), stratum) for stratum, size in enumerate(sizes)])
    test = stratified_holdout(strata, share, seed)
    assert torch.equal(test, stratified_holdout(strata, share, seed))
    for stratum, size in enumerate(sizes):
        count = int(test[strata == stratum].sum())
        assert 1 <= count <= size - 1
        assert abs(count - share * size) <= 1
    more = stratified_holdout(torch.cat([strata, torch.full((5,), len(sizes))]), share, seed)
    assert torch.equal(more[: len(strata)], test)  # another class moves none of the others


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 99))
def test_each_class_is_divided_evenly_into_folds(sizes, folds, seed):
    strata = torch.cat([torch.full((size,), stratum) for stratum, size in enumerate(sizes)])
    fold = stratified_folds(strata, folds, seed)
    assert torch.equal(fold, stratified_folds(strata, folds, seed))
    for stratum, size in enumerate(sizes):
        counts = torch.bincount(fold[strata == stratum] + 1, minlength=folds + 1).tolist()
        whole, more = divmod(size, folds)
        even = [whole + 1] * more + [whole] * (folds - more)
        assert counts == ([1] + [0] * folds if size == 1 else [0, *even])
    more = stratified_folds(torch.cat([strata, torch.full((5,), len(sizes))]), folds, seed)
    assert torch.equal(more[: len(strata)], fold)  # another class moves none of the others


def test_a_task_is_spoken_of_by_number_and_name():
    scenario = split_by_group(torch.arange(3), torch.arange(3), [("", [0]), ("birds [/x]", [2, 1])])
    assert [scenario.describe(task) for task in scenario.tasks] == ["task 1 of 2", "task 2 of 2 (birds [/x])"]


def test_the_order_of_classes_depends_on_the_seed_only():
    first = class_order(50, seed=1)
    torch.rand(5)
    class_order(50, seed=2)
    assert class_order(50, seed=1) == first
    assert sorted(first) == class_order(50, seed=None) == list(range(50))
    assert len({tuple(class_order(50, seed)) for seed in range(20)}) == 20


def test_draws_do_not_depend_on_those_before():
    addresses = [(7, "init"), (7, "order", 0, 1), (7, "order", 1, 0), (8, "init")]
    forward = {address: torch.rand(3, generator=make_generator(*address)) for address in addresses}
    torch.rand(11)
    for address in reversed(addresses):
        assert torch.equal(torch.rand(3, generator=make_generator(*address)), forward[address])


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=make_generator(1, "a"))
    class_order(9, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_part_of_an_address_counts():
    addresses = [
        (1, "a", 2),
        (2, "a", 2),
        (1, "b", 2),
        (1, "a", 3),
        (1, "a"),
        (1, "a", 2, 0),
        (1, 2, "a"),
        (1, "a", "2"),
    ]
    assert len({derive_seed(*address) for address in addresses}) == len(addresses)
    draws = {tuple(torch.rand(2, generator=make_generator(*address)).tolist()) for address in addresses}
    assert len(draws) == len(addresses)


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.lists(st.sampled_from(["a", "order"]) | st.integers()))
def test_seeds_fit_any_generator(seed, address):
    assert 0 <= derive_seed(seed, *address) < 2**63
