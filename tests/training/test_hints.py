"""Commands in messages can be copied: paths with blanks in them are quoted."""

import re
from pathlib import Path

import pytest

from training.digits.quality import load_split
from training.outputs import publish
from transdiff_pipelines import write_cards


FOLDER = Path("my own/it's here")
QUOTED = "'my own/it'\"'\"'s here'"


def test_an_upload_that_failed_is_tried_again_with_a_quoted_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def create_repo(self, *_: object, **__: object) -> None:
            raise OSError("no network")

    monkeypatch.setattr(publish, "HfApi", Offline)
    with pytest.raises(publish.PublishError, match=re.escape(f"hf upload a/b {QUOTED}") + "$"):
        publish.publish(FOLDER, "a/b")


def test_missing_digits_are_exported_into_a_quoted_folder() -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"--output {QUOTED}`")):
        load_split(str(FOLDER), "test")


def test_stale_cards_are_written_into_a_quoted_folder(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    FOLDER.mkdir(parents=True)
    with pytest.raises(SystemExit):
        write_cards.main(["--output", str(FOLDER), "--check"])
    assert f"--output {QUOTED}\n" in capsys.readouterr().err
