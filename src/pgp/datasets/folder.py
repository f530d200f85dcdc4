"""Your own images: a folder per class, and perhaps one per domain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pgp.datasets import Dataset, DatasetConfig, existing
from pgp.datasets.files import FileSplit
from pgp.datasets.parts import check_share

TEST_FOLDERS = ("test", "val", "validation")
"""What the folder of the test images may be called; the first that is there."""
PARTS = {*TEST_FOLDERS, "training", "testing", "valid"}
"""Names that a class is not likely to have."""


@dataclass(frozen=True)
class Folder(DatasetConfig):
    """Images in `root/train/<class>/*` and `root/test/<class>/*` (or `val`, or `validation`), read in place; or in
    `root/<class>/*`, some of each for the test.

    With domains the folders of a class lie in those of their domain: `root/train/<domain>/<class>/*` and
    `root/test/<domain>/<class>/*`, or `root/<domain>/<class>/*`.
    A class is called by its folder, or as `root/names.txt` says, where it exists: lines of a folder and its name.
    """

    root: Path = Path("data")
    """Folder that holds `train` and `test`, or a folder per class."""
    test_share: float = 0.2
    """Share of each class that is kept for the test where there is no folder `test`; one image at least."""
    split_seed: int = 0
    """Decides which images these are."""
    domains: bool = False
    """Whether the folders of classes lie in folders of domains; --setting dil turns it on."""

    def __post_init__(self) -> None:
        check_share(self.test_share)

    @property
    def places(self) -> tuple[Path, ...]:
        """See `DatasetConfig.places`."""
        return (self.root,)

    def build(self) -> Dataset:
        """Classes and domains are the folders of `train`, or of `root`, in alphabetical order."""
        root = existing(self.root)
        train = root / "train" if (root / "train").is_dir() else root
        test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if train == root and (beside := [name for name in _folders(root) if name.lower() in PARTS]):
            raise ValueError(f"no data folder at {root / 'train'}, beside {beside}: call the parts train and test, or"
                             " leave only folders of classes")  # fmt: skip
        names, domains = self._levels(train)
        whole = FileSplit.of(train, names, domains)
        if train != root and test:
            for kind, own, all_ in zip(("class", "domain"), self._levels(test), (names, domains), strict=True):
                if strangers := [name for name in own if name not in all_]:
                    raise ValueError(f"expected every {kind} of {test} in {train} too, got {strangers[:5]} in"
                                     f" {test.name} only")  # fmt: skip
            parts = whole, FileSplit.of(test, names, domains)
        else:
            parts = whole.parted(self.test_share, self.split_seed)
        return Dataset(*parts, _spoken(root / "names.txt", names), domains=domains, folder=root)

    def by_domain(self) -> Folder:
        """The same with folders of domains."""
        return replace(self, domains=True)

    def _levels(self, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the classes below `folder`, and of the domains, if it has any."""
        if not self.domains:
            return _folders(folder), ()
        domains = _folders(folder)
        classes = tuple(sorted({name for domain in domains for name in _folders(folder / domain)}))
        if not classes or set(classes) <= {"train", "test"}:
            raise ValueError(f"expected folders DOMAIN/CLASS in {folder}, got folders {list(domains[:5])} with"
                             f" {list(classes) or 'none'} inside; put train and test above the domains")  # fmt: skip
        return classes, domains


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _spoken(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """What the classes of `folders` are called."""
    if not path.is_file():
        return folders
    names = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path} as a text in UTF-8: {error}") from error
    for line in lines:
        fitting = [folder for folder in folders if line.strip().startswith((f"{folder} ", f"{folder}\t"))]
        if fitting:
            folder = max(fitting, key=len)
            names[folder] = line.strip().removeprefix(folder).strip()
    if without := [folder for folder in folders if folder not in names]:
        raise ValueError(f"expected a line 'FOLDER NAME' in {path} for each folder, got none for {without[:5]}")
    spoken = tuple(names[folder] for folder in folders)
    if twice := sorted({name for name in spoken if spoken.count(name) > 1}):
        raise ValueError(f"expected a name of its own for each folder in {path}, got {twice[:5]} more than once")
    return spoken
