"""Pushing and loading through a real Hub client and server, in fresh processes (see hub_client.py, hub_server.py)."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hub_client
import pytest
from hub_server import Hub, running_hub
from huggingface_hub import ModelCard


# The fixture runs four processes, each of which imports everything: long on a busy machine.
pytestmark = pytest.mark.timeout(1200)


@dataclass
class Session:
    """What the processes left: the server with its repositories, and the outcome of every check."""

    hub: Hub
    outcomes: dict[str, dict[str, str]]
    requests_offline: int


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:

        def start(stage: str, home: str, **variables: str) -> subprocess.Popen:
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
            return subprocess.Popen(
                [sys.executable, Path(hub_client.__file__), stage, folder],
                env={
                    **inherited,
                    **hub.environment(str(folder / home)),
                    "OMP_NUM_THREADS": "1",
                    "NO_PROXY": "127.0.0.1",
                    **variables,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        def finish(*processes: subprocess.Popen) -> None:
            for process in processes:
                output = process.communicate(timeout=600)[0]
                assert process.returncode == 0, output

        finish(start("push", "pusher"))
        finish(start("load", "user"), start("without_package", "other-user"))
        before = len(hub.requests)
        finish(start("offline", "user", HF_HUB_OFFLINE="1"))
        outcomes = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in hub_client.STAGES}
        return Session(hub, outcomes, len(hub.requests) - before)


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, checks in hub_client.STAGES.items() for name in checks]
)
def test_in_a_fresh_process(session: Session, stage: str, name: str) -> None:
    assert session.outcomes[stage][name] == ""


def test_offline_is_offline(session: Session) -> None:
    assert session.requests_offline == 0


def test_weights_go_through_lfs_and_the_rest_through_the_commit(session: Session) -> None:
    repository = session.hub.repositories["tester/tiny"]
    files = repository.commits[repository.branches["main"]]
    assert {path for path, file in files.items() if file.is_lfs} == {
        f"{component}/diffusion_pytorch_model{variant}.safetensors"
        for component in ("condition_encoder", "transformer", "vae")
        for variant in ("", ".fp16")
    }
    index = json.loads(files["model_index.json"].content)
    assert index["_class_name"] == "TransDiffPipeline"
    assert index["transformer"] == ["transdiff_pipelines", "TransDiffTransformer2DModel"]


def test_a_repository_without_a_card_gets_one_that_fits(session: Session) -> None:
    card = ModelCard(session.hub.files("tester/tiny")["README.md"].decode())
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert 'TransDiffPipeline.from_pretrained("tester/tiny")' in card.text
    assert "| `guidance_scale` | 1.3 |" in card.text
    assert "trust_remote_code" not in card.text
    assert "trust_remote_code=True" in session.hub.files("tester/tiny-code")["README.md"].decode()


def test_a_card_that_is_there_is_left_alone_to_the_byte(session: Session) -> None:
    files = session.hub.files("tester/own-card")
    assert files["README.md"] == hub_client.OWN_CARD.encode()
    assert "model_index.json" in files


def test_a_trained_folders_card_goes_along_with_its_picture(session: Session) -> None:
    files = session.hub.files("tester/trained")
    assert files["README.md"].startswith(b"# Trained")
    assert files["samples.png"] == hub_client.ONE_PIXEL


def test_a_repository_is_private_where_that_was_asked_for(session: Session) -> None:
    assert {name for name, repository in session.hub.repositories.items() if repository.private} == {"tester/trained"}


def test_code_is_one_file_for_the_pipeline_and_one_for_each_component(session: Session) -> None:
    files = session.hub.files("tester/tiny-code")
    sources = {path for path in files if path.endswith(".py")}
    assert sources == {
        "pipeline.py",
        "condition_encoder/ar_condition_encoder.py",
        "scheduler/scheduling_flow_match_euler_maruyama.py",
        "transformer/transformer_transdiff.py",
    }
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline", "TransDiffPipeline"]
    assert index["transformer"] == ["transformer_transdiff", "TransDiffTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
