"""Data files that are missing: into a temporary folder, then the check of every file's digest, then to their place.

Nothing is made in the data folder before every file has arrived and is right, so a mistyped folder is never created.
MNIST comes through torchvision, the Penn Treebank characters as members of an archive.
"""

import hashlib
import io
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from common.errors import UserError

LONGEST = 600                                    # seconds of a download
OUR_NAMES = {"MNIST", "pennchar", "README.md"}   # in a data folder


def provide(folder: Path, home: str, digests: dict[str, str], url: str, get: Callable[[Path], Path]) -> Path:
    """→ the folder `home` of the data folder `folder`, with the files that `digests` names (name → sha256).

    Where the data folder holds nothing else, missing files are fetched: `get` downloads them into a temporary folder
    and returns the place where they lie. Raises UserError where files are still missing.
    """
    target, why = folder / home, ""
    missing = [name for name in digests if not (os.path.exists(target / name) or os.path.exists(target / f"{name}.gz"))]
    if not missing:
        return target
    sentence = f"{', '.join(missing)} not found in {target}"
    places = {folder: OUR_NAMES, target.parent: {*OUR_NAMES, target.name}, target: ()}
    others = [name for place, known in places.items() if os.path.isdir(place) for name in sorted(os.listdir(place))
              if name not in known and not name.startswith(".")]
    if others:
        why = f", and nothing is downloaded into a folder that holds {', '.join(others[:3])}"
    else:
        print(f"{sentence}; downloading", flush=True)
        try:
            _fetch(target, digests, get)
            return target
        except Exception as error:
            why = f". The download failed ({' '.join(str(error).split())[:200] or type(error).__name__})"
    raise UserError(f"{sentence}{why}. Get the files from {url} and put them there, or name the folder that holds "
                    f"{home} with --data", 1)


def _fetch(target: Path, digests: dict[str, str], get: Callable[[Path], Path]) -> None:
    """Raises TimeoutError after `LONGEST` seconds, and whatever networks, archives and disks raise."""
    place = next(path for path in (target, *target.parents) if os.path.lexists(path))
    with tempfile.TemporaryDirectory(dir=place, prefix=".download-", ignore_cleanup_errors=True) as temporary:
        pool = ThreadPool(1)  # of a daemon thread, which Python does not wait for: a server may send a byte a second
        call = pool.apply_async(get, (Path(temporary),))
        pool.close()          # else Python complains of an open pool where it ends before the call
        found = call.get(LONGEST)
        for name, digest in digests.items():
            if hashlib.sha256((found / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} has a wrong sha256")
        target.mkdir(parents=True, exist_ok=True)
        for name in digests:
            os.replace(found / name, target / name)


def get_mnist(folder: Path) -> Path:
    """Download MNIST's four files through torchvision, which unpacks them."""
    try:
        from torchvision import datasets
    except RuntimeError:  # beside a CPU-only torch its wheel misses two operators, which no data set needs
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import datasets
    datasets.MNIST(folder, train=True, download=True)
    return folder / "MNIST" / "raw"


def get_members(folder: Path, url: str, prefix: str, names) -> Path:
    """Download a .tgz and write its members `prefix` + name into `folder` as `names`. Nothing else is unpacked."""
    with urllib.request.urlopen(url, timeout=60) as response:
        archive = io.BytesIO(response.read())
    with tarfile.open(fileobj=archive) as tar:
        found = {member.name.removeprefix("./"): member for member in tar if member.isfile()}
        for name in names:
            (folder / name).write_bytes(tar.extractfile(found[prefix + name]).read())
    return folder
