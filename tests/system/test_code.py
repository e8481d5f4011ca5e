"""The digest of the code that workers compare."""

import shutil
from pathlib import Path

import pytest

from tfdp.system import code


def test_the_digest_of_the_code_covers_the_files_of_all_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, recipes = tmp_path / "tfdp", tmp_path / "recipes"
    shutil.copytree(Path(code.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "__file__", str(package / "system" / "code.py"))
    recipes.mkdir()
    (recipes / "mine.py").write_text("a = 1\n")
    found = [code.code_sha256(recipes)]
    for path, text in (
        (package / "tasks" / "causal_lm.py", "a = 1\n"),
        (package / "ops" / "new.py", "a = 1\n"),
        (package / "train.py", "a = 1\n"),
        (recipes / "mine.py", "a = 2\n"),
    ):
        path.write_text(text)
        found.append(code.code_sha256(recipes))
    (package / "ops" / "new.py").rename(package / "tasks" / "new.py")
    found.append(code.code_sha256(recipes))
    assert len(set(found)) == len(found)
    alone = recipes / "mine.py"
    found.append(code.code_sha256(alone))
    alone.write_text("a = 3\n")
    assert code.code_sha256(alone) != found.pop()
    alone.write_text("a = 2\n")
    (package / "notes.txt").write_text("not code")
    assert code.code_sha256(recipes) == found[-1]


def test_the_code_of_a_model_is_its_package_or_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package" / "inner").mkdir(parents=True)
    for name in ("a_package/__init__.py", "a_package/inner/__init__.py", "a_file.py"):
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert code.place_of("a_package.inner") == tmp_path / "a_package"
    assert code.place_of("a_file") == tmp_path / "a_file.py"
    assert code.place_of("nowhere") is code.place_of("__main__") is code.place_of("") is None
