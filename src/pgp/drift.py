"""The drift meter: how far answers to old images move as a model learns on, and what its projection has to do with it.

A few test images of each task are answered when the task is closed, and again after every later one. Of the rows that
meet a protected parameter only some random mixtures are kept: what a step does to them is, but for a common factor and
on average, what it does to all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pgp.datasets import Loading, Viewed, batches, in_order
from pgp.evaluate import tracked
from pgp.learner import Learner
from pgp.scenario import Task, generator
from pgp.subspace import Protected

PROBES = 16
"""Random mixtures of rows that are kept of each task and space."""


def depart(learner: Learner) -> None:
    """Take down what is protected as the next task finds it, before anything of it changes."""
    if learner.config.drift_images:
        learner.departure = {name: met.parameter.detach().clone() for name, met in learner.method.protected().items()}
        learner.projection.steps = {}


def arrive(learner: Learner) -> dict[str, dict[str, float | None]]:
    """What the projection did to the task that was just trained, by space, before it learns from that task itself.

    Returns:
        gradients, updates: share of the energy of all gradients, and of all updates, that lay in the protected
            subspace as they came.
        removed: share of the energy of those of the two that are projected that the projection takes out.
        leak: share of the energy of the whole way from start to end of the task that lies in the protected subspace:
            what got past it.
    """
    projection, method, start = learner.projection, learner.method, learner.departure
    gradients, updates = (
        {space: _share(met[row, 0], met[row, 2]) for space, met in projection.steps.items()} for row in (0, 1)
    )
    row = int(projection.on == "update")
    removed = {space: _share(met[row, 1], met[row, 2]) for space, met in projection.steps.items()}
    leaks = {}
    for space, target in method.protected().items():
        if space in start and projection.rank(space):
            way = target.parameter.detach().double() - start[space].to(target.parameter.device).double()
            inside, _, whole = projection.energies(space, way.transpose(target.axis, -1))
            leaks[space] = _share(inside, whole)
    learner.departure, projection.steps = {}, {}
    return {"gradients": gradients, "updates": updates, "removed": removed, "leak": leaks}


@torch.no_grad()
def drift(learner: Learner, task: Task) -> dict[str, Any]:
    """How far the answers to each task before `task` moved since it was closed; `task` is the next to be remembered.

    Returns:
        features, logits: relative change, the norm of the difference by the norm of what was, by earlier task. Logits
            are those of the method's own head for the classes of then, centred per image.
        responses: by space, relative change of what the protected parameter answers to old rows.
        changed: share of images that choose other prompts; only for methods that choose.
        held: by space, share of the energy of all old rows in the protected subspace, `task` included.
        usage: share of the images of all tasks that choose each prompt.
    """
    method, memory, tasks = learner.method, learner.remembered, learner.scenario.tasks
    protected = method.protected()
    now = {each.index: _answers(learner, each) for each in tasks[: task.index] if each.index in memory}
    memory[task.index] = now[task.index] = _answers(learner, task)
    memory[task.index]["probes"] = probes = _probes(learner, task)
    memory[task.index]["responses"] = {space: _respond(rows, protected[space]) for space, rows in probes.items()}
    old = [index for index in now if index != task.index]
    out: dict[str, Any] = {"tasks": old}
    for what in ("features", "logits"):
        out[what] = [_change(now[index][what], memory[index][what]) for index in old]
    out["responses"] = {
        space: [
            _change(_respond(memory[index]["probes"][space], target), memory[index]["responses"][space])
            for index in old
        ]
        for space, target in protected.items()
    }
    if "chosen" in now[task.index]:
        others = [(now[i]["chosen"].cpu() != memory[i]["chosen"].cpu()).any(1).double() for i in old]
        out["changed"] = [float(one.mean()) for one in others]
        out["usage"] = torch.cat([answers["chosen"] for answers in now.values()]).double().mean(0).tolist()
    out["held"] = {}
    for space, target in protected.items():
        if learner.projection.rank(space):
            parts = [learner.projection.energies(space, _beside(memory[i]["probes"][space], target)) for i in now]
            inside, _, whole = torch.stack(parts).sum(0)
            out["held"][space] = _share(inside, whole)
    return out


def _sample(learner: Learner, task: Task, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A few test images `(B, 3, S, S)` of a task, evenly spaced, with their queries, `size` at once."""
    config, evaluation = learner.config, learner.evaluation
    places = torch.linspace(0, len(task.test) - 1, min(config.drift_images, len(task.test))).long()
    plan = in_order(task.test[places], size)
    viewed = Viewed(learner.data.test, config.views.test(), 0, ("test",), config.on_bad_image == "skip")
    stream = batches(viewed, plan, Loading(on_bad_image=config.on_bad_image))  # every process sees them all
    for batch in tracked(learner.progress, stream, len(plan), f"measuring drift on {learner.scenario.title(task)}"):
        if len(batch.indices):
            images = batch.images.to(learner.fabric.device)
            yield images, evaluation.query(learner.method, images, batch.indices)


def _answers(learner: Learner, task: Task) -> dict[str, Any]:
    """Features `(B, D)` and logits `(B, c)` of the sample, and the prompts that its images choose, `(B, M)`."""
    method, classes = learner.method, list(learner.scenario.seen(task.index))
    features, logits, chosen = [], [], []
    for images, query in _sample(learner, task, learner.config.eval_batch_size):
        with learner.fabric.autocast():
            features.append(method.features(images, query).float())
            logits.append(method.head(features[-1])[:, classes].float())
            picked = None if query is None else method.choices(query)
        if picked is not None:
            chosen.append(picked)
    if not features:
        raise ValueError(f"expected test images in task {task.index + 1}, but every one of a sample is unreadable")
    found = torch.cat(logits)
    answers = {"features": torch.cat(features), "logits": found - found.mean(1, keepdim=True)}
    return answers | ({"chosen": torch.cat(chosen)} if chosen else {})


def _probes(learner: Learner, task: Task) -> dict[str, Tensor]:
    """By space, random mixtures `(..., K, D)` of the rows of the sample."""
    draws = generator(learner.config.seed, "drift", task.index)
    probes: dict[str, Tensor] = {}
    for images, query in _sample(learner, task, learner.part or learner.config.eval_batch_size):
        with learner.fabric.autocast():
            rows = learner.method.activations(images, query)
        for space in learner.method.protected():
            mixtures = rows[space].mixed(PROBES, draws).float()
            probes[space] = probes[space] + mixtures if space in probes else mixtures
    return probes


def _respond(probes: Tensor, target: Protected) -> Tensor:
    """What the protected parameter answers to rows `(..., K, D)`: their inner products with it."""
    answer = target.parameter.detach().float().transpose(target.axis, -1)
    return probes.to(answer.device) @ answer.mT


def _beside(probes: Tensor, target: Protected) -> Tensor:
    """Rows with as many axes as the parameter that they meet."""
    return probes[(None,) * (target.parameter.dim() - probes.dim())].to(target.parameter.device)


def _change(now: Tensor, then: Tensor) -> float | None:
    """Relative change: the norm of the difference by the norm of what was; None where that is 0."""
    then = then.to(now)
    return _share((now - then).norm(), then.norm())


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if float(whole) else None
