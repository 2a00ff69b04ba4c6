"""What a scan of an image folder takes, what it passes over without a word, and what it tells of."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from training.cache_latents import cache_latents, report
from training.data.decoding import IMAGE_SUFFIXES
from training.data.errors import DataError
from training.data.folders import FolderSource
from training.evaluation import references
from training.settings.config import ConfigError, DataConfig


def draw(path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        draw(tmp_path / "my images" / name)
    return tmp_path / "my images"


def found(folder: Path, classes: list[str] | None = None) -> list[str]:
    return [example.name for example in FolderSource(folder, classes).examples(0)]


PLAIN = ["cat/1.png", "cat/2.png", "dog/1.png"]


@pytest.mark.parametrize(
    "name",
    [
        "__MACOSX/._1.png",
        "__MACOSX/cat/1.png",
        ".git/1.png",
        ".ipynb_checkpoints/1.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "cat/._1.png",
        "cat/.DS_Store",
        "cat/@eaDir/1.png",
        "@eaDir/1.png",
        "dog/__MACOSX/1.png",
        "#recycle/1.png",
        "$RECYCLE.BIN/1.png",
        "System Volume Information/1.png",
        "lost+found/1.png",
        "cat/Thumbs.db",
        "cat/desktop.ini",
        "cat/sub/.hidden/1.png",
        "Thumbs.db",
        ".DS_Store",
    ],
)
def test_what_systems_leave_behind_is_no_class_and_no_image(folder: Path, name: str) -> None:
    before = FolderSource(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"no image")
    source = FolderSource(folder)
    assert (source.classes, found(folder), source.notes) == (["cat", "dog"], PLAIN, [])
    assert (source.digest, source.stamp()) == (before.digest, before.stamp())


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".Jpeg", ".PNG", ".webp", ".bmp", ".dib", ".tga", ".jp2"])
def test_suffixes_are_those_that_pillow_opens_in_any_case(folder: Path, suffix: str) -> None:
    if suffix.lower() not in IMAGE_SUFFIXES:
        pytest.skip("not in this Pillow")
    draw(folder / "dog" / f"2{suffix}")
    assert found(folder) == [*PLAIN, f"dog/2{suffix}"]


def test_every_suffix_that_is_written_and_opened_is_found_and_programs_are_not_run() -> None:
    assert {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
            ".pnm", ".tga", ".ico", ".psd", ".dds", ".sgi", ".apng"} <= IMAGE_SUFFIXES  # fmt: skip
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".grib", ".txt", ""} & IMAGE_SUFFIXES


def test_files_of_other_kinds_are_counted(folder: Path) -> None:
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/readme.txt", "dog/labels", "dog/deep/x.zip"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    (line,) = FolderSource(folder).notes
    assert "passed over 5 file(s) of kinds that Pillow does not open as images: 2 .heic" in line
    assert all(kind in line for kind in ("1 .txt", "1 without suffix", "1 .zip"))


def test_images_beside_the_class_folders_are_told_of(folder: Path, tmp_path: Path) -> None:
    draw(folder / "loose.png")
    assert FolderSource(folder).notes == [f"{folder}: left out 1 image(s) beside the class folders, in none of them"]
    draw(tmp_path / "flat" / "1.png")
    with pytest.raises(DataError, match=r"no class folders; put images .*There are 1 image\(s\) beside"):
        FolderSource(tmp_path / "flat")


def test_class_folders_that_are_not_chosen_are_told_of(folder: Path) -> None:
    assert FolderSource(folder, ["dog"]).notes == ["left out, since data.classes does not name them: cat"]
    with pytest.raises(ConfigError, match=r"names Cat \(did you mean cat\?\), .*it has cat, dog"):
        FolderSource(folder, ["Cat", "dog"])


def test_an_empty_class_folder_is_an_error_that_tells_what_is_in_it(folder: Path) -> None:
    (folder / "emu").mkdir()
    with pytest.raises(DataError, match="class folders without images: emu"):
        FolderSource(folder)
    (folder / "emu" / "1.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"without images: emu; .*1 file\(s\) of kinds that .*1 .heic"):
        FolderSource(folder)


def test_a_file_in_place_of_a_folder_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="is a file, not a folder"):
        FolderSource(folder / "cat" / "1.png")


def test_a_reference_folder_is_read_alike(folder: Path) -> None:
    for name in ("__MACOSX/cat/._1.png", "cat/._2.png", ".ipynb_checkpoints/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    draw(folder / "dog" / "2.jfif")
    assert references._open(str(folder), 16)[2] == 4


# --- splits ---


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["train", "val"], "train"),
        (["Test", "Train"], "Train"),
        (["train"], "train"),
        (["training", "x", "dev"], "training"),
    ],
)
def test_folders_of_splits_are_told_from_classes(folder: Path, tmp_path: Path, names: list[str], hint: str) -> None:
    for name in names:
        shutil.copytree(folder, tmp_path / "my set" / name)
    root = tmp_path / "my set"
    with pytest.raises(DataError, match="looks like a data set in splits") as error:
        FolderSource(root)
    assert f"--data.images='{root}/{hint}'. If these are classes" in str(error.value)
    assert FolderSource(root / hint).classes == ["cat", "dog"]
    assert FolderSource(root, names).classes == names


def test_one_class_may_be_called_train(folder: Path) -> None:
    draw(folder / "train" / "1.png")
    assert FolderSource(folder).classes == ["cat", "dog", "train"]


def test_a_folder_around_the_classes_is_told_of(folder: Path) -> None:
    (line,) = FolderSource(folder.parent).notes
    assert "there is one class, my images, with folders in it (cat, dog)" in line
    assert line.endswith(f"--data.images='{folder}'")
    draw(folder.parent / "other" / "1.png")
    assert FolderSource(folder.parent).notes == []


# --- links ---


def test_links_to_folders_are_followed_once_and_never_in_circles(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "deep" / "3.png")
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "deep")  # found once
    (folder / "cat" / "circle").symlink_to(folder / "cat")
    (folder / "cat" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "cat")
    (folder / "all").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    source = FolderSource(folder)
    assert source.classes == ["cat", "dog"]
    names = [example.name for example in source.examples(0)]
    assert [name for name in names if "3.png" not in name] == PLAIN
    assert len(names) == 4


def test_a_class_may_be_a_link_and_share_images_with_another(folder: Path, tmp_path: Path) -> None:
    (folder / "feline").symlink_to("cat")
    assert found(folder) == [*PLAIN, "feline/1.png", "feline/2.png"]
    (tmp_path / "link").symlink_to(folder)
    assert FolderSource(tmp_path / "link").digest == FolderSource(folder).digest


def test_links_that_lead_nowhere_are_images_that_cannot_be_read(folder: Path, vae: Path, tmp_path: Path) -> None:
    (folder / "cat" / "3.png").symlink_to("gone.png")
    (folder / "cat" / "4.png").symlink_to("4.png")
    data = DataConfig(vae=str(vae), images=str(folder), cache=str(tmp_path / "cache"), image_size=16)
    cache = cache_latents(data)
    assert len(cache) == 3
    assert "  cat/3.png: FileNotFoundError: No such file" in report(cache)
    assert "  cat/4.png: OSError: " in report(cache)


def test_only_files_are_opened(folder: Path) -> None:
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "folder.png").mkdir()
    assert found(folder) == PLAIN


# --- names ---


@pytest.fixture
def broken_name(folder: Path) -> Path:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        draw(folder / "cat" / "3.png")
        (folder / "cat" / "3.png").rename(folder / "cat" / name)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    return folder / "cat" / name


def test_a_name_that_is_not_utf8_is_no_trouble(broken_name: Path, folder: Path, vae: Path, tmp_path: Path) -> None:
    data = DataConfig(vae=str(vae), images=str(folder), cache=str(tmp_path / "cache"), image_size=16)
    assert len(cache_latents(data)) == 4
    broken_name.write_bytes(b"broken")
    with pytest.raises(DataError):
        cache_latents(data)
    again = cache_latents(dataclasses.replace(data, cache=str(tmp_path / "again")))
    assert "  cat/caf\\xe9.png: UnidentifiedImageError" in report(again)
    print(report(again).encode(sys.stdout.encoding or "utf-8"))


def test_a_class_whose_name_is_not_utf8_is_refused_at_once(broken_name: Path, folder: Path) -> None:
    os.rename(os.fsencode(folder / "dog"), os.fsencode(folder) + b"/d\xf6g")
    with pytest.raises(DataError, match=r"names are not printable UTF-8: d\\xf6g. Rename them"):
        FolderSource(folder)


@pytest.mark.parametrize(
    "name", ["a cat", "кот", "猫", "cat's", 'c"a"t', "a,b", "-cat", "null", "010", "[cat]", "cat\n"]
)
def test_classes_have_any_name(folder: Path, vae: Path, tmp_path: Path, name: str) -> None:
    (folder / "cat").rename(folder / name)
    if name == "cat\n":
        with pytest.raises(DataError, match=r"cat\\n"):
            FolderSource(folder)
        return
    data = DataConfig(vae=str(vae), images=str(folder), cache=str(tmp_path / "cache"), image_size=16)
    assert set(cache_latents(data).classes) == {name, "dog"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(folder: Path) -> None:
    (folder / "cat").chmod(0)
    try:
        with pytest.raises(DataError, match="cat cannot be read: Permission denied"):
            FolderSource(folder)
    finally:
        (folder / "cat").chmod(0o700)
