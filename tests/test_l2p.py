from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, cg

import test_conformance as conformance
from conftest import golden_vit
from pgp.backbones.base import insert_prompts
from pgp.backbones.norms import norm_std
from pgp.methods.l2p import L2P
from pgp.projections.orthogonal import Orthogonal
from pgp.rng import make_generator
from test_dualprompt import few_tokens, images


def build(vit=None, **settings):
    return L2P.Config(**settings).build(vit or golden_vit(), "abcdef", make_generator(0, "init")).double()


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


@pytest.mark.parametrize("protect", ["tokens", "affinity", "affinity+aggregation"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_what_old_tokens_get_in_the_first_block(protect, pre_norm):
    """0 to first order, if affinity and aggregation are held, and deviations are."""
    vit, old = few_tokens(pre_norm=pre_norm), images(1, 16)
    if pre_norm:
        roughen(vit.vit.norm_pre)
    method = build(vit, pool_size=4, length=48, top_k=1, protect=protect)
    selection = method.pool.select(method.query(old))

    def block(pool):
        placed = method.backbone.embed_prompts(pool[selection.indices].flatten(1, 2))
        out = vit.vit.blocks[0](insert_prompts(vit.embed(old), placed))
        return torch.cat([out[:, :1], out[:, 1 + placed.shape[1] :]], dim=1)  # without the prompts themselves

    change = change_of_first_block(method, old, method.pool.prompts, block)
    if protect == "affinity+aggregation":
        assert change < 1e-5
    else:
        assert change > 1e-4


def roughen(norm):
    """Give a LayerNorm weights and biases as after training."""
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=draws)
        norm.bias.normal_(generator=draws)


@pytest.mark.parametrize("protect", ["affinity", "affinity+aggregation"])
def test_variants_keep_the_promises_of_every_method(protect):
    conformance.keeps_its_promises(L2P.Config(protect=protect))
