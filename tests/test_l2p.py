from __future__ import annotations

import pytest
import torch

import test_conformance as conformance
from conftest import golden_vit
from pgp.methods.l2p import L2P
from pgp.projections.orthogonal import Orthogonal
from pgp.scenario import generator
from test_dualprompt import few_tokens, images


def build(vit=None, **settings):
    return L2P.Config(**settings).build(vit or golden_vit(), "abcdef", generator(0, "init")).double()


@pytest.mark.parametrize("protect", ["tokens", "affinity", "affinity+aggregation"])
def test_what_old_tokens_get_in_the_first_block(protect):
    """The derivative of the first block's output along a protected step: 0 if affinity and aggregation are held, and
    deviations are, which a step at a right angle to each prompt leaves as they were.
    """
    method, old = build(few_tokens(), pool_size=4, length=48, top_k=1, protect=protect), images(1, 16)
    projection = Orthogonal(Orthogonal.Config("input", 1.0, 1.0, on="update"))
    for space, rows in method.activations(old).items():
        projection.observe(space, rows)
    projection.end_task(method.protected())
    prompts, vit = method.pool.prompts.detach(), method.backbone.vit
    selection = method.pool.select(method.query(old))

    def block(pool):
        placed = method.backbone.place(pool[selection.indices].flatten(1, 2))
        tokens = method.backbone.embed(old)
        out = vit.blocks[0](torch.cat([tokens[:, :1], placed, tokens[:, 1:]], dim=1))
        return torch.cat([out[:, :1], out[:, 1 + placed.shape[1] :]], dim=1)  # without the prompts themselves

    step = torch.randn(prompts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(2000):  # alternating projections, onto what is free and onto what keeps deviations
        for space, target in method.protected().items():
            if target.role != "key":
                step = projection.project(space, step.transpose(target.axis, -1)).transpose(target.axis, -1)
        placed = method.backbone.place(prompts)
        ray = torch.nn.functional.normalize(placed - placed.mean(-1, keepdim=True), dim=-1)
        step = step - (step * ray).sum(-1, keepdim=True) * ray
    (picked,) = selection.indices.flatten().tolist()
    assert step[picked].norm() > 0.1
    change = (block(prompts + 1e-5 * step) - block(prompts - 1e-5 * step)) / 2e-5
    if protect == "affinity+aggregation":
        assert float(change.norm()) < 1e-4 * float(step[picked].norm())
    else:
        assert float(change.norm()) > 1e-2


@pytest.mark.parametrize("protect", ["affinity", "affinity+aggregation"])
def test_variants_keep_the_promises_of_every_method(protect):
    conformance.keeps_its_promises(L2P.Config(protect=protect))
