"""Share finished runs on the Hugging Face hub: `push` publishes a run, `pull` makes a run folder of what was published.

A repository holds a run folder with the latest finished state and a model card: JSON, CSV and safetensors. It never
holds images or paths of the machine. What a repository holds is not trusted: only files with expected names are
downloaded, nothing of them is run, and settings must not name files.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import Progress

from pgp import __version__
from pgp.analysis.audit import read_findings
from pgp.backbones.weights import hub_quiet
from pgp.model_card import check_license, model_card
from pgp.progress import no_progress, track
from pgp.runs import checkpoint
from pgp.runs.checkpoint import LATEST, CheckpointName
from pgp.runs.data_paths import portable
from pgp.runs.run import CLASSES, CONFIG, ENVIRONMENT, LOG, TABLE, Run
from pgp.system import platforms, storage
from pgp.system.outputs import make_output, require_replaceable
from pgp.system.paths import StrPath, as_path
from pgp.system.storage import RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD, SOURCE = "README.md", "hub.json"
"""Names of the model card, and of the file that says from where a run folder was pulled."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
_NAMES = (
    *map(re.escape, (CARD, CONFIG, CLASSES, ENVIRONMENT, LOG, TABLE, f"checkpoints/{LATEST}")),
    rf"checkpoints/task-[0-9]{{2,9}}/({re.escape(checkpoint.RECORD)}|{re.escape(checkpoint.STATE)})",
    rf"checkpoints/{checkpoint.PIECES}/{checkpoint.PIECE.pattern}",
)
FILES = re.compile("|".join(_NAMES))
"""Names of the files that `push` writes. No others are downloaded."""


class HubError(RunError):
    """Something that the hub refuses, or a repository that cannot be used. The message says what to do."""


class Pushed(NamedTuple):
    """What `push` published."""

    url: str
    revision: str
    """Hash of the commit."""
    files: tuple[str, ...]
    size: int
    """Size of all files in bytes."""
    is_private: bool


class Pulled(NamedTuple):
    """What `pull` downloaded."""

    run: Run
    revision: str
    """Hash of the commit."""


def save(run: Run | StrPath, folder: StrPath, repository: str | None = None, *, license: str | None = None) -> Run:
    """Write what `push` publishes of a run: a run folder with the latest finished task, and a model card.

    Args:
        run: A run, or the path of its folder.
        folder: Folder to write: new, or empty and neither the working directory nor a link or mount point.
        repository: Name of the repository for the model card, OWNER/NAME. If None, the card has a placeholder.
        license: Licence of the model for the card, as the hub spells it, such as apache-2.0. If None, the card says
            that none is stated.

    Returns:
        The run in `folder`.

    Raises:
        RunError: If no task of the run is finished, or `folder` cannot be written.
        ValueError: If the encoder needs a file of this machine, or an argument has a wrong form.
    """
    run = run if isinstance(run, Run) else Run.open(as_path(run, "a run folder"))
    return _save(run, run.latest_finished(), as_path(folder, "a folder for the model"), repository, license)


def _save(run: Run, name: CheckpointName, folder: Path, repository: str | None, license: str | None) -> Run:
    if repository is not None:
        check_repository(repository)
    check_license(license)
    require_replaceable(folder, "the model")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pgp-save-", dir=folder.parent) as scratch:
            copy = run.copy(Path(scratch) / "run", name, portable)
            card = model_card(copy, repository, license=license, findings=read_findings(run))
            storage.write(copy.folder / CARD, card)
            platforms.move_folder(copy.folder, folder)
    except OSError as error:
        raise storage.write_error("write", folder, error) from error
    return Run.open(folder)


