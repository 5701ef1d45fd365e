"""Fetches the test classes that Transformers runs on its own models, and imports them under a name of their own.

They come in Transformers' source distribution, of exactly the installed version; nothing of them is kept in this
project. The archive holds only the top level of Transformers' `tests` folder. What its modules import beyond that is in
`stand_ins`, in a short form of our own.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from unittest.mock import patch

import transformers

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
# Not `tests`: that is this project's own folder.
PACKAGE = "transformers_tests"
DOWNLOAD_SECONDS = 600


class CommonTestsUnavailable(Exception):
    """The source distribution is neither cached nor to be had; the message says why."""


# Folders that could not be filled: one attempt a session, so that all of it sees the same.
_failed: dict[Path, CommonTestsUnavailable] = {}


def fetch() -> Path:
    """The folder with the top-level test modules of the installed Transformers, downloaded by pip the first time.

    Raises:
        CommonTestsUnavailable: No copy is cached and pip finds none.
        ValueError: The archive is of another version than the installed Transformers.
    """
    version = transformers.__version__
    folder = CACHE / version / "tests"
    if folder in _failed:
        raise _failed[folder]
    if not folder.is_dir():
        try:
            _fill(folder, version)
        except CommonTestsUnavailable as error:
            _failed[folder] = error
            raise
    return folder


def _fill(folder: Path, version: str):
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as workspace:
        archive = _download(version, Path(workspace))
        extracted = Path(workspace) / "extracted"
        extract(archive, version, extracted)
        folder.parent.mkdir(exist_ok=True)
        try:
            # In one step, so that an interrupted run leaves nothing half done.
            os.replace(extracted, folder)
        except OSError:
            # Another process was faster.
            if not folder.is_dir():
                raise


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, f"transformers=={version}"], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CommonTestsUnavailable(f"pip gave no transformers=={version} within {DOWNLOAD_SECONDS} s") from None
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
        raise CommonTestsUnavailable(f"pip could not download the source of transformers=={version}: {reason}")
    return archives[0]


def extract(archive: Path, version: str, folder: Path):
    """Writes the archive's top-level test modules, and nothing else, into the new `folder`.

    Raises:
        CommonTestsUnavailable: The archive holds no common tests.
        ValueError: The archive is of another version than `version`.
    """
    root = f"transformers-{version}"
    folder.mkdir()
    with tarfile.open(archive) as tar:
        found = _archived_version(tar)
        if found != version:
            raise ValueError(f"{archive.name} is of {found}, but Transformers {version} is installed")
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.parent == PurePosixPath(root, "tests") and path.suffix == ".py":
                with tar.extractfile(member) as source, open(folder / path.name, "wb") as target:
                    shutil.copyfileobj(source, target)
    if not (folder / "test_modeling_common.py").is_file():
        raise CommonTestsUnavailable(f"{archive.name} holds no common test classes")


def _archived_version(tar: tarfile.TarFile) -> str | None:
    """The version in the metadata at the top of a source distribution."""
    for member in tar:
        if member.isfile() and member.name.count("/") == 1 and member.name.endswith("/PKG-INFO"):
            for line in tar.extractfile(member).read().decode().splitlines():
                if line.startswith("Version:"):
                    return line.removeprefix("Version:").strip()
    return None


def load(name: str) -> ModuleType:
    """Imports one of the test modules, such as `test_modeling_common`.

    Raises:
        CommonTestsUnavailable: See [`fetch`].
    """
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(fetch()), str(STAND_INS)]
        sys.modules[PACKAGE] = package
    with _surroundings():
        return importlib.import_module(f"{PACKAGE}.{name}")


@contextmanager
def _surroundings() -> Iterator[None]:
    """What the modules expect around them while they are imported: Transformers' own repository."""
    environment = {"TRANSFORMERS_TINY_MODEL_PATH": str(STAND_INS / "tiny_models")}
    with (
        patch.object(sys, "path", [*sys.path, str(STAND_INS / "top_level")]),
        patch.dict(os.environ, environment),
        patch.object(transformers.utils, "direct_transformers_import", lambda *args, **kwargs: transformers),
    ):
        yield
