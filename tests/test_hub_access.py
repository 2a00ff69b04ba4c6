"""A repository that cannot be had is an error in words, after one question: absent, out of reach, or switched off."""

import socket

import pytest
from command import assert_one_line_error, run
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from transdiff_pipelines.hub_access import check_hub_has
from transdiff_pipelines.loaders import download_original


@pytest.fixture
def questions(monkeypatch):
    """Questions to the Hub, which fail as the test says."""
    asked, answers = [], {"error": None}

    def model_info(self, repository, **_):
        asked.append(repository)
        raise answers["error"]

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return asked, answers


def test_a_hub_out_of_reach_is_asked_once(questions, monkeypatch):
    asked, answers = questions
    answers["error"] = socket.gaierror("Name or service not known")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match=r"'org/name' .* the Hub cannot be reached \(Name or service"):
        check_hub_has("org/name")
    assert asked == ["org/name"]


def without_response(kind, message):
    """An error of the Hub's answers, which otherwise are made from the response itself."""
    error = kind.__new__(kind)
    OSError.__init__(error, message)
    return error


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_a_repository_that_is_not_there(questions, kind):
    _, answers = questions
    answers["error"] = without_response(kind, "404 Client Error\nmore")
    with pytest.raises(FileNotFoundError, match=r"does not give 'org/name' \(404 Client Error\); check the name"):
        check_hub_has("org/name")


def test_a_mirror_that_answers_no_questions_is_left_to_the_loader(questions):
    _, answers = questions
    answers["error"] = without_response(HfHubHTTPError, "404 Client Error")
    check_hub_has("org/name")


def test_offline_by_choice(monkeypatch):
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        check_hub_has("org/name")
    with pytest.raises(FileNotFoundError, match="no name of a Hub repository"):
        check_hub_has("org/na me")


def test_what_is_in_the_cache_is_not_asked_for(questions, monkeypatch, tmp_path):
    asked, _ = questions
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--name" / "snapshots").mkdir(parents=True)
    check_hub_has("org/name")
    assert asked == []


def test_everything_that_takes_a_repository_asks():
    with pytest.raises(ConnectionError, match="cannot be reached"):
        download_original("transdiff_b", "org/name")
    for command in (
        ["generate", 0, "--model", "org/name"],
        ["info", "org/name"],
        ["generate", 0, "--lora", "org/name"],
    ):
        assert_one_line_error(run(*command), "'org/name'", "the Hub cannot be reached")
