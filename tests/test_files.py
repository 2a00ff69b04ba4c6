"""Files and folders that appear whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from transdiff_pipelines.files import (
    check_folder_writable,
    home_path,
    new_file,
    new_files,
    new_folder,
    pipeline_folder,
    refuse_existing,
    why_no_pipeline,
)


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


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.usefixtures("umask")
class TestPermissions:
    """safetensors makes its files for their owner alone; here they are as any other."""

    @pytest.mark.parametrize("new", ["file", "folder", "files"])
    def test_are_those_of_any_new_file(self, tmp_path, new):
        def save(path):
            path.parent.mkdir(exist_ok=True)
            save_file({"weight": torch.ones(2)}, path)
            assert path.stat().st_mode & 0o777 == 0o600  # if this fails, safetensors has changed, and none is needed

        path = tmp_path / "model" / "part" / "weights"
        if new == "file":
            with new_file(path) as temporary:
                save(temporary)
        else:
            with {"folder": new_folder, "files": new_files}[new](tmp_path / "model") as folder:
                save(folder / "part" / "weights")
        assert path.stat().st_mode & 0o777 == 0o640
        assert path.parent.stat().st_mode & 0o777 == 0o750
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["model", "part", "weights"]


class TestCheckFolderWritable:
    @pytest.mark.parametrize("place", ["there", "not/yet/there"])
    def test_leaves_nothing_behind(self, tmp_path, place):
        (tmp_path / "there").mkdir()
        check_folder_writable(tmp_path / place)
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]

    def test_says_what_is_wrong(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="output .*file is a file; name a folder"):
            check_folder_writable(tmp_path / "file")
        with pytest.raises(OSError, match="output .*inside cannot be written: .*; name another place"):
            check_folder_writable(tmp_path / "file" / "inside")

    def test_a_new_folder_is_tried_before_the_work(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="output .*model cannot be written"):
            refuse_existing(tmp_path / "file" / "model")


class TestPipelineFolder:
    """Folders of pipelines and of runs, as a user may name them."""

    def make(self, *files):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def test_a_run_stands_for_its_pipeline(self, tmp_path):
        self.make(tmp_path / "run" / "pipeline" / "model_index.json")
        for name in ("run", "run/pipeline"):
            assert pipeline_folder(tmp_path / name) == tmp_path / "run" / "pipeline"
        assert pipeline_folder("owner/name").as_posix() == "owner/name"

    def test_what_else_a_folder_may_be_is_said(self, tmp_path):
        self.make(tmp_path / "lora-run" / "lora" / "pytorch_lora_weights.safetensors")
        self.make(tmp_path / "pipe" / "model_index.json", tmp_path / "pipe" / "vae" / "config.json")
        newest = tmp_path / "unfinished" / "checkpoints" / "step-00000020" / "pipeline"
        self.make(newest / "model_index.json", newest.parents[1] / "step-00000010" / "pipeline" / "model_index.json")
        assert f"load_lora_weights({str(tmp_path / 'lora-run' / 'lora')!r})" in why_no_pipeline(tmp_path / "lora-run")
        assert f"load_lora_weights({str(tmp_path / 'lora-run' / 'lora')!r})" in why_no_pipeline(
            tmp_path / "lora-run" / "lora"
        )
        assert why_no_pipeline(tmp_path / "pipe" / "vae").endswith(f"name the whole of it, {tmp_path / 'pipe'}")
        assert str(newest) in why_no_pipeline(tmp_path / "unfinished")
        assert str(newest) in why_no_pipeline(tmp_path / "unfinished" / "checkpoints")
        assert "without model_index.json" in why_no_pipeline(tmp_path)


def test_home_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    assert home_path("~/model") == tmp_path / "model"
