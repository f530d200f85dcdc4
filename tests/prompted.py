"""Small methods on few tokens, and how far their answers to old images move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, cg

from conftest import tiny_timm
from pgp.backbones.norms import norm_std
from pgp.backbones.vit import ViT
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.scenario import Task

TASK = Task(1, (2, 3), torch.arange(4), torch.arange(4))


def images(count, size=32, seed=1):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def few_tokens(**arguments):
    """A model with few tokens an image, so that few old images leave directions of every head free."""
    torch.manual_seed(0)
    return ViT(tiny_timm(img_size=16, **arguments)).double()


def learn(method, projection, steps=25):
    """A new task, by Adam; its losses."""
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.05)
    projection.attach(optimizer)
    labels, losses = torch.arange(8) % 2 + 2, []
    x = images(8, 16, seed=2) * 0.2 + images(4, 16, seed=3)[labels]
    for _ in range(steps):
        loss = method.loss(x, labels, TASK)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def drift_of(method, config):
    """The same, of a method on a model with few tokens; two old images leave some directions of every space free."""
    old = images(2, 16)
    projection = (config or NoProjection.Config()).build(method.protected())
    if config is not None:
        for space, rows in method.activations(old).items():
            projection.observe(space, rows)
        projection.end_task()
        assert all(projection.rank(name) < target.parameter.shape[target.axis]
                   for name, target in method.protected().items())  # fmt: skip
    before = method.features(old).detach()
    with projection.constrain():
        method.begin_task(TASK)
    first, *_, last = learn(method, projection)
    return float((method.features(old).detach() - before).norm() / before.norm()), first - last


def change_of_first_block(method, old, prompts, block):
    """Of what old images' own tokens get from the first block: the derivative along a protected step of length 1.

    Args:
        method: protects `prompts` by all energy of what it observes of `old`.
        old: images.
        prompts: the protected parameter.
        block: those tokens behind the first block, as a function of the parameter.

    The step is at a right angle to the gradients of the deviations that norms divide prompts by, which so stay.
    """
    projection = Orthogonal(method.protected(), Orthogonal.Config("input", 1.0, 1.0, apply_to="update"))
    for space, rows in method.activations(old).items():
        projection.observe(space, rows)
    projection.end_task()
    backbone, moving = method.backbone, prompts.detach().requires_grad_()
    divisors = [
        backbone.apply_norm(0, backbone.embed_prompts(moving))[1],
        norm_std(backbone.attention_norm(None), backbone.add_position(moving)),
    ]
    rays = [torch.autograd.grad(d.log().sum(), moving)[0] for d in divisors if d.requires_grad]
    rays = [F.normalize(ray, dim=-1) for ray in rays]

    def forbidden(flat):
        """The part of a step that each condition forbids, all together; 0 for what all allow."""
        step = torch.from_numpy(flat).view_as(prompts)
        parts = [(step * ray).sum(-1, keepdim=True) * ray for ray in rays]
        for space, target in method.protected().items():
            if target.parameter is prompts:
                turned = step.transpose(target.axis, -1)
                parts.append((turned - projection.project(space, turned)).transpose(target.axis, -1))
        return sum(parts).flatten().numpy()

    wish = torch.randn(prompts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    conditions = LinearOperator((wish.numel(), wish.numel()), forbidden, dtype=float)
    refused, _ = cg(conditions, forbidden(wish.flatten().numpy()), rtol=1e-10, maxiter=10000)
    step = wish - torch.from_numpy(refused).view_as(wish)
    step, prompts = step / step.norm(), prompts.detach()
    return float((block(prompts + 1e-5 * step) - block(prompts - 1e-5 * step)).norm() / 2e-5)


def roughen(norm):
    """Give a LayerNorm weights and biases as after training."""
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=draws)
        norm.bias.normal_(generator=draws)
