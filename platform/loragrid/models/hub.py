"""Asks the Hugging Face hub, with one quick request, for the commit of a name and a revision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ANSWER_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class HubCommit:
    """One commit of one hub repository; `downloaded` is its local folder if the hub cannot be reached.

    files: the names of its files, empty if the hub does not list them.
    """

    commit: str
    downloaded: Path | None
    files: frozenset[str] = frozenset()


class NotOnHubError(ValueError):
    """The hub has no such repository or revision, or it cannot be reached and nothing is downloaded."""


def resolve_commit(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> HubCommit:
    """Return the commit of a hub repository's `revision` (None: the default branch).

    It sends one request without retries, because the libraries' own loaders retry for half a minute. Without an answer
    it uses an earlier download from the hub's own cache.

    Raises:
        NotOnHubError: with the reason as the end of a sentence.
    """
    # Imported here because half of all experiments never need the hub.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=ANSWER_TIMEOUT_SECONDS)
    except HFValidationError:
        raise NotOnHubError("it is not a valid hub name") from None
    except GatedRepoError:
        raise NotOnHubError(
            "only accounts that accepted its terms can download it (log in with `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise NotOnHubError(f"the hub has no revision {revision} of it") from None
    except RepositoryNotFoundError:
        raise NotOnHubError(f"the hub has no such {kind}, or your account has no access to it") from None
    except Exception as error:
        # The HTTP library's own errors, whose classes change with the version of huggingface_hub.
        try:
            downloaded = Path(snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True))
        except Exception:
            raise NotOnHubError(f"the hub could not be reached ({_first_line(error)})") from error
        return HubCommit(commit=downloaded.name, downloaded=downloaded)
    if info.sha is None:
        raise NotOnHubError("the hub reports no commit for it")
    files = frozenset(file.rfilename for file in getattr(info, "siblings", None) or ())
    return HubCommit(commit=info.sha, downloaded=None, files=files)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
