"""RanPAC against a loop in NumPy, in parts, from a state and on a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
import tiny
from pgp.datasets.synthetic import Synthetic
from pgp.methods.head_only import HeadOnly
from pgp.predict import Predictor
from pgp.readouts.base import Features
from pgp.readouts.ranpac import PENALTIES, RanPAC
from pgp.train import train

C, D, M = 4, 5, 32


def drawn(each=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(C).repeat_interleave(each)
    means = 2 * torch.randn(C, D, generator=torch.Generator().manual_seed(9))
    return means[labels] + torch.randn(len(labels), D, generator=generator), labels


def observed(readout, features, labels, held_out=None):
    selected = readout.select_features(Features(features))
    readout.observe(selected, labels)
    if held_out is not None:
        readout.hold_out(selected[held_out], labels[held_out], augmented=False)


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10.0])
def test_scores_are_those_of_the_paper(penalty):
    (features, labels), (test, _) = drawn(), drawn(seed=1)
    readout = RanPAC(C, RanPAC.Config(dimensions=M, penalty=penalty))
    observed(readout, features, labels)
    readout.end_task()
    projection = readout.state_dict()["projection"]
    assert projection.shape == (D, M)
    scores = oracles.ranpac(*(t.double().numpy() for t in (features,)), labels.numpy(), projection.double().numpy(),
                            penalty, test.double().numpy())  # fmt: skip
    logits = readout.logits(readout.select_features(Features(test)))
    np.testing.assert_allclose(logits.numpy(), scores, rtol=1e-3, atol=1e-4)


def test_tasks_in_any_parts_and_order_equal_all_at_once():
    features, labels = drawn()
    whole, parts = (RanPAC(C, RanPAC.Config(dimensions=M, penalty=0.1)) for _ in range(2))
    observed(whole, features, labels)
    whole.end_task()
    for classes in ([2, 3], [0], [1]):
        rows = torch.isin(labels, torch.tensor(classes))
        for half in (rows & (torch.arange(len(labels)) % 2 == 0), rows & (torch.arange(len(labels)) % 2 == 1)):
            observed(parts, features[half], labels[half])
        parts.end_task()
        test = parts.select_features(Features(features))
        assert torch.isinf(parts.logits(test)[:, ~parts.seen]).all()
    torch.testing.assert_close(parts.logits(test), whole.logits(test), rtol=1e-5, atol=1e-6)


def test_the_penalty_is_the_one_that_is_best_on_held_out_images():
    features, labels = drawn()
    held_out = torch.arange(len(labels)) % 4 == 0
    readout = RanPAC(C, RanPAC.Config(dimensions=M))
    observed(readout, features, labels, held_out)
    readout.end_task()
    errors = []
    for penalty in PENALTIES:
        without = RanPAC(C, RanPAC.Config(dimensions=M, penalty=penalty))
        observed(without, features[~held_out], labels[~held_out])
        without.end_task()
        logits = without.logits(without.select_features(Features(features[held_out])))
        one_hot = torch.nn.functional.one_hot(labels[held_out], C)
        candidates = [(logits / t).softmax(1) for t in torch.logspace(-3, 1, 200)]
        errors.append(min(float((p - one_hot).square().sum() + p.square().sum(1).mean()) for p in candidates))
    assert readout.regularisation == PENALTIES[int(np.argmin(errors))]
    assert len(set(np.round(errors, 3))) > 3
    again = RanPAC(C, RanPAC.Config(dimensions=M))
    again.load_state_dict(readout.state_dict())
    test = again.select_features(Features(features))
    assert torch.equal(again.logits(test), readout.logits(test))
    assert (again.regularisation, again.temperature) == (readout.regularisation, readout.temperature)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"expected compensate='none', got 'shift': .* lda or logistic"):
        RanPAC.Config(compensate="shift")
    for wrong in ({"dimensions": 0}, {"penalty": 0.0}, {"penalty": float("nan")}):
        with pytest.raises(ValueError, match="dimensions of at least 1, and penalty above 0 or None"):
            RanPAC.Config(**wrong)
    with pytest.raises(ValueError, match="at least one task before logits"):
        RanPAC(3).logits(torch.zeros(1, 4))


def test_a_run_reports_what_it_keeps_and_predicts(tmp_path):
    config = tiny.config(dataset=Synthetic(), method=HeadOnly.Config(learns=False),
                         readouts=(RanPAC.Config(dimensions=64, patches=True, normalize=True),))  # fmt: skip
    run = train(config, tmp_path / "run")
    (name, matrix), *_ = run.matrices().items()
    assert name == "ranpac-64+patches+normalize"
    assert matrix[-1].mean() > 0.9
    *_, last = run.events("task")
    assert last["readouts"][name]["bytes"] > 8 * 64 * 64
    predictor = Predictor(run)
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)]
    assert len(predictor.predict(images)) == 1
    with pytest.raises(ValueError, match=r"expected a readout that can tell unknown images .* got 'ranpac-64"):
        predictor.predict(images, reject=0.05)
