from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from lightning_fabric import Fabric
from sklearn.decomposition import PCA
from torch import nn

from conftest import golden
from pgp.methods.prompts import cosine_similarity
from pgp.projections import released
from pgp.projections.base import NoProjection, ObservationSpec
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.released import ReleasedBasis, extend_released_basis, pca_scores
from pgp.projections.soft import Soft
from pgp.subspace import ProtectedInputs, ProtectedParameter, SecondMoment

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.03),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Toy(nn.Module):
    """A pool (M, L, D) and keys (M, D), pulled toward targets that a projection will not let them reach."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.prompts, self.keys = nn.Parameter(draw(3, 2, 16, seed=1)), nn.Parameter(draw(3, 16, seed=2))
        self.targets = draw(3, 2, 16, seed=3), draw(3, 16, seed=4)
        self.to(dtype)

    def protected(self):
        return {"prompts": ProtectedParameter(self.prompts), "keys": ProtectedParameter(self.keys, role="key")}

    def forward(self):
        return ((self.prompts - self.targets[0]) ** 2).sum() + ((self.keys - self.targets[1]) ** 2).sum()

    def learn(self, optimizer, steps=20):
        for _ in range(steps):
            self().backward()
            optimizer.step()
            optimizer.zero_grad()


def rows(seed=0, images=5, with_prompts=True):
    inputs, prompts = draw(images, 1, 16, seed=seed + 10), draw(images, 1, 16, seed=seed + 20)
    return {
        "prompts": ProtectedInputs(inputs, prompts if with_prompts else None),
        "keys": ProtectedInputs(draw(images, 1, 16, seed=seed)),
    }


def taught(projection, **arguments):
    for space, met in rows(**arguments).items():
        projection.observe(space, met)
    projection.end_task()
    return projection


def leaks(projection, toy, before):
    for space, target in toy.protected().items():
        change = (target.parameter.detach() - before[space]).double()
        assert change.norm() > 0.1
        yield float((change @ projection.bases[space]).norm() / change.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_projected_updates_do_not_leak(name, dtype):
    toy = Toy(dtype)
    projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("union", 0.9, 0.9, apply_to="update")))
    before = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
    optimizer = OPTIMIZERS[name](toy.parameters())
    projection.attach(optimizer)
    toy.learn(optimizer)
    assert max(leaks(projection, toy, before)) < (1e-5 if dtype == torch.float32 else 1e-13)


def test_projected_gradients_leak_under_adam_only():
    leak = {}
    for name in ("sgd", "adam"):
        toy = Toy()
        projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("union", 0.9, 0.9, apply_to="gradient")))
        before = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
        optimizer = OPTIMIZERS[name](toy.parameters()) if name == "adam" else torch.optim.SGD(toy.parameters(), lr=1e-3)
        projection.attach(optimizer)
        toy.learn(optimizer)
        leak[name] = max(leaks(projection, toy, before))
    assert leak["sgd"] < 1e-13
    assert leak["adam"] > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("on", ["gradient", "update"])
def test_no_energy_is_no_projection_bitwise(on, name):
    ends = []
    for config in (Orthogonal.Config(energy=0, key_energy=0, apply_to=on), NoProjection.Config()):
        toy = Toy(torch.float32)
        optimizer = OPTIMIZERS[name](toy.parameters())
        taught(config.build(toy.protected())).attach(optimizer)
        toy.learn(optimizer)
        ends.append((toy.prompts.detach(), toy.keys.detach()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_full_basis_freezes_until_the_handle_is_removed():
    toy = Toy()
    projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("input", 1, 1, apply_to="update")), images=40)
    assert projection.rank("prompts") == projection.rank("keys") == 16
    before = toy.prompts.detach().clone()
    optimizer = OPTIMIZERS["adam"](toy.parameters())
    handle = projection.attach(optimizer)
    toy.learn(optimizer)
    torch.testing.assert_close(toy.prompts.detach(), before, rtol=0, atol=1e-13)
    handle.remove()
    toy.learn(optimizer)
    assert (toy.prompts.detach() - before).abs().max() > 0.1


@pytest.mark.parametrize("hold", [True, False])
def test_old_queries_keep_their_cosines_if_keys_keep_their_norms(hold):
    toy = Toy()
    projection = taught(
        Orthogonal(toy.protected(), Orthogonal.Config("input", 1, 1, apply_to="update", preserve_key_norms=hold))
    )
    queries, before = rows()["keys"].inputs.flatten(0, 1), toy.keys.detach().clone()
    optimizer = OPTIMIZERS["adam"](toy.parameters())
    projection.attach(optimizer)
    toy.learn(optimizer)
    after = toy.keys.detach()
    assert (after - before).norm() > 0.1
    torch.testing.assert_close(queries @ after.T, queries @ before.T, rtol=0, atol=1e-12)
    moved = (cosine_similarity(queries, after) - cosine_similarity(queries, before)).abs().max()
    assert moved < 1e-12 if hold else moved > 0.01
    with pytest.raises(
        ValueError, match=r"expected projection\.apply_to=update with projection\.preserve_key_norms, got gradient"
    ):
        Orthogonal.Config(preserve_key_norms=True)


def test_the_random_baseline_has_the_ranks_and_not_the_directions():
    toy, baseline = Toy(), RandomBasis.Config("union", 0.8, 0.8, "update")
    true = taught(Orthogonal(toy.protected(), Orthogonal.Config("union", 0.8, 0.8, apply_to="update")))
    random = taught(baseline.build(toy.protected(), seed=3))
    assert [random.rank(space) for space in toy.protected()] == [true.rank(space) for space in toy.protected()]
    first = {space: random.basis(space) for space in toy.protected()}
    for space, basis in first.items():
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1], dtype=torch.float64))
        held = float((true.bases[space].mT @ basis).square().sum() / basis.shape[-1])
        assert held < 0.5 + 0.5 * basis.shape[-1] / basis.shape[-2]
    before = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
    optimizer = OPTIMIZERS["adam"](toy.parameters())
    random.attach(optimizer)
    toy.learn(optimizer)
    for space, target in toy.protected().items():
        change = target.parameter.detach() - before[space]
        assert (change @ first[space]).norm() < 1e-12 * change.norm()
        assert (change @ true.bases[space]).norm() > 0.01 * change.norm()
    restored, other = baseline.build(toy.protected(), seed=3), baseline.build(toy.protected(), seed=4)
    for projection in (restored, other):
        projection.load_state_dict(random.state_dict())
    assert all(torch.equal(restored.basis(space), basis) for space, basis in first.items())
    assert not any(torch.equal(other.basis(space), basis) for space, basis in first.items())
    taught(random, images=9)
    for space, basis in first.items():
        assert torch.equal(random.basis(space)[..., : basis.shape[-1]], basis)  # nested


def test_rows_of_half_precision_meet_what_maps_them():
    through = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    half = torch.ones(1, 2, 4, 3, dtype=torch.bfloat16)
    torch.testing.assert_close(
        ProtectedInputs(half, head_maps=through).expanded, ProtectedInputs(half.float(), head_maps=through).expanded
    )


@pytest.mark.parametrize("on", ["gradient", "update"])
def test_spaces_without_a_basis_are_free(on):
    toy, twin = Toy(), Toy()
    projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("input", 0, 1, apply_to=on)), images=40)
    before = toy.keys.detach().clone()
    for learner in (toy, twin):
        optimizer = OPTIMIZERS["sgd"](learner.parameters())
        if learner is toy:
            projection.attach(optimizer)
        learner.learn(optimizer)
    assert torch.equal(toy.prompts, twin.prompts)
    torch.testing.assert_close(toy.keys.detach(), before, rtol=0, atol=1e-13)


def test_prompts_and_keys_have_energies_of_their_own():
    projection = taught(Orthogonal(Toy().protected(), Orthogonal.Config("input", 0.2, 0.95)), images=12)
    assert 0 < projection.rank("prompts") < projection.rank("keys") < 12


def test_bases_grow_and_keep_what_they_held():
    projection, held = Orthogonal(Toy().protected(), Orthogonal.Config("union", 0.8, 0.8)), None
    for seed in range(3):
        taught(projection, seed=seed)
        basis = projection.bases["prompts"]
        if held is not None:
            assert basis.shape[1] > held.shape[1]
            assert torch.equal(basis[:, : held.shape[1]], held)
        held = basis


def test_union_guarantees_both_conditions_and_sum_does_not():
    met = rows(images=3)["prompts"]
    broken = {}
    for space in ("union", "sum"):
        projection = Orthogonal({"prompts": ProtectedParameter(Toy().prompts)}, Orthogonal.Config(space, 1.0))
        # one prompt that cancels the only input: every sum is zero, and so is the space of sums
        inputs, prompts = (met.inputs, met.prompts) if space == "union" else (met.inputs[:1], -met.inputs[:1])
        projection.observe("prompts", ProtectedInputs(inputs, prompts))
        projection.end_task()
        change = projection.project("prompts", draw(2, 16, seed=9))
        broken[space] = max(float((part.flatten(0, -2) @ change.T).abs().max()) for part in (inputs, prompts))
    assert broken["union"] < 1e-12
    assert broken["sum"] > 0.1


@pytest.mark.parametrize("space", ["sum", "union", "input"])
def test_order_and_batching_of_images_do_not_matter(space):
    protected = {"prompts": ProtectedParameter(Toy().prompts)}
    whole, parts = (Orthogonal(protected, Orthogonal.Config(space, 0.7)) for _ in range(2))
    met = rows(images=6)["prompts"]
    whole.observe("prompts", met)
    for chosen in ([4, 0], [5, 2, 1], [3]):
        parts.observe("prompts", ProtectedInputs(met.inputs[chosen], met.prompts[chosen]))
    for projection in (whole, parts):
        projection.end_task()
    one, other = whole.bases["prompts"], parts.bases["prompts"]
    torch.testing.assert_close(one @ one.T, other @ other.T, rtol=0, atol=1e-10)


def test_heads_and_axes():
    keys, values = nn.Parameter(draw(3, 2, 5, 8)), nn.Parameter(draw(3, 2, 5, 8))  # (M, H, L, d)
    protected = {"keys": ProtectedParameter(keys), "values": ProtectedParameter(values, axis=-2)}
    projection = Orthogonal(protected, Orthogonal.Config("input", 1.0, apply_to="update"))
    queries, attention = draw(2, 2, 3, 8, seed=1), draw(1, 2, 2, 5, seed=2)  # (B, H, n, d), (B, H, n, L)
    projection.observe("keys", ProtectedInputs(queries))
    projection.observe("values", ProtectedInputs(attention))
    projection.end_task()
    before = keys.detach().clone(), values.detach().clone()
    optimizer = OPTIMIZERS["adam"]([keys, values])
    projection.attach(optimizer)
    for _ in range(5):
        ((keys - 1) ** 2 + (values + 1) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = keys.detach() - before[0], values.detach() - before[1]
    assert min(change.norm() for change in moved) > 0.1
    assert torch.einsum("bhnd,mhld->bhnml", queries, moved[0]).abs().max() < 1e-12
    assert torch.einsum("bhnl,mhld->bhnmd", attention, moved[1]).abs().max() < 1e-12
    # heads are separate worlds: what one head has met binds no other
    assert torch.einsum("bhnd,mhld->bhnml", queries.flip(1), moved[0]).abs().max() > 0.1


def test_projections_of_heads_are_those_of_each_head_alone():
    queries = draw(2, 2, 3, 8, seed=1) * torch.stack([torch.linspace(1, 0.1, 8), torch.logspace(0, -2, 8)])[:, None]
    change = draw(3, 2, 5, 8, seed=2)
    both = Orthogonal({"keys": ProtectedParameter(nn.Parameter(change))}, Orthogonal.Config("input", 0.9))
    both.observe("keys", ProtectedInputs(queries))
    both.end_task()
    ranks = []
    for head in range(2):
        alone = Orthogonal({"keys": ProtectedParameter(nn.Parameter(change[:, head]))}, both.config)
        alone.observe("keys", ProtectedInputs(queries[:, head]))
        alone.end_task()
        expected = alone.project("keys", change[:, head])
        torch.testing.assert_close(both.project("keys", change)[:, head], expected, rtol=0, atol=1e-12)
        ranks.append(alone.rank("keys"))
    assert ranks[0] != ranks[1]
    assert both.rank("keys") == sum(ranks) / 2


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parameters_are_the_same_objects_after_fabric_sets_a_module_up(accelerator):
    """A projection is built once, with parameters that are moved in place, cast and loaded into, never replaced."""
    toy = Toy()
    before = {space: target.parameter for space, target in toy.protected().items()}
    fabric = Fabric(accelerator=accelerator, devices=1)
    model = fabric.setup_module(toy.float())
    toy.load_state_dict(Toy().state_dict())
    assert all(target.parameter is before[space] for space, target in toy.protected().items())
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in before.values()}
    assert all(parameter.device == fabric.device for parameter in before.values())


@pytest.mark.parametrize("on", ["gradient", "update"])
def test_hooks_fire_through_a_module_and_optimizer_set_up_by_fabric(on):
    toy = Toy(torch.float32)
    projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("union", 0.9, 0.9, apply_to=on)))
    before = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = torch.optim.SGD(toy.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(toy, plain)
    projection.attach(plain)
    for _ in range(20):
        fabric.backward(model())
        optimizer.step()
        optimizer.zero_grad()
    assert max(leaks(projection, toy, before)) < 1e-5


def test_states_go_round():
    toy = Toy()
    projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("union", 0.7, 0.7)))
    restored = Orthogonal(toy.protected(), projection.config)
    restored.load_state_dict(projection.state_dict())
    for some in (projection, restored):
        taught(some, seed=1)
    for space in ("prompts", "keys"):
        assert restored.rank(space) == projection.rank(space) > 0
        assert torch.equal(restored.project(space, draw(4, 16)), projection.project(space, draw(4, 16)))


def test_hooks_fire_through_fabric_and_states_go_round():
    toy = Toy(torch.float32)
    projection = Orthogonal(toy.protected(), Orthogonal.Config("input", 1, 1, apply_to="update"))
    restored = Orthogonal(toy.protected(), projection.config)
    restored.load_state_dict(taught(projection, images=40).state_dict())
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = OPTIMIZERS["adam"](toy.parameters())
    restored.attach(plain)
    optimizer = fabric.setup_optimizers(plain)
    before = toy.keys.detach().clone()
    toy.learn(optimizer)
    torch.testing.assert_close(toy.keys.detach(), before)


def test_widths_and_energies_are_checked():
    projection = taught(Orthogonal(Toy().protected()))
    with pytest.raises(ValueError, match=r"expected width 16 in space 'prompts', got \(2, 5\)"):
        projection.project("prompts", torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"projection.key_energy in \[0, 1\], got 2"):
        Orthogonal.Config(key_energy=2)
    with pytest.raises(ValueError, match=r"projection.energy in \[0, 1\], got -1"):
        Orthogonal.Config(energy=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 7}, r"projection\.energy in \[0, 1\], got 7"),
        ({"key_energy": -1}, r"projection\.key_energy in \[0, 1\], got -1"),
        ({"components": 0}, r"projection\.components of at least 1, got 0"),
        ({"key_components": 0}, r"projection\.key_components of at least 1, got 0"),
    ],
)
def test_settings_of_released_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ReleasedBasis.Config(**settings)


def test_a_task_without_images_is_named():  # all were bad and skipped, say
    with pytest.raises(ValueError, match="observe"):
        Orthogonal(Toy().protected()).end_task()


@pytest.mark.parametrize("kind", ["flat", "decay"])
@pytest.mark.parametrize("energy", ["0.5", "0.9", "0.97"])
def test_released_basis_is_the_published_one(kind, energy):
    arrays, basis = golden("released_basis.npz"), None
    for t in range(5):
        basis = extend_released_basis(basis, arrays[f"{kind}/rep{t}"], float(energy))
        assert basis.shape[1] == int(arrays[f"{kind}/thr{energy}/rank{t}"])
        torch.testing.assert_close(basis @ basis.T, arrays[f"{kind}/thr{energy}/P{t}"], rtol=0, atol=1e-10)


def test_scores_are_principal_component_scores():
    samples = draw(12, 40)
    theirs = torch.from_numpy(PCA(5, svd_solver="full").fit_transform(samples.numpy()))
    ours = pca_scores(samples, 5)
    torch.testing.assert_close(ours * (ours * theirs).sum(0).sign(), theirs)
    assert (ours.gather(0, ours.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(pca_scores(-samples, 5), ours)  # a sign of the samples changes no sign of the scores


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_scores_need_as_many_samples_and_features(shape):
    expected = rf"at least 13 samples and features, got \({shape[0]}, {shape[1]}\): choose fewer projection components"
    with pytest.raises(ValueError, match=expected):
        pca_scores(draw(*shape), 13)


def test_released_depends_on_the_order_of_images_and_orthogonal_does_not():
    changes = {}
    configs = {
        ReleasedBasis: ReleasedBasis.Config(0.9, components=4, when="after"),
        Orthogonal: Orthogonal.Config(energy=0.9),
    }
    inputs, order = draw(16, 4, 16, seed=5), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for kind in (ReleasedBasis, Orthogonal):
        projectors = []
        for images in (inputs, inputs[order]):
            projection = kind({"prompts": ProtectedParameter(Toy().prompts)}, configs[kind])
            projection.observe("prompts", ProtectedInputs(images))
            projection.end_task()
            projectors.append(projection.bases["prompts"] @ projection.bases["prompts"].T)
        changes[kind] = float((projectors[0] - projectors[1]).norm() / projectors[0].norm())
    assert changes[ReleasedBasis] > 0.5
    assert changes[Orthogonal] < 1e-10


def test_released_has_enough_after_as_many_images_as_it_is_wide():
    projection = ReleasedBasis(Toy().protected(), ReleasedBasis.Config(components=4, key_components=2))
    projection.observe("prompts", ProtectedInputs(draw(15, 2, 16)))
    assert not projection.has_enough()
    projection.observe("prompts", ProtectedInputs(draw(1, 2, 16)))
    assert projection.has_enough()


def test_released_is_the_published_basis_of_scores_of_images_and_old_prompts():
    toy = Toy()
    projection = ReleasedBasis(toy.protected(), ReleasedBasis.Config(0.9, 0.9, components=4, key_components=2))
    assert projection.observation == ObservationSpec(when="before", transform="train", repeat=True)
    images = {"prompts": draw(20, 3, 16, seed=5), "keys": draw(20, 1, 16, seed=6)}
    old = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
    for part in (slice(0, 7), slice(7, 20)):
        for space in images:
            projection.observe(space, ProtectedInputs(images[space][part]))
    optimizer = OPTIMIZERS["adam"](toy.parameters())
    projection.attach(optimizer)
    toy.learn(optimizer)
    ranks = projection.end_task()
    for space, components in (("prompts", 4), ("keys", 2)):
        flat = images[space][:16].flatten(1).float()  # as many images as the model is wide, and not one more
        added = pca_scores(flat, components) + pca_scores(old[space].reshape(-1, 16).T, components)
        expected = extend_released_basis(None, added, 0.9)
        assert ranks[space] == expected.shape[1]
        basis = projection.bases[space]
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("images", [5, 15])
def test_released_refuses_fewer_images_than_it_is_wide(images):
    projection = ReleasedBasis({"prompts": ProtectedParameter(Toy().prompts)}, ReleasedBasis.Config(components=4))
    projection.observe("prompts", ProtectedInputs(draw(images, 2, 16)))
    with pytest.raises(ValueError, match=f"16 images.*got {images}"):
        projection.end_task()


@pytest.mark.parametrize("on", ["gradient", "update"])
def test_a_handle_projects_what_is_learned_after_it_was_attached(on):
    toy = Toy()
    projection = Orthogonal(toy.protected(), Orthogonal.Config("input", 1, 1, apply_to=on))
    optimizer = OPTIMIZERS["sgd"](toy.parameters())
    projection.attach(optimizer)
    taught(projection)
    before = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
    toy.learn(optimizer)
    assert max(leaks(projection, toy, before)) < 1e-10


def test_a_jump_is_confined_where_updates_are():
    for on in ("gradient", "update"):
        toy = Toy()
        projection = taught(Orthogonal(toy.protected(), Orthogonal.Config("input", 1, 1, apply_to=on)))
        before = {space: target.parameter.detach().clone() for space, target in toy.protected().items()}
        with torch.no_grad(), projection.constrain():
            toy.prompts += draw(*toy.prompts.shape, seed=9)
            toy.keys += draw(*toy.keys.shape, seed=8)
        leak = max(leaks(projection, toy, before))
        assert leak < 1e-10 if on == "update" else leak > 0.1


def test_soft_scales_directions_by_their_energy():
    toy, energies = Toy(), torch.tensor([9.0, 1.0, *[0.0] * 14], dtype=torch.float64)
    projection = Soft(toy.protected(), Soft.Config(ridge=0.5))
    inputs = ProtectedInputs((16 * energies).sqrt().diag().unsqueeze(1))  # (16, 1, 16): their second moment is diagonal
    change = draw(3, 16, seed=5)
    for task in (1, 2):
        for space in toy.protected():
            projection.observe(space, inputs)
        ranks = projection.end_task()
        penalty = 0.5 * 10 / 16  # of the first task
        scales = penalty / (task * energies + penalty)
        torch.testing.assert_close(projection.project("keys", change), change * scales)
        assert ranks["keys"] == pytest.approx(float((1 - scales).sum()))
    assert projection.full_spaces() == []
    restored = Soft(toy.protected(), Soft.Config(ridge=0.5))
    restored.load_state_dict(projection.state_dict())
    torch.testing.assert_close(restored.project("keys", change), projection.project("keys", change))
    before = toy.keys.detach().clone()
    optimizer = torch.optim.Adam(toy.parameters(), lr=0.1)
    plain = Toy()
    free = torch.optim.Adam(plain.parameters(), lr=0.1)
    projection.attach(optimizer)
    for one, steps in ((toy, optimizer), (plain, free)):
        one.learn(steps, steps=1)
    torch.testing.assert_close(toy.keys.detach() - before, (plain.keys.detach() - before) * scales)
    with pytest.raises(ValueError, match="ridge above 0, got 0"):
        Soft.Config(ridge=0.0)


def test_soft_protects_a_prompt_from_the_first_task_whose_images_select_it():
    parameter = nn.Parameter(torch.zeros(2, 5, 8, dtype=torch.float64))
    projection = Soft({"values": ProtectedParameter(parameter, axis=-2, role="value")}, Soft.Config(ridge=0.1))
    x, change = draw(6, 2, 3, 5, seed=3), draw(2, 5, 5, seed=4)
    x[:, 1] = 0  # nobody selects prompt 1
    projection.observe("values", ProtectedInputs(x))
    projection.end_task()
    scaled = projection.project("values", change)
    assert torch.equal(scaled[1], change[1])
    assert not torch.allclose(scaled[0], change[0])
    later = torch.zeros_like(x)
    later[:, 1] = draw(6, 3, 5, seed=5) / 100
    projection.observe("values", ProtectedInputs(later))
    projection.end_task()
    alone = Soft({"values": ProtectedParameter(parameter, axis=-2, role="value")}, Soft.Config(ridge=0.1))
    alone.observe("values", ProtectedInputs(later))
    alone.end_task()
    torch.testing.assert_close(projection.project("values", change)[1], alone.project("values", change)[1])
    assert float(projection.project("values", change)[1].norm()) > 0.01 * float(change[1].norm())


def test_soft_goes_from_the_null_space_to_no_projection():
    toy, change = Toy(), draw(3, 2, 16, seed=5)
    ends = {ridge: taught(Soft(toy.protected(), Soft.Config(ridge=ridge))) for ridge in (1e-10, 1e10)}
    exact = taught(Orthogonal(toy.protected(), Orthogonal.Config("input", 1.0, 1.0)))
    torch.testing.assert_close(
        ends[1e-10].project("prompts", change), exact.project("prompts", change), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(ends[1e10].project("prompts", change), change, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [Orthogonal.Config(energy=0.9), Soft.Config()], ids=lambda config: config.tag)
def test_spaces_with_the_same_inputs_have_the_same_moments_which_are_computed_once(config, monkeypatch):
    inputs = draw(4, 6, 8)
    protected = {name: ProtectedParameter(nn.Parameter(torch.zeros(2, 8))) for name in ("q", "v")}
    observe = Mock(side_effect=SecondMoment.observe)
    monkeypatch.setattr(SecondMoment, "observe", lambda *arguments: observe(*arguments))
    found = []
    for same_as in ("q", None, "gone"):  # "gone" is not protected, so the inputs of v are observed
        projection = config.build(protected)
        for _ in range(2):  # tasks
            for batch in inputs.split(2):
                projection.observe("q", ProtectedInputs(batch))
                projection.observe("v", ProtectedInputs(batch, same_as=same_as))
            projection.end_task()
        found.append((projection.bases, observe.call_count))
        observe.reset_mock()
    (shared, once), (apart, twice), (gone, also_twice) = found
    assert (once, twice, also_twice) == (4, 8, 8)
    for space in protected:
        assert torch.equal(shared[space], apart[space])
        assert torch.equal(gone[space], apart[space])


def test_a_batch_of_fewer_images_than_processes_leaves_the_order_as_it_is(monkeypatch):
    protected = {"prompts": ProtectedParameter(nn.Parameter(torch.zeros(1, 2, 1)))}
    parts = []
    for rank in range(2):
        projection = ReleasedBasis(protected, ReleasedBasis.Config(components=1))
        for start, stop in ((0, 4), (4, 5), (5, 9), (9, 10)):  # two epochs
            images = torch.arange(start, stop).float()[rank::2].reshape(-1, 1, 1)
            if len(images):
                projection.observe("prompts", ProtectedInputs(images))
            else:
                projection.observe_nothing()
        parts.append(projection._images["prompts"])
    projection._widths["prompts"] = 10
    monkeypatch.setattr(released, "all_gather_object", lambda own: parts)
    assert projection._sample("prompts").flatten().tolist() == list(range(10))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_images_of_several_processes_are_in_the_order_of_one(world, monkeypatch):
    """The published basis depends on the order of images."""
    batches = [torch.arange(start, stop).float() for start, stop in ((0, 8), (8, 16), (16, 19))]
    parts = [[batch[rank::world].reshape(-1, 1, 1) for batch in batches] for rank in range(world)]
    protected = {"prompts": ProtectedParameter(nn.Parameter(torch.zeros(1, 2, 1)))}
    projection = ReleasedBasis(protected, ReleasedBasis.Config(components=1))
    for batch in parts[0]:
        projection.observe("prompts", ProtectedInputs(batch))
    projection._widths["prompts"] = 19
    gathered = [[batch.flatten(1) for batch in part] for part in parts]
    monkeypatch.setattr(released, "all_gather_object", lambda own: gathered)
    assert projection._sample("prompts").flatten().tolist() == list(range(19))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"components": 5},
            r"at most 4 as projection\.components for 4 vectors of \d+ numbers \(prompts\), got 5",
        ),
        (
            {"components": 2, "key_components": 9},
            r"at most \d as projection\.key_components .* \(keys\), got 9",
        ),
    ],
)
def test_components_that_prompts_cannot_have_are_refused_before_training(settings, message):
    protected = {
        "prompts": ProtectedParameter(nn.Parameter(torch.zeros(2, 2, 8))),
        "keys": ProtectedParameter(nn.Parameter(torch.zeros(3, 8)), role="key"),
    }
    with pytest.raises(ValueError, match=message):
        ReleasedBasis(protected, ReleasedBasis.Config(**settings))