def push(
    run: Run | StrPath,
    repository: str,
    *,
    public: bool = False,
    license: str | None = None,
    replace: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish a finished run in a repository of models, as one commit.

    Earlier revisions stay in the history of the repository.

    Args:
        run: A run, or the path of its folder. All of its tasks must be finished.
        repository: Name of the repository, OWNER/NAME. If it does not exist, it is created.
        public: Whether everybody may see a repository that is created. An existing one must be as this says.
        license: Licence of the model for the card, as the hub spells it, such as apache-2.0.
        replace: Also push to a repository that holds other files than those of this run. Files with the names that pgp
            uses are replaced, others stay.
        message: Message of the commit.
        token: Token of the hub. If None, that of `hf auth login` or of the environment variable HF_TOKEN.

    Raises:
        HubError: If the repository holds other files, or the hub refuses.
        RunError: If a task of the run is not finished.
        ValueError: If the encoder needs a file of this machine, or an argument has a wrong form.
    """
    check_repository(repository)
    run = run if isinstance(run, Run) else Run.open(as_path(run, "a run folder"))
    finished, tasks = run.progress()
    if finished < tasks:
        raise RunError(f"expected a finished run, got {run.folder} with {finished} of {tasks} tasks: resume it with"
                       f" {run.resume_command}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pgp-push-") as scratch:
        copy = _save(run, run.latest_finished(), Path(scratch) / "run", repository, license)
        paths = {path.relative_to(copy.folder).as_posix(): path for path in sorted(copy.folder.rglob("*"))}
        paths = {name: path for name, path in paths.items() if FILES.fullmatch(name)}
        api = _api(token, writes=True)
        with _asking(repository):
            api.create_repo(repository, private=not public, exist_ok=True)
            info = api.model_info(repository)
        existing = [file.rfilename for file in info.siblings or ()]
        _check_visibility(repository, is_private=bool(info.private), public=public)
        if not replace:
            _check_replaceable(api, repository, existing, info.sha, run, Path(scratch))
        stale = [name for name in existing if FILES.fullmatch(name) and name not in paths]
        message = message or f"Run {run.config.name}, {finished} tasks"
        revision = _commit(api, repository, paths, stale, message, info.sha)
        size = sum(path.stat().st_size for path in paths.values())
    return Pushed(f"{api.endpoint}/{repository}", revision, tuple(paths), size, not public)


def _commit(
    api: HfApi, repository: str, paths: dict[str, Path], stale: Sequence[str], message: str, parent: str | None
) -> str:
    """Add or replace files, delete the stale ones, and return the hash of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in paths.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    with _asking(repository):
        return str(api.create_commit(repository, operations, commit_message=message, parent_commit=parent).oid)


def _check_visibility(repository: str, *, is_private: bool, public: bool) -> None:
    if public and is_private:
        raise HubError(f"expected a public repository, but {repository} is private: make it public in its settings, or"
                       " leave --public out")  # fmt: skip
    if not public and not is_private:
        raise HubError(f"{repository} is public, so everybody would see this run: add --public, or name another"
                       " repository")  # fmt: skip


def _check_replaceable(
    api: HfApi, repository: str, existing: Sequence[str], revision: str | None, run: Run, scratch: Path
) -> None:
    """Raise unless a repository is empty or holds an earlier state of `run`."""
    files = [name for name in existing if name != ".gitattributes"]
    advice = "name another repository, or add --replace; its history keeps what is there"
    if CONFIG in files:
        with _asking(repository):
            path = api.hf_hub_download(repository, CONFIG, revision=revision, local_dir=scratch / "existing")
        with contextlib.suppress(RunError):
            if storage.read_sealed(Path(path)).get("run") == run.id:
                return
        raise HubError(f"{repository} holds another model, and nothing of it will be overwritten: {advice}")
    if files:
        raise HubError(f"{repository} holds files that pgp did not write, such as {_listed(files)}, and nothing of them"
                       f" will be overwritten: {advice}")  # fmt: skip


def pull(
    repository: str,
    folder: StrPath,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Download a run that `push` published to a new run folder.

    The folder is complete or absent. Its hub.json says which revision it is.

    Args:
        repository: Name of the repository, OWNER/NAME.
        folder: Run folder to write, new or empty.
        revision: Hash of a commit, branch or tag. If None, the newest commit of the main branch.
        token: Token of the hub. If None, that of `hf auth login` or of the environment variable HF_TOKEN.
        progress: Where to draw progress bars.

    Raises:
        HubError: If the hub refuses, or the repository holds no complete run of this version of pgp.
        RunError: If `folder` is not empty, or cannot be written.
        ValueError: If an argument has a wrong form.
    """
    check_repository(repository)
    folder = as_path(folder, "a run folder")
    require_replaceable(folder, "the run")
    return _download(_api(token), repository, revision, folder, progress)


def fetch(repository: str, *, revision: str | None = None, token: str | None = None) -> Run:
    """Return a run that `push` published, from the cache below `HF_HOME` if it was downloaded before.

    If `revision` is the hash of a commit in the cache, no network is needed.

    Raises:
        HubError, ValueError: As `pull`.
    """
    from huggingface_hub.constants import HF_HOME

    check_repository(repository)
    cache = Path(HF_HOME).expanduser() / "pgp" / repository.replace("/", "--")
    if revision and COMMIT.fullmatch(revision) and (cache / revision).is_dir():
        return Run.open(cache / revision)
    api = _api(token)
    commit = _describe(api, repository, revision).sha
    folder = cache / commit
    if not folder.is_dir():
        try:
            _download(api, repository, commit, folder, None)
        except RunError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
    return Run.open(folder)


def _download(api: HfApi, repository: str, revision: str | None, folder: Path, progress: Progress | None) -> Pulled:
    info = _describe(api, repository, revision)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = sorted(name for name in sizes if FILES.fullmatch(name))
    if f"checkpoints/{LATEST}" not in names:
        raise HubError(f"expected a run that pgp push wrote in {repository}, got {_listed(sizes) or 'no files'}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (needed := sum(sizes[name] for name in names)) > shutil.disk_usage(folder.parent).free:
            raise HubError(f"{repository} has {needed / 1e6:,.0f} MB, more than the disk of {folder} has free: make"
                           " room")  # fmt: skip
        with tempfile.TemporaryDirectory(prefix=".pgp-pull-", dir=folder.parent) as scratch:
            partial = Path(scratch) / "run"
            make_output(partial)
            with _asking(repository):
                for name in track(progress or no_progress(), names, len(names), "files"):
                    api.hf_hub_download(repository, name, revision=info.sha, local_dir=partial)
            storage.remove_folder(partial / ".cache")
            _check(partial, repository)
            storage.write(partial / SOURCE, json.dumps({"repository": repository, "revision": info.sha}, indent=2))
            platforms.move_folder(partial, folder)
    except OSError as error:
        raise storage.write_error("write", folder, error) from error
    return Pulled(Run.open(folder), info.sha)


def _describe(api: HfApi, repository: str, revision: str | None) -> Any:
    """Return what the hub says about a revision: its commit and its files, with their sizes."""
    with _asking(repository, revision):
        info = api.model_info(repository, revision=revision, files_metadata=True)
    if not COMMIT.fullmatch(info.sha or ""):
        raise HubError(f"expected the hash of a commit for {repository}, got {info.sha!r:.60}: try again")
    return info


def _check(folder: Path, repository: str) -> None:
    """Raise unless a downloaded folder is a complete run that names no files of another machine."""
    try:
        run = Run.open(folder)
        config, _ = run.config, run.data
        run.load(run.latest_finished())
        is_portable = portable(config) == config
    except (RunError, ValueError) as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, RunError):  # without advice, which is for runs of one's own
            cause = cause.__cause__
        reason = str(cause).replace(str(folder / "_")[:-1], "").replace(str(folder), repository)
        raise HubError(f"{repository} holds no run that this pgp can use: {reason}") from error
    if not is_portable:
        raise HubError(f"{repository} holds no run that pgp push wrote: its settings name files of a machine")


def check_repository(repository: str) -> None:
    """Raise a ValueError unless `repository` has the form OWNER/NAME."""
    if not isinstance(repository, str) or not REPOSITORY.fullmatch(repository):
        raise ValueError(f"expected a repository of the hub as OWNER/NAME, such as anna/flowers, got"
                         f" {repository!r:.80}")  # fmt: skip


def _api(token: str | None, *, writes: bool = False) -> HfApi:
    """Return a client of the hub; if it `writes`, raise a HubError if there is no token."""
    from huggingface_hub import HfApi, get_token

    if writes and not (token or get_token()):
        raise HubError("pushing needs a token of the hub that may write: run hf auth login, or set HF_TOKEN")
    return HfApi(token=token, library_name="prompt-gradient-projection", library_version=__version__)


@contextlib.contextmanager
def _asking(repository: str, revision: str | None = None) -> Iterator[None]:
    """Convert errors of the client inside a `with` block to a HubError that says what to do.

    Its own progress bars and warnings of retries are hidden.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        with hub_quiet():
            yield
    except errors.GatedRepoError as error:
        raise HubError(f"{repository} is open only to those who accept its conditions: do so on its page") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision}: expected the hash of a commit, a branch or a"
                       " tag") from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"no repository {repository} that you may see: check its name; a private one needs a token of"
                       " an account that may see it, by hf auth login or HF_TOKEN") from error  # fmt: skip
    except errors.OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE forbids to ask the hub: unset it, or name a revision that was downloaded"
                       " before, by the hash of its commit") from error  # fmt: skip
    except errors.HfHubHTTPError as error:
        raise HubError(_refusal(repository, error)) from error
    except OSError as error:
        if error.filename:  # the disk, not the network
            raise
        raise _unreachable(error) from error
    except Exception as error:  # the client raises errors of several libraries, for networks and for wrong answers
        raise _unreachable(error) from error
    finally:
        if shown:
            enable_progress_bars()


_REFUSALS = {
    401: "the token is not valid: run hf auth login, or set HF_TOKEN",
    403: "the token may not do this: it needs the role write, and the account must be a member of OWNER",
    409: "somebody else changes it at the same time: try again",
    412: "somebody else changed it at the same time: try again",
    429: "too many requests: try again later",
}


def _refusal(repository: str, error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    reason = _REFUSALS.get(status or 0) or f"{_first_line(error)}: try again later"
    return f"the hub refuses what was asked of {repository} (status {status}): {reason}"


def _unreachable(error: Exception) -> HubError:
    from huggingface_hub.constants import ENDPOINT

    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return HubError(f"no usable answer from the hub at {ENDPOINT} ({type(cause).__name__}: {_first_line(cause)}): check"
                    " the network, and try again")  # fmt: skip


def _first_line(error: Exception) -> str:
    return f"{str(error).strip().partition(chr(10))[0]:.200}" or type(error).__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])
