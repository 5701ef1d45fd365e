"""Where the common tests come from, and that the documentation lists the skipped ones."""

import io
import tarfile
from pathlib import Path

import pytest
import transformers
from common import loading, skips

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


@pytest.fixture(scope="module")
def source():
    try:
        return loading.fetch()
    except loading.CommonTestsUnavailable as error:
        pytest.skip(f"the common tests of Transformers are left out: {error}")


def test_source_is_that_of_the_installed_version(source):
    assert source.parent.name == transformers.__version__
    for name in ("test_modeling_common", "test_configuration_common", "test_processing_common", "test_pipeline_mixin"):
        assert (source / f"{name}.py").is_file()


def archive(path: Path, version: str, members: dict[str, str]) -> Path:
    """A source distribution whose metadata says `version`."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {"PKG-INFO": f"Metadata-Version: 2.1\nName: x\nVersion: {version}\n", **members}.items():
            member = tarfile.TarInfo(f"transformers-{version}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_only_test_modules_are_extracted(tmp_path):
    members = {
        "tests/test_modeling_common.py": "1",
        "tests/test_x.py": "2",
        "tests/deep/test_y.py": "3",
        "tests/../test_z.py": "4",
        "setup.py": "5",
    }
    loading.extract(archive(tmp_path / "a.tar.gz", "1.2.3", members), "1.2.3", tmp_path / "out")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    assert written == {"out/test_modeling_common.py", "out/test_x.py"}


def test_another_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is of 1\.2\.4, but Transformers 1\.2\.3 is installed"):
        loading.extract(archive(tmp_path / "a.tar.gz", "1.2.4", {}), "1.2.3", tmp_path / "out")


def test_without_network_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "CACHE", tmp_path / "cache")
    for name, value in (("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(loading.CommonTestsUnavailable, match="pip could not download the source of transformers=="):
        loading.fetch()
    assert not list((tmp_path / "cache").iterdir())


def test_documentation_lists_the_skipped_tests():
    assert skips.as_markdown() in DOCUMENTATION.read_text(), (
        "docs/testing.md does not hold the table that `python tests/common/skips.py` prints"
    )
