"""What `pgp push` publishes, `pgp pull` and `Predictor.from_pretrained` make a run of, through the hub's own client.

The hub is a stand-in on this machine, see `hub_server.py`.
"""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import hub_server
import tiny
from pgp import hub, recipes, train
from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.cli import main
from pgp.config import Hardware
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.manifest import Manifest
from pgp.evaluation.calibration import calibration_error_by_chance, logged_bins
from pgp.hub import HubError
from pgp.methods.head_only import HeadOnly
from pgp.methods.lora import LoRA
from pgp.model_card import model_card
from pgp.predict import Predictor
from pgp.projections.base import NoProjection
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.lda import LDA
from pgp.runs.checkpoint import FORMAT
from pgp.runs.data_paths import portable
from pgp.runs.run import Run
from pgp.runs.statetree import Piece
from pgp.system import storage
from pgp.system.storage import RunError

SECRET = "secret-holiday"
"""Part of the name of every folder and image of the user."""
NAMES = ("cat|*dog*", "<b>", "[x](http://y.z)", "Größe", "a_b", "@anna")
QUICK = {
    "method": HeadOnly.Config(learns=False),
    "projection": NoProjection.Config(),
    "readouts": (LDA.Config(),),
    "epochs": 1,
}
IMAGES = [torch.randint(256, (3, 40, 50), generator=torch.Generator().manual_seed(i)).byte() for i in range(4)]
NAME = "anna/animals"


@pytest.fixture(scope="module", autouse=True)
def service(tmp_path_factory):
    with hub_server.connected(tmp_path_factory.mktemp("cache")) as service:
        yield service


