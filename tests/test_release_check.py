"""The check of a release stops at what is wrong. Whole it takes minutes: `make release-check`."""

import sys
import tarfile

import pytest
from compilers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import release_check


def test_a_command_that_fails_ends_it_with_what_it_said():
    with pytest.raises(SystemExit, match="(?s)so it is.*failed: .*python"):
        release_check.run(sys.executable, "-c", "import sys; print('so it is'); sys.exit(3)")


def test_a_command_sees_the_environment_that_is_given():
    said = release_check.run(sys.executable, "-c", "import os; print(os.environ['A'])", A="b")
    assert said == "b\n"


def test_the_version_is_that_of_the_change_log(tmp_path, monkeypatch):
    assert release_check.release()
    (tmp_path / "reap").mkdir()
    (tmp_path / "reap/versions.py").write_text('OWN = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.2\n")
    monkeypatch.setattr(release_check, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"says 1\.2\.3, the top of CHANGELOG\.md 1\.2\.2"):
        release_check.release()


def test_an_sdist_that_is_too_large(tmp_path, monkeypatch):
    def build(*_: object) -> str:
        with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as archive:
            archive.add(ROOT / "LICENSE", "made/LICENSE")
        return ""

    monkeypatch.setattr(release_check, "run", build)
    archive, source = release_check.sdist(tmp_path)
    assert archive.name == "made.tar.gz" and (source / "LICENSE").exists()
    monkeypatch.setattr(release_check, "MOST_BYTES", 100)
    with pytest.raises(SystemExit, match="more than 100"):
        release_check.sdist(tmp_path)


def test_without_a_cross_compiler_aarch64_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release_check.for_aarch64(tmp_path, tmp_path, tmp_path) is None
    assert "aarch64 is left out: it needs aarch64-linux-gnu-g++" in capsys.readouterr().out


@pytest.mark.parametrize("reason, expected", [("no nvcc", None), ("no nvcc", "no driver"),
                                              (None, "no nvcc")])  # fmt: skip
def test_a_backend_that_is_not_as_expected(reason, expected, tmp_path, monkeypatch):
    about = release_check.json.dumps({"backends": {"cuda": reason}})
    monkeypatch.setattr(release_check, "run", lambda *_, **__: about)
    with pytest.raises(SystemExit, match="backend cuda: .*, not as expected"):
        release_check.try_out(tmp_path / "a.whl", tmp_path, {"cuda": expected})
