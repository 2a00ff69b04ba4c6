"""Whether a repository of the Hub can be had, asked once before something is loaded from it."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError


TIMEOUT = 10  # seconds


def check_hub_has(repository: str) -> None:
    """Raise where a model repository, `owner/name`, is neither in the Hub's cache here nor to be had.

    Without this question huggingface_hub tries for half a minute to reach a Hub that cannot be reached, and diffusers
    then says that the repository has no config.json.

    Raises:
        FileNotFoundError: the Hub has no such repository, or not for this user.
        ConnectionError: the Hub cannot be reached, or must not be.
    """
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        return
    try:
        HfApi().model_info(repository, timeout=TIMEOUT)
    except HFValidationError as error:
        raise FileNotFoundError(f"{repository!r} is no name of a Hub repository: {error}") from error
    except (RepositoryNotFoundError, GatedRepoError) as error:
        answer = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"the Hub does not give {repository!r} ({answer}); check the name, and for a private or gated one log in: "
            "hf auth login"
        ) from error
    except HfHubHTTPError:
        return  # it can be reached, and a mirror may know files alone: loading them will tell
    except Exception as error:  # what the client raises without a network has changed its class with the client
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error) or type(error).__name__
        raise ConnectionError(
            f"{repository!r} is no folder here and not in the Hub's cache, and the Hub cannot be reached ({reason}); "
            "name a folder on this machine, or try again with a network"
        ) from error
