from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgp.scenario import class_order, generator, seed_of, split_by_class


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
    assert (scenario.seen(0), scenario.seen(1)) == ((4, 0, 3), (4, 0, 3, 1, 2))


@pytest.mark.parametrize("tasks", [0, 6])
def test_there_are_no_more_tasks_than_classes(tasks):
    with pytest.raises(ValueError, match=f"between 1 and 5 tasks.*got {tasks}"):
        split_by_class(torch.arange(5), torch.arange(5), tasks, list(range(5)))


def test_the_order_of_classes_depends_on_the_seed_only():
    first = class_order(50, seed=1)
    torch.rand(5)
    class_order(50, seed=2)
    assert class_order(50, seed=1) == first
    assert sorted(first) == class_order(50, seed=None) == list(range(50))
    assert len({tuple(class_order(50, seed)) for seed in range(20)}) == 20


def test_draws_do_not_depend_on_those_before():
    addresses = [(7, "init"), (7, "order", 0, 1), (7, "order", 1, 0), (8, "init")]
    forward = {address: torch.rand(3, generator=generator(*address)) for address in addresses}
    torch.rand(11)
    for address in reversed(addresses):
        assert torch.equal(torch.rand(3, generator=generator(*address)), forward[address])


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=generator(1, "a"))
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
    assert len({seed_of(*address) for address in addresses}) == len(addresses)
    draws = {tuple(torch.rand(2, generator=generator(*address)).tolist()) for address in addresses}
    assert len(draws) == len(addresses)


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.lists(st.sampled_from(["a", "order"]) | st.integers()))
def test_seeds_fit_any_generator(seed, address):
    assert 0 <= seed_of(seed, *address) < 2**63
