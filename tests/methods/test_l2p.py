from __future__ import annotations

import pytest
import torch

import test_conformance as conformance
from conftest import golden_vit
from pgp.backbones.base import insert_prompts
from pgp.methods.l2p import L2P
from pgp.rng import make_generator
from prompted import change_of_first_block, few_tokens, images, roughen


def build(vit=None, **settings):
    return L2P.Config(**settings).build(vit or golden_vit(), "abcdef", make_generator(0, "init")).double()


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


@pytest.mark.parametrize("protect", ["affinity", "affinity+aggregation"])
def test_variants_keep_the_promises_of_every_method(protect):
    conformance.keeps_its_promises(L2P.Config(protect=protect))