def pictures(folder, classes=NAMES):
    for number in range(len(classes)):
        (folder / f"{number}").mkdir(parents=True)
        for index in range(6):
            image = Image.effect_noise((32, 32), 20 + 30 * number).convert("RGB")
            image.save(folder / f"{number}" / f"{SECRET}{index}.png")
    lines = [f"{number} {name}" for number, name in enumerate(classes)]
    (folder / "names.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a folder of images, with a second data set added, one worker, and a log of everything."""
    home = tmp_path_factory.mktemp(SECRET)
    data = pictures(home / f"{SECRET}-photos")
    (home / f"{SECRET}-tasks.json").write_text(json.dumps({"one": NAMES[:2], "two": NAMES[2:4], "three": NAMES[4:]}))
    config = tiny.config(dataset=Folder(data), task_file=home / f"{SECRET}-tasks.json", drift_images=2, **QUICK)
    return train.train(config, home / "run")


@pytest.fixture(scope="module")
def pushed(run, service):
    return hub.push(run, NAME, license="cc-by-4.0")


def repository(service, name, files):
    """A repository with these files only."""
    service.repositories[name] = made = hub_server.Repository(private=True)
    made.commit(files, tuple(made.files))
    return made


def published(service):
    return dict(service.repositories[NAME].files)


def fails(call, *parts):
    """The message of the error has these parts and is one line."""
    with pytest.raises((RunError, ValueError)) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_pulled_run_predicts_the_same(run, pushed, service, tmp_path):
    pulled = hub.pull(NAME, tmp_path / "pulled")
    expected = Predictor(run, device="cpu")
    for predictor in (
        Predictor(pulled.run, device="cpu"),
        Predictor.from_pretrained(NAME, device="cpu"),
        Predictor.from_pretrained(tmp_path / "pulled", device="cpu"),
    ):
        assert predictor.classes == expected.classes
        assert torch.equal(predictor.probabilities(IMAGES), expected.probabilities(IMAGES))
        assert predictor.predict(IMAGES, top=3, reject=0.2) == expected.predict(IMAGES, top=3, reject=0.2)
    assert pulled.revision == pushed.revision == service.repositories[NAME].head
    assert json.loads((tmp_path / "pulled" / "hub.json").read_text()) == {
        "repository": NAME,
        "revision": pushed.revision,
    }
    assert pulled.run.id == run.id
    torch.testing.assert_close(pulled.run.matrices(), run.matrices(), rtol=0, atol=0, equal_nan=True)
    assert {path.name for path in tmp_path.iterdir()} == {"pulled"}


def test_large_files_go_another_way_than_small_ones(pushed, service):
    assert set(service.large.values()) == {
        data for data in published(service).values() if len(data) > hub_server.INLINE
    }
    assert {path.rpartition("/")[2] for path in published(service)} == {
        *(".gitattributes", "README.md", "config.json", "classes.json", "environment.json", "metrics.jsonl"),
        *("accuracy.csv", "latest", "state.json", "state.safetensors"),
    }


def test_a_pinned_revision_never_changes_and_needs_no_network(run, pushed, service, tmp_path):
    first = Predictor.from_pretrained(NAME, revision=pushed.revision, device="cpu")
    shutil.copytree(run.folder, tmp_path / "run")
    more = pictures(tmp_path / "birds", ("owl", "crow"))
    later = train.resume(tmp_path / "run", add=more)
    second = hub.push(later, NAME)
    assert second.revision != pushed.revision
    assert not [name for name in published(service) if "task-03" in name]  # the checkpoint of before
    asked = len(service.requests)
    again = Predictor.from_pretrained(NAME, revision=pushed.revision, device="cpu")
    assert torch.equal(first.probabilities(IMAGES), again.probabilities(IMAGES))
    assert len(service.requests) == asked
    assert Predictor.from_pretrained(NAME, device="cpu").classes == (*first.classes, "owl", "crow")
    service.repositories[NAME].tags["v1"] = pushed.revision
    assert hub.pull(NAME, tmp_path / "tagged", revision="v1").revision == pushed.revision
    service.repositories[NAME].head = pushed.revision


def test_a_pulled_run_learns_on(run, pushed, tmp_path):
    folder = hub.pull(NAME, tmp_path / "pulled").run.folder
    more = pictures(tmp_path / "birds", ("owl", "crow"))
    with pytest.warns(UserWarning, match="the old images in .* are not evaluated"):
        learned = train.resume(folder, add=more)
    predictor = Predictor(learned, device="cpu")
    assert predictor.classes == (*Predictor(run, device="cpu").classes, "owl", "crow")
    shutil.copytree(run.folder, tmp_path / "run")
    expected = Predictor(train.resume(tmp_path / "run", add=more), device="cpu")
    assert torch.equal(predictor.probabilities(IMAGES), expected.probabilities(IMAGES))


def test_nothing_private_goes_up(run, pushed, service):
    names = [name for name in (platform.node(), getpass.getuser()) if len(name) > 6]  # a short one may be in any file
    for word in (SECRET, str(run.folder.parents[1]), platform.platform(), *names):
        assert word.encode() not in bytes(service.sent), word
        for name, data in published(service).items():
            assert word.encode() not in data, name
    assert SECRET in (run.folder / "config.json").read_text()
    assert b"drift" not in published(service)["checkpoints/task-03/state.json"].replace(b"drift_images", b"")
    assert b"predictions" in (run.folder / "checkpoints" / "task-03" / "state.json").read_bytes()
    assert b"predictions" not in published(service)["checkpoints/task-03/state.json"]


@pytest.mark.parametrize(
    "dataset",
    [Folder("/home/anna/x", train_folder="/home/anna/y"), Manifest("/home/anna/x.csv"), HuggingFace("/home/anna/x")],
    ids=lambda dataset: dataset.tag,
)
def test_portable_settings_name_no_path(dataset):
    config = tiny.config(dataset=dataset, added=(dataset,), class_order="/home/anna/o.txt", hardware=Hardware("cpu"))
    found = portable(config)
    assert "anna" not in json.dumps(found.to_json())
    assert found.hardware == Hardware()
    assert portable(found) == found


def test_portable_settings_keep_names():
    config = tiny.config(dataset=HuggingFace("anna/beans"), class_order="seed-1993", drift_images=0)
    assert portable(config) == config


@pytest.mark.parametrize(
    "backbone",
    [
        ViT.Config("vit_tiny_patch16_224", "/home/anna/vit.safetensors"),
        ViT.Config("vit_tiny_patch16_224", "package:../../anna.safetensors"),
        CLIP.Config("package:demo_clip_model.json", "anna.pt"),
        CLIP.Config("package:../anna.json", "openai"),
    ],
)
def test_an_encoder_that_others_do_not_have_is_refused(backbone):
    with pytest.raises(ValueError, match=r"expected an encoder that others can load, got weights from .*anna"):
        portable(tiny.config(backbone=backbone))


def test_a_path_in_another_setting_is_refused():
    with pytest.raises(ValueError, match=r"expected settings without paths, got '/home/anna' as name"):
        portable(tiny.config(name="/home/anna"))


def test_push_and_pull_on_the_command_line(run, service, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main.main(["push", str(run.folder), "anna/by-hand", "--license", "apache-2.0"])
    main.main(["pull", "anna/by-hand"])
    revision = service.repositories["anna/by-hand"].head
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [
        f"page:     {service.address}/anna/by-hand",
        f"revision: {revision}",
        "use it:   pgp pull anna/by-hand, or Predictor.from_pretrained",
        "pulled:   anna/by-hand",
        f"revision: {revision}",
        "run:      runs/by-hand",
        "use it:   pgp predict runs/by-hand IMAGE ...",
    ]
    assert out.startswith("pushed:   9 files, 0.")
    assert max(map(len, out.splitlines())) <= 80
    assert not err
    assert service.repositories["anna/by-hand"].private
    Image.effect_noise((32, 32), 50).convert("RGB").save("image.png")
    main.main(["predict", "runs/by-hand", "image.png"])
    main.main(["predict", str(run.folder), "image.png"])
    pulled, own = capsys.readouterr().out.splitlines()
    assert pulled == own
    with pytest.raises(SystemExit):
        main.main(["pull", "anna/by-hand"])
    assert "expected a new or empty folder for the run, but runs/by-hand is not empty" in capsys.readouterr().err


def test_a_predictor_is_pushed(run, service):
    revision = Predictor(run, device="cpu").push_to_hub("anna/predictor", private=False, license="mit")
    made = service.repositories["anna/predictor"]
    assert made.head == revision
    assert not made.private
    assert service.metadata["license"] == "mit"


def test_a_saved_predictor_is_a_run(run, tmp_path):
    predictor = Predictor(run, device="cpu")
    predictor.save_pretrained(tmp_path / "saved")
    again = Predictor.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again.probabilities(IMAGES), predictor.probabilities(IMAGES))
    assert 'from_pretrained("OWNER/NAME")' in (tmp_path / "saved" / "README.md").read_text()
    fails(lambda: predictor.save_pretrained(tmp_path / "saved"), "expected a new or empty folder for the model, but")
    fails(lambda: Predictor.from_pretrained(tmp_path / "saved", revision="v1"), "expected no revision for the folder")
    fails(
        lambda: Predictor.from_pretrained(tmp_path / "none"), "expected a run folder, or a repository", "none: there is"
    )


def test_the_card(pushed, service):
    card = published(service)["README.md"].decode()
    assert service.metadata["library_name"] == "prompt-gradient-projection"
    for part in (
        "\n# animals\n",
        'predictor = Predictor.from_pretrained("anna/animals")\n',
        "An image classifier of 6 classes, learned in 3 tasks one after the other",
        "| task | classes | training images | test images |",
        r"| 1 (one) | cat\|\*dog\*, \<b\> | 10 | 2 |",
        r"| 2 (two) | \[x\](http\://y.z), Größe | 10 | 2 |",
        r"| 3 (three) | a\_b, \@anna | 10 | 2 |",
        "This is one run, with seed 42",
        "| readout | accuracy | forgetting | accuracy, task given | calibration error |",
        "| data | images of the author, in a folder for each class |",
        "| this model | cc-by-4.0, as its author states |",
        "| encoder | unknown: ask the source |",
        "| data | unknown: ask the source |",
    ):
        assert part in card, part
    assert card.count("```") == 2


def test_the_numbers_of_the_card_are_those_of_the_run(run, pushed, service):
    (row,) = [line for line in published(service)["README.md"].decode().splitlines() if line.startswith("| lda ")]
    matrix, event = run.matrices()["lda"], run.events("task")[-1]
    given = sum(event["within"]["lda"]) / 3
    numbers = [matrix[-1].mean(), matrix[:, :2].nan_to_num().amax(0).sub(matrix[-1, :2]).mean(), given]
    entry = event["calibration"]["lda"]
    numbers += [entry["error"], calibration_error_by_chance(logged_bins(entry))]
    assert row == "| lda | " + " | ".join(f"{100 * float(number):.2f}" for number in numbers) + " |"


def test_a_card_tells_leaking_accuracies_apart(tmp_path):
    config = tiny.config(legacy_eval=True, epochs=1)
    finished = train.train(config, tmp_path / "run")
    main.main(["audit", str(tmp_path / "run"), "--batch-sizes", "8"])
    hub.save(finished, tmp_path / "saved")
    honest, leaking = (tmp_path / "saved" / "README.md").read_text().split("**use the task of the test images**")
    assert "legacy" not in honest.split("## How well does it do?")[1]
    found = json.loads((tmp_path / "run" / "audit.json").read_text())["accuracy"]
    vote = next(one for one in found if one["choice"] == "vote" and one["scope"] == "cut" and one["column"] == "lda")
    votes = f"| lda | prompts by vote of 8, classes up to the image's task | {100 * vote['accuracy']:.2f} |"
    assert votes in leaking
    assert "| head | --legacy-eval, the published code | " in leaking
    assert "| lda | --legacy-eval, the published code | " in leaking
    text = (tmp_path / "run" / "audit.json").read_text()
    changed = json.loads(text)
    next(one for one in changed["accuracy"] if not one["uses_task"] and one["scope"] == "seen")["accuracy"] = 0.5
    (tmp_path / "run" / "audit.json").write_text(json.dumps(changed))
    hub.save(finished, tmp_path / "again")
    assert "by vote" not in (tmp_path / "again" / "README.md").read_text()  # an audit of another state


def test_what_fails_leaves_no_folder(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "audit.json").write_text("{")
    fails(lambda: hub.save(folder, tmp_path / "out"), "audit.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def card_of(tmp_path, test_images=(2, 2), **changes):
    """The card of a run that was recorded with these settings."""
    folder = tmp_path / "card"
    described = replace(tiny.described(("a", "b", "c", "d"), ((0, 1), (2, 3))), test_images=test_images)
    made = Run.create(folder, tiny.config(**changes), described)
    made.save("task-01", {"matrices": {"lda": torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan]])}})
    return model_card(made, license=None)


