"""Files and folders that appear whole or not at all."""

import pytest

from transdiff_pipelines.files import new_file, new_folder, refuse_existing


class TestNewFile:
    def test_appears_at_the_end_with_its_folder(self, tmp_path):
        path = tmp_path / "made" / "result.json"
        with new_file(path) as temporary:
            temporary.write_text("whole")
            assert not path.exists()
        assert [file.name for file in path.parent.iterdir()] == ["result.json"]
        assert path.read_text() == "whole"

    def test_a_failed_write_leaves_the_old_file_alone(self, tmp_path):
        path = tmp_path / "result.json"
        path.write_text("old")

        def write_half():
            with new_file(path) as temporary:
                temporary.write_text("half")
                raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_half()
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"


class TestNewFolder:
    def test_appears_at_the_end_with_the_rights_of_any_folder(self, tmp_path):
        path = tmp_path / "made" / "model"
        with new_folder(path) as folder:
            (folder / "weights").touch()
            assert not path.exists()
        assert [file.name for file in path.parent.iterdir()] == ["model"]
        assert [file.name for file in path.iterdir()] == ["weights"]
        (tmp_path / "usual").mkdir()
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_failed_one_leaves_nothing(self, tmp_path):
        def write_half():
            with new_folder(tmp_path / "model") as folder:
                (folder / "half").touch()
                raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_half()
        assert list(tmp_path.iterdir()) == []

    def test_takes_an_empty_folder_and_refuses_anything_else(self, tmp_path):
        path = tmp_path / "model"
        path.mkdir()
        with new_folder(path) as folder:
            (folder / "weights").touch()
        for taken in (path, path / "weights"):
            with pytest.raises(FileExistsError, match="exists; remove it, or name another output folder"):
                refuse_existing(taken)
            with pytest.raises(FileExistsError), new_folder(taken):
                pytest.fail("the block must not run")
        assert [file.name for file in path.iterdir()] == ["weights"]
