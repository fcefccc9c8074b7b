"""Downloads: into a temporary folder, then the check of every file's digest, then the move to its place.

Nothing is made in the data folder before every file has arrived and is right, so a mistyped folder is never created.
MNIST comes through torchvision, the Penn Treebank characters as members of an archive.
"""

import gzip
import hashlib
import os
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch

from common.errors import UserError

# In bytes. The archive has 34 million, its largest wanted member 10 million; an archive beyond these limits is refused.
ARCHIVE_LIMIT, UNPACKED_LIMIT, MEMBER_LIMIT = 1 << 28, 1 << 29, 1 << 26
FAILURES = (ImportError, OSError, RuntimeError, ValueError, LookupError, EOFError, tarfile.TarError, zlib.error,
            HTTPException)


def fetch(target: Path, digests: dict[str, str], url: str, get: Callable[[Path], Path], found: str = "") -> None:
    """Fetch the files that `digests` names (name → sha256) into the folder `target`.

    `get` downloads them into the temporary folder that it is given and returns the folder where they lie. `found`
    says what else lies in the data folder. Raises UserError when a file does not arrive, has another digest, or
    cannot be put into its place.
    """
    names = ", ".join(digests)
    print(f"{names} not found in {target}{found}; downloading", flush=True)
    try:
        temporary = tempfile.TemporaryDirectory(dir=_existing_folder(target), prefix=".download-")  # on target's disk
    except OSError as error:
        raise _unwritable(names, target, error) from None
    with temporary:
        try:
            place = get(Path(temporary.name))
            arrived = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in digests}
        except FAILURES as error:
            raise missing_files(digests, target, url, found, error) from None
        for name, digest in digests.items():
            if arrived[name] != digest:
                raise UserError(f"{name} from {url} has a wrong sha256, so it was thrown away; "
                                f"fetch it by hand and put it into {target}", 1)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name in digests:
                os.replace(place / name, target / name)
        except OSError as error:
            raise _unwritable(names, target, error) from None


def missing_files(names, target: Path, url: str, found: str = "", error: Exception | None = None) -> UserError:
    """The sentence for files that are not there, with the reason why they could not be fetched."""
    reason = ""
    if error is not None:
        reason = f" The download failed ({(str(error).splitlines() or [type(error).__name__])[0][:80]})."
    return UserError(f"{', '.join(names)} not found in {target}{found}.{reason} Get the files from {url} and put them "
                     "there, or name the folder that holds them with --data", 1)


def _unwritable(names: str, target: Path, error: OSError) -> UserError:
    return UserError(f"{names} not found in {target}, and nothing can be written there ({error.strerror}); "
                     "name another folder with --data", 1)


def _existing_folder(target: Path) -> Path:
    """`target` or the nearest path above it that exists. Raises OSError for a path that the system cannot have."""
    place = target.absolute()
    while True:
        try:
            os.stat(place)
            return place
        except FileNotFoundError:
            place = place.parent


# ── MNIST ────────────────────────────────────────────────────────────────────────────────────────────────


def get_mnist(folder: Path) -> Path:
    """Download MNIST's four files through torchvision, which unpacks them."""
    import_torchvision_datasets().MNIST(folder, train=True, download=True)
    return folder / "MNIST" / "raw"


def import_torchvision_datasets():
    """torchvision.datasets, also where torchvision was built for another torch than the one installed.

    Its wheel for Linux expects a torch with CUDA; beside a CPU-only one its import stops because the operators
    `nms` and `qnms`, which no data set needs, were never declared. Declaring their schemas lets it go on.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import datasets
    return datasets


# ── members of an archive ────────────────────────────────────────────────────────────────────────────────


def get_members(folder: Path, url: str, members: dict[str, str]) -> Path:
    """Download a .tgz and write its members {file's name: member's name} into `folder`. Nothing else is unpacked."""
    archive = folder / "archive.tgz"
    with urllib.request.urlopen(url, timeout=60) as response, open(archive, "wb") as file:
        while block := response.read(1 << 20):
            if file.tell() > ARCHIVE_LIMIT:
                raise ValueError(f"the archive is larger than {ARCHIVE_LIMIT:,} bytes")
            file.write(block)
    for name, content in zip(members, _contents(archive, list(members.values())), strict=True):
        (folder / name).write_bytes(content)
    return folder


class _Bounded:
    """A file that is read from front to back and refuses to yield more than `limit` bytes, whatever it claims."""

    def __init__(self, file, limit: int):
        self.file, self.left = file, limit

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise ValueError("the archive holds more than it should")
        return block


def _contents(archive: Path, names: list[str]) -> list[bytes]:
    """The contents of regular files of a .tgz. Raises LookupError where one is not there or is too large."""
    found = {}
    with gzip.open(archive) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, UNPACKED_LIMIT), mode="r|") as tar:
        for member in tar:
            if member.size > UNPACKED_LIMIT:  # skipping it would take as long as its claimed size
                raise ValueError(f"{member.name[:40]} in the archive claims to have {member.size:,} bytes")
            name = member.name.removeprefix("./")
            if name in names and member.isfile() and member.size <= MEMBER_LIMIT:
                found[name] = tar.extractfile(member).read()
            if len(found) == len(names):
                break
    for name in names:
        if name not in found:
            raise LookupError(f"no {name} in the archive")
    return [found[name] for name in names]