def test_a_card_names_the_encoder_and_claims_no_licence_that_is_unknown(tmp_path):
    card = card_of(tmp_path, backbone=ViT.Config())
    assert 'base_model: "timm/vit_base_patch16_224.orig_in21k"\n' in card
    assert "| encoder | apache-2.0, as timm states it for timm/vit\\_base\\_patch16\\_224.orig\\_in21k |" in card
    assert "| this model | not stated by its author: ask before use |" in card
    assert "\nlicense" not in card
    shutil.rmtree(tmp_path / "card")
    card = card_of(tmp_path, backbone=CLIP.Config())
    assert "| encoder | unknown: see timm/vit\\_base\\_patch16\\_clip\\_224.openai |" in card


def test_a_card_is_about_finished_tasks_only(tmp_path):
    card = card_of(tmp_path)
    assert "An image classifier of 2 classes, learned in one task, by" in card
    assert "- Its accuracy was measured on test images from the same source" in card
    assert "after task 1 of 2" in card
    assert "| 1 | a, b | 2 | 2 |" in card
    assert "| 2 | c, d |" not in card
    assert "| lda | 50.00 | 0.00 | not measured |" in card


def test_a_card_without_test_images_claims_no_accuracy(tmp_path):
    card = card_of(tmp_path, test_images=(0, 2))
    assert "This run has no test images, so its accuracy was not measured." in card
    assert "- Its accuracy was not measured.\n" in card
    assert "test images that were not trained on" not in card
    assert "from the same source" not in card


