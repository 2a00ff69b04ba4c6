"""The emoji as a data set: packages read, names resolved, drawings held out, pictures rendered."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data.errors import DataError
from training.data.sources import FolderSource
from training.emoji.classes import class_name, default_classes, held_out, listed_classes
from training.emoji.packages import VERSIONS, Drawing, EmojiSet, package_name, read_sets, tarball
from training.emoji.render import main, on_background, parse_colour, renderer


EMOJI = Path(__file__).parents[2] / "training" / "emoji"


def rectangle(colour: str, x: float = 0, y: float = 0, width: float = 1, height: float = 1) -> dict[str, str]:
    """An icon: a rectangle on nothing."""
    return {"body": f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>'}


def emoji_set(name: str, icons: dict[str, Any], aliases: dict[str, Any] | None = None, **sizes: float) -> EmojiSet:
    info = {
        "license": {"spdx": f"{name}-licence"},
        "author": {"name": f"{name} & co", "url": f"https://{name}.example"},
    }
    contents = {"icons": icons, "aliases": aliases or {}, "width": 2, "height": 2, **sizes}
    categories = {"Animals": ["dog-face"], "Flags": ["flag-for-france"]} if name == "noto" else {}
    return EmojiSet(name, contents, info, {"categories": categories} if categories else {})


def write_package(folder: Path, emoji: EmojiSet) -> Path:
    path = folder / tarball(emoji.name, VERSIONS[emoji.name])
    with tarfile.open(path, "w:gz") as archive:
        for file, contents in {"icons": emoji.icons, "info": emoji.info, "metadata": emoji.metadata}.items():
            data = json.dumps(contents).encode()
            if contents:
                entry = tarfile.TarInfo(f"package/{file}.json")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


SHARED = ["dog-face", "pizza", "t-shirt", "1st-place-medal", "jack-o-lantern", "man", "two-hump-camel", "wolf"]
COLOURS = ["red", "blue", "green", "black", "gray", "purple", "orange", "navy"]


@pytest.fixture
def sets() -> list[EmojiSet]:
    """Six small sets whose drawings all differ, and what is to be left out of the classes."""
    made = []
    for hand, name in enumerate(VERSIONS):
        width = 0.5 + 0.1 * hand
        icons = {shared: rectangle(colour, width=width) for shared, colour in zip(SHARED, COLOURS, strict=True)}
        icons["man-dark-skin-tone"] = rectangle("brown", width=width)
        icons["flag-for-france"] = rectangle("white", width=width)
        icons["cricket"] = rectangle("pink", width=width)
        icons["robot"] = rectangle("silver", width=width)
        if name == "noto":
            del icons["robot"]  # five sets are left
        if name in ("noto", "twemoji", "emojione"):
            icons["only-in-three"] = rectangle("gold", width=width)
        made.append(emoji_set(name, icons, {"wild-dog": {"parent": "wolf"}}))
    return made


@pytest.fixture
def packages(tmp_path: Path, sets: list[EmojiSet]) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    for emoji in sets:
        write_package(folder, emoji)
    return folder


def pixels(emoji: EmojiSet, name: str, size: int = 2) -> np.ndarray:
    """Where a drawing has ink, `(size, size)`."""
    return np.asarray(on_background(renderer()(emoji.svg(name, size)), (255, 255, 255)))[..., 0] < 128


class TestDrawings:
    """A black pixel at the upper left of two by two shows how an alias turns and mirrors it."""

    emoji = emoji_set(
        "noto",
        {"pixel": rectangle("black")},
        {
            "same": {"parent": "pixel"},
            "mirrored": {"parent": "pixel", "hFlip": True},
            "flipped": {"parent": "pixel", "vFlip": True},
            "turned": {"parent": "pixel", "rotate": 1},
            "mirrored-then-turned": {"parent": "mirrored", "rotate": 1},
            "mirrored-twice": {"parent": "mirrored", "hFlip": True},
            "turned-round": {"parent": "turned", "rotate": 3},
            "lost": {"parent": "nothing"},
            "circle": {"parent": "round"},
            "round": {"parent": "circle"},
        },
    )

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("pixel", (0, 0)),
            ("same", (0, 0)),
            ("mirrored", (0, 1)),
            ("flipped", (1, 0)),
            ("turned", (0, 1)),
            ("mirrored-then-turned", (1, 1)),
            ("mirrored-twice", (0, 0)),
            ("turned-round", (0, 0)),
        ],
    )
    def test_aliases_are_resolved(self, name: str, place: tuple[int, int]) -> None:
        assert np.argwhere(pixels(self.emoji, name)).tolist() == [list(place)]

    def test_equal_drawings_of_different_names(self) -> None:
        assert self.emoji.drawing("mirrored-twice") == self.emoji.drawing("same") == Drawing("pixel")
        assert self.emoji.drawing("mirrored") != self.emoji.drawing("pixel")

    @pytest.mark.parametrize("name", ["lost", "circle", "unknown"])
    def test_names_that_lead_nowhere(self, name: str) -> None:
        with pytest.raises(DataError, match=f"name {name} leads to no icon"):
            self.emoji.drawing(name)

    def test_sizes_of_icons_and_of_the_set(self) -> None:
        """A wide drawing stands in the middle; one that begins elsewhere is moved to where it is seen."""
        icons = {
            "wide": {**rectangle("black", width=4, height=2), "width": 4},
            "moved": {**rectangle("black", x=-1, y=3), "left": -1, "top": 3, "width": 2},
        }
        emoji = emoji_set("noto", icons, {"tall": {"parent": "wide", "rotate": 1}})
        assert pixels(emoji, "wide", 4).tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
        assert pixels(emoji, "tall", 4).tolist() == [[False, True, True, False]] * 4
        assert np.argwhere(pixels(emoji, "moved")).tolist() == [[0, 0]]


class TestClasses:
    def test_names_as_people_say_them(self) -> None:
        said = ["dog face", "pizza", "t-shirt", "1st place medal", "jack-o-lantern", "man", "two-hump camel", "wolf"]
        assert [class_name(name) for name in SHARED] == said

    def test_default_classes(self, sets: list[EmojiSet]) -> None:
        """Not: skin tones, flags of countries, names of other things, of fewer sets, second names of a drawing."""
        assert default_classes(sets) == sorted(SHARED)

    @pytest.mark.parametrize("alias", [{"parent": "wolf"}, {"parent": "wolf", "hFlip": False, "rotate": 4}])
    def test_one_name_for_each_drawing(self, sets: list[EmojiSet], alias: dict[str, Any]) -> None:
        """The icon's own name wins, although the alias comes first in the alphabet; one set decides."""
        sets[2].icons["aliases"]["a-wolf"] = alias
        for emoji in (emoji for emoji in sets if emoji is not sets[2]):
            emoji.icons["icons"]["a-wolf"] = rectangle("lime", y=1)
        assert "wolf" in default_classes(sets)
        assert "a-wolf" not in default_classes(sets)

    def test_a_mirrored_drawing_is_another_one(self, sets: list[EmojiSet]) -> None:
        for emoji in sets:
            emoji.icons["aliases"]["wolf-looking-left"] = {"parent": "wolf", "hFlip": True}
        assert {"wolf", "wolf-looking-left"} <= set(default_classes(sets))

    def test_a_list_may_name_what_five_sets_have(self, sets: list[EmojiSet], tmp_path: Path) -> None:
        path = tmp_path / "classes.txt"
        path.write_text("# animals\n\nwolf\nrobot\ndog  face\ndog-face\njack-o-lantern\ntwo-hump camel\n")
        assert listed_classes(path, sets) == ["dog-face", "jack-o-lantern", "robot", "two-hump-camel", "wolf"]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("wolf\nonly in three\nelf\n", "names only in three, elf, which fewer than 5 of the 6 sets have"),
            ("# nothing\n", "names no class"),
            (b"\xff\xfe", "not UTF-8 text"),
        ],
    )
    def test_lists_that_do_not_fit(self, sets: list[EmojiSet], tmp_path: Path, text: str | bytes, says: str) -> None:
        path = tmp_path / "classes.txt"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(DataError, match=says):
            listed_classes(path, sets)

    def test_every_hand_is_held_out_equally_often(self) -> None:
        icons = {f"thing-{index:03d}": rectangle("red", y=index) for index in range(120)}
        held = held_out([emoji_set(name, icons) for name in VERSIONS])
        assert Counter(held.values()) == {(name, split): 10 for name in VERSIONS for split in ("test", "validation")}

    def test_shipped_lists(self) -> None:
        """As long as their names say, without repetitions, and each a part of the next."""
        lists = [(EMOJI / f"classes_{count}.txt").read_text().splitlines() for count in (60, 200)]
        names = [[line for line in lines if line and not line.startswith("#")] for lines in lists]
        assert [len(set(those)) for those in names] == [len(those) for those in names] == [60, 200]
        assert set(names[0]) < set(names[1])


