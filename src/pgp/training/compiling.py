"""Compile the blocks of the encoder before training, so that no step waits for the compiler."""

from __future__ import annotations

import warnings

import torch

from pgp.training.session import Session
from pgp.training.state import TrainState


def compile_blocks(session: Session, state: TrainState) -> None:
    """Compile the blocks, by one pass as in training and one as in evaluation, whose seconds are logged as `compile`.

    If the compiler fails, the run is warned, and the blocks stay as they are. It changes nothing that is learned.
    """
    if not session.remaining(state):
        return
    backbone = state.method.backbone
    with session.timed("compile"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about its own workings
        backbone.compiles_blocks = True
        try:
            _rehearse(session, state)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's errors have many types
            backbone.compiles_blocks = False
            cause = getattr(error, "inner_exception", error)  # of the compiler's backend
            reason = (str(cause).strip() or type(cause).__name__).partition("\n")[0]
            session.warn(f"torch.compile failed, so the encoder's blocks run uncompiled: {reason}")


def _rehearse(session: Session, state: TrainState) -> None:
    """Compute the loss of the first task for empty images, its gradient, and then the loss without gradients."""
    config, fabric, method = session.config, session.fabric, state.method
    task = session.scenario.tasks[0]  # even with few experts, it has its own, so no expert is chosen here
    count = min(session.micro_batch_size or config.batch_size, -(-config.batch_size // fabric.world_size))
    images = torch.zeros(count, 3, config.transforms.size, config.transforms.size, device=fabric.device)
    labels = torch.full((count,), task.classes[0], device=fabric.device)
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    with fabric.autocast():
        prepared = method.prepare_batch(images, task)
        loss = method.loss(images, labels, task, prepared)
    if loss.requires_grad:  # not by backward(), so that gradients stay as they are
        torch.autograd.grad(loss, learned, allow_unused=True)
    with torch.no_grad(), fabric.autocast():
        method.loss(images, labels, task, prepared)