def test_a_card_of_task_incremental_learning_says_that_the_task_is_given(tmp_path):
    card = card_of(tmp_path, setting="til")
    assert "| readout | accuracy, task given | forgetting |\n" in card
    assert "task incremental learning" in card


def test_a_licence_has_the_form_of_one(run, tmp_path):
    fails(lambda: hub.save(run, tmp_path / "x", license="mit\nevil: 1"), "expected a licence as the hub spells it")


def test_an_unfinished_run_is_not_pushed(run, service, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "checkpoints" / "latest").write_text("task-02")
    fails(lambda: hub.push(folder, "anna/unfinished"), "expected a finished run", "2 of 3 tasks", "pgp train --resume")
    assert "anna/unfinished" not in service.repositories


def test_files_of_others_are_not_overwritten(run, pushed, service):
    theirs = repository(service, "anna/notes", {"README.md": b"mine", "notes.txt": b"mine", "config.json": b"{}"})
    error = fails(lambda: hub.push(run, "anna/notes"), "anna/notes holds another model", "--replace")
    assert isinstance(error, HubError)
    theirs.commit({}, ("config.json",))
    fails(lambda: hub.push(run, "anna/notes"), "files that pgp did not write, such as README.md, notes.txt")
    before = theirs.head
    assert theirs.commits[before]["README.md"] == b"mine"
    stale = "checkpoints/task-09/state.json"
    theirs.commit({stale: b"old"})
    hub.push(run, "anna/notes", replace=True)
    assert theirs.files["notes.txt"] == b"mine"
    assert stale not in theirs.files
    assert theirs.files["README.md"].startswith(b"---\n")
    assert theirs.commits[before]["README.md"] == b"mine"