class TestRendering:
    def test_folders_and_tables(self, packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "emoji"
        main(["--output", str(output), "--packages", str(packages), "--size", "8"])
        assert capsys.readouterr().out == f"{output}: 40 train, 4 validation, 4 test\n"
        files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.png"))
        classes = (output / "classes.txt").read_text().splitlines()
        assert FolderSource(output / "train").classes == classes == sorted(map(class_name, SHARED))
        for name in classes:  # one held out, five to train on, six in all
            assert len(list(output.glob(f"*/{name}/*.png"))) == len(VERSIONS)
            assert len(list((output / "train" / name).iterdir())) == len(VERSIONS) - 1
        with (output / "sources.csv").open(newline="") as table:
            rows = list(csv.DictReader(table))
        assert [row["file"] for row in rows] == files
        for row in rows:
            assert row["file"].split("/")[1:] == [row["class"], f"{row['set']}.png"]
            assert row["package"] == package_name(row["set"])
            assert row["version"] == VERSIONS[row["set"]]
            assert row["licence"] == f"{row['set']}-licence"
            assert row["author"] == f"{row['set']} & co"
            assert row["category"] == ("Animals" if row["class"] == "dog face" else "")

    def test_pictures(self, packages: Path, tmp_path: Path) -> None:
        main(["--output", str(tmp_path / "a"), "--packages", str(packages), "--size", "8", "--background", "#00ff00"])
        for path in tmp_path.glob("a/*/dog face/*.png"):
            with Image.open(path) as image:
                assert image.mode == "RGB"
                assert image.size == (8, 8)
                assert image.getpixel((0, 0)) == (255, 0, 0)
                assert image.getpixel((7, 7)) == (0, 255, 0)

    def test_a_list_changes_no_split(self, packages: Path, tmp_path: Path) -> None:
        (tmp_path / "some.txt").write_text("wolf\nman\n")
        common = ["--packages", str(packages), "--size", "4"]
        main(["--output", str(tmp_path / "all"), *common])
        main(["--output", str(tmp_path / "some"), *common, "--classes", str(tmp_path / "some.txt")])
        of_all = {path.relative_to(tmp_path / "all") for path in tmp_path.glob("all/*/*/*.png")}
        of_some = {path.relative_to(tmp_path / "some") for path in tmp_path.glob("some/*/*/*.png")}
        assert of_some == {path for path in of_all if path.parts[1] in ("wolf", "man")}

    def test_two_classes_of_one_picture(self, sets, packages, tmp_path, capsys) -> None:
        sets[3].icons["icons"]["pizza"] = sets[3].icons["icons"]["wolf"]
        write_package(packages, sets[3])
        with pytest.raises(SystemExit):
            main(["--output", str(tmp_path / "emoji"), "--packages", str(packages)])
        assert "'pizza' and 'wolf' have the same picture in fluent-emoji; take one of them" in capsys.readouterr().err
        assert not (tmp_path / "emoji").exists()


class TestWhatCanBeMissing:
    def test_a_package(self, packages: Path) -> None:
        path = packages / tarball("twemoji", VERSIONS["twemoji"])
        path.unlink()
        with pytest.raises(DataError, match=f"twemoji.* is missing; in .* run `npm pack {package_name('twemoji')}@"):
            read_sets(packages)

    @pytest.mark.parametrize("kind", ["no archive", "cut off", "without icons"])
    def test_a_damaged_package(self, packages: Path, kind: str) -> None:
        path = packages / tarball("noto", VERSIONS["noto"])
        if kind == "without icons":
            write_package(packages, EmojiSet("noto", {}, {}, {"a": 1}))
        else:
            path.write_bytes(path.read_bytes()[:200] if kind == "cut off" else b"moved permanently")
        with pytest.raises(DataError, match="run npm pack again"):
            read_sets(packages)

    def test_npm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(DataError, match=r"npm, which is not installed.*run `npm pack @iconify-json/noto@"):
            read_sets()

    def test_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.which", lambda name: sys.executable)
        failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error network\n")
        monkeypatch.setattr("subprocess.run", lambda *arguments, **keywords: failed)
        with pytest.raises(DataError, match=r"\(npm error code ENOTFOUND\). Is there a network\?.*--packages"):
            read_sets()

    def test_packages_are_fetched_where_none_are_named(self, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What npm is asked for is what is read: an npm of this test puts the packages where it is told to."""

        def run(command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
            folder = Path(command[command.index("--pack-destination") + 1])
            for wanted in command[command.index("--pack-destination") + 2 :]:
                name, version = wanted.removeprefix("@iconify-json/").split("@")
                (folder / tarball(name, version)).write_bytes((packages / tarball(name, version)).read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr("shutil.which", lambda name: name)
        monkeypatch.setattr("subprocess.run", run)
        assert [emoji.name for emoji in read_sets()] == list(VERSIONS)

    def test_resvg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "resvg_py", None)
        with pytest.raises(DataError, match="pip install 'resvg-py>=0.5'"):
            renderer()

    @pytest.mark.parametrize("colour", ["whitish", "#12", "#ffffff00", ""])
    def test_a_colour(self, colour: str) -> None:
        with pytest.raises(DataError, match="no opaque colour"):
            parse_colour(colour)