def test_another_run_is_not_overwritten(run, pushed, service, tmp_path):
    other = Run.create(tmp_path / "other", tiny.config(), tiny.described(("a", "b"), ((0, 1),)))
    other.save("task-01", {"matrices": {"lda": torch.tensor([[0.5]])}})
    before = published(service)
    fails(lambda: hub.push(other, NAME), "holds another model, and nothing of it will be overwritten")
    assert published(service) == before


def test_a_push_never_publishes_more_than_it_says(run, service):
    repository(service, "anna/open", {}).private = False
    fails(lambda: hub.push(run, "anna/open"), "anna/open is public, so everybody would see this run: add --public")
    repository(service, "anna/closed", {})
    fails(lambda: hub.push(run, "anna/closed", public=True), "expected a public repository, but anna/closed is private")


def test_a_push_needs_a_token(run, service, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    fails(lambda: hub.push(run, "anna/none"), "pushing needs a token of the hub", "hf auth login", "HF_TOKEN")
    fails(lambda: hub.push(run, "anna/none", token="hf_wrong"), "status 401", "the token is not valid")
    assert "anna/none" not in service.repositories


@pytest.mark.parametrize(
    ("status", "advice"),
    [(403, "needs the role write"), (412, "somebody else changed it at the same time"), (500, "try again later")],
)
def test_what_the_hub_refuses_is_one_line(run, service, monkeypatch, status, advice):
    monkeypatch.setitem(service.status, "/commit/", status)
    fails(lambda: hub.push(run, "anna/refused"), f"refuses what was asked of anna/refused (status {status})", advice)


def test_a_push_that_was_interrupted_is_repeated(run, service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(service.status, "/preupload/", 400)
        fails(lambda: hub.push(run, "anna/twice"), "status 400")
    assert set(service.repositories["anna/twice"].files) == {".gitattributes"}
    assert "config.json" in hub.push(run, "anna/twice").files


@pytest.mark.parametrize(
    "name", ["animals", "anna/", "/animals", "anna/../x", "a/b/c", "anna/an imals", "", "-a/b", None]
)
def test_a_repository_has_an_owner_and_a_name(name, tmp_path):
    fails(lambda: hub.pull(name, tmp_path / "x"), "expected a repository of the hub as OWNER/NAME")


def test_what_is_not_there_is_told(pushed, service, tmp_path):
    fails(lambda: hub.pull("anna/nothing", tmp_path / "x"), "no repository anna/nothing that you may see", "HF_TOKEN")
    fails(lambda: hub.pull(NAME, tmp_path / "x", token="hf_wrong"), f"no repository {NAME} that you may see")
    fails(lambda: hub.pull(NAME, tmp_path / "x", revision="v9"), f"{NAME} has no revision v9")
    fails(lambda: Predictor.from_pretrained("anna/nothing"), "no repository anna/nothing that you may see")
    assert not list(tmp_path.iterdir())


def test_a_hub_that_does_not_answer_is_told(pushed, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    fails(
        lambda: hub.pull(NAME, tmp_path / "x"),
        "no usable answer from the hub at http://127.0.0.1:1",
        "check the network",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(lambda: hub.pull(NAME, tmp_path / "x"), "HF_HUB_OFFLINE forbids to ask the hub")


def test_an_interrupted_pull_leaves_nothing(pushed, service, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service, "cut", "state.safetensors")
        fails(lambda: hub.pull(NAME, tmp_path / "pulled"), "check the network, and try again")
    assert not list(tmp_path.iterdir())
    hub.pull(NAME, tmp_path / "pulled")


def test_only_expected_files_are_downloaded(pushed, service, tmp_path):
    evil = ("pytorch_model.bin", "../escape.json", "checkpoints/../../escape", "checkpoints/task-03/x.pkl", "hub.py",
            "checkpoints/task-03/state.json/../../../x", ".pgp-output", "checkpoints\\task-03\\state.json")  # fmt: skip
    repository(service, "anna/evil", {**published(service), **dict.fromkeys(evil, b"evil")})
    asked = len(service.requests)
    hub.pull("anna/evil", tmp_path / "sub" / "pulled")
    paths = [path.partition("/resolve/")[2] for path in service.paths()[asked:] if "/resolve/" in path]
    assert len(paths) >= 9
    assert all(hub.FILES.fullmatch(path.partition("/")[2]) for path in paths)
    assert {path.name for path in tmp_path.iterdir()} == {"sub"}
    assert not list(tmp_path.glob("**/*evil*")) + list(tmp_path.glob("**/*.bin")) + list(tmp_path.glob("**/*.p*"))[1:]


def resealed(data, **changes):
    tree = json.loads(data)
    tree.pop(storage.DIGEST)
    return json.dumps(storage.sealed({**tree, **changes})).encode()


RECORD, TENSORS = "checkpoints/task-03/state.json", "checkpoints/task-03/state.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: {"README.md": b"x", "model.bin": b"x"}, "expected a run that pgp push wrote in anna/bad, got R"),
        (lambda files: {}, "expected a run that pgp push wrote in anna/bad, got no files"),
        (lambda files: {**files, TENSORS: None}, "cannot read checkpoints/task-03/state.safetensors"),
        (lambda files: {**files, RECORD: None}, "cannot read checkpoints/task-03/state.json"),
        (lambda files: {**files, TENSORS: files[TENSORS][:-1] + b"\x07"}, "state.safetensors was changed or damaged"),
        (lambda files: {**files, RECORD: files[RECORD][:-9] + b"}"}, "state.json is damaged, it holds no"),
        (lambda files: {**files, "checkpoints/latest": b"../../x"}, "names no checkpoint"),
        (lambda files: {**files, RECORD: resealed(files[RECORD], format=FORMAT + 1)}, f"the format {FORMAT + 1}"),
        (lambda files: {**files, "checkpoints/latest": b"task-04-step-000010"}, "task-04-step-000010: No such file"),
        (lambda files: with_config(files, version=3), "expected a configuration of version 2, got 3"),
        (lambda files: with_config(files, task_file="tasks.json"), "its settings name files of a machine"),
        (lambda files: with_config(files, dataset={**config_of(files)["dataset"], "root": "/etc"}), "name files of a"),
        (lambda files: with_config(files, backbone={**config_of(files)["backbone"], "weights": "/etc/x.pt"}),
         "expected an encoder that others can load"),
        (lambda files: with_config(files, backbone={**config_of(files)["backbone"], "weights": "package:../../x.pt"}),
         "expected an encoder that others can load"),
        (lambda files: with_config(files, name="C:\\x"), "expected settings without paths"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_repository_that_is_no_run_is_refused(pushed, service, tmp_path, change, message):
    files = {name: data for name, data in change(published(service)).items() if data is not None}
    repository(service, "anna/bad", files)
    error = fails(lambda: hub.pull("anna/bad", tmp_path / "pulled"), message, "anna/bad")
    assert "pgp train" not in str(error)
    assert str(tmp_path) not in str(error)
    assert not list(tmp_path.iterdir())


def config_of(files):
    return json.loads(files[RECORD])["config"]


def with_config(files, **changes):
    """The files of a run whose checkpoint records other settings, with right digests."""
    return {**files, RECORD: resealed(files[RECORD], config={**config_of(files), **changes})}


def test_a_disk_that_is_too_small_is_told(pushed, service, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    fails(lambda: hub.pull(NAME, tmp_path / "x"), f"{NAME} has ", "make room")
    assert not list(tmp_path.iterdir())


def test_pieces_of_a_state_are_published(service, tmp_path):
    folder = tmp_path / "run"
    made = Run.create(folder, tiny.config(), tiny.described(("a", "b"), ((0, 1),)))
    state = {"matrices": {"lda": torch.tensor([[0.5]])}, "method": {0: Piece({"weight": torch.ones(2)})}}
    made.save("task-01", {**state, "drift": {"references": {0: Piece({"features": torch.zeros(2)})}}})
    assert sum("checkpoints/pieces/" in name for name in hub.push(made, "anna/pieces").files) == 1
    pulled = hub.pull("anna/pieces", tmp_path / "pulled").run.load()
    assert torch.equal(pulled["method"][0]["weight"], torch.ones(2))
    assert pulled.keys() == state.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l2p", "lora", "clip"])
def test_every_kind_of_run_predicts_the_same(method, service, tmp_path):
    changes = {
        "l2p": {},
        "lora": {"method": LoRA.Config(rank=2), "experts": "task", "readouts": (ExpertLDA.Config(),)},
        "clip": {"method": recipes.METHODS["clip"], "backbone": recipes.BACKBONES["demo-clip"]},
    }[method]
    projection = {} if method == "l2p" else {"projection": NoProjection.Config()}
    finished = train.train(tiny.config(epochs=1, **changes, **projection), tmp_path / "run")
    hub.push(finished, f"anna/{method}", public=True)
    pulled = Predictor(hub.pull(f"anna/{method}", tmp_path / "pulled").run, device="cpu")
    assert torch.equal(pulled.probabilities(IMAGES), Predictor(finished, device="cpu").probabilities(IMAGES))


@pytest.mark.slow
def test_a_predictor_is_imported_without_the_client():
    code = "import sys, pgp; pgp.Predictor; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "False"
