"""Uploading a pruned pipeline with its model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ecodiff.errors import EcoDiffError
from ecodiff.method.surgery import save
from ecodiff.storage.paths import data_dir, is_embedded
from ecodiff.storage.saving import finish_interrupted

from .card import MARKER, card_of, made_of, pruned_parts, read_evaluation

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """Where a pipeline was uploaded to, and whether its card was written here (False: the user's own stays)."""

    url: str
    wrote_card: bool


def push(
    folder_or_pipe,
    repo_id: str,
    *,
    private: bool = False,
    evaluation: Sequence[str | os.PathLike] = (),
    base: str | None = None,
    licence: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload a pruned pipeline to the Hub, with a model card of what is known about it.

    Args:
        folder_or_pipe: a folder that a pruned pipeline was saved to, which stays as it is, or the pipeline itself.
        repo_id: "owner/name". The repository is made where there is none; weights of an earlier push are replaced.
        private: whether a new repository is private.
        evaluation: files that ``evaluate --json`` printed, for the card.
        base: the Hub id of the original (None: what `prune` wrote into the folder).
        licence: the Hub's name of the original's licence (None: asked of the original's own card).
        token: an access token with the right to write (None: HF_TOKEN, or the one that ``hf auth login`` stored).

    A README.md in the folder or the repository that `push` did not write is the user's: it stays, and no card is
    written. Raises EcoDiffError, before anything is uploaded, for a folder without a pruned pipeline and for files
    that are no evaluations; and where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise EcoDiffError(f"push: {repo_id!r}: write the repository as OWNER/NAME.")
    evaluations = {Path(path).stem: read_evaluation(path) for path in evaluation}
    if len(evaluations) < len(evaluation):
        raise EcoDiffError("push: two evaluations have the same file name, which is their heading: rename one.")
    with _folder_of(folder_or_pipe) as folder:
        pipeline, parts = pruned_parts(folder)
        if token is None and get_token() is None:
            raise EcoDiffError(
                "push: no access token of the Hub was found: `hf auth login` stores one, or set HF_TOKEN to a token "
                "with the right to write."
            )
        api = HfApi(token=token)
        with _clear_refusals(repo_id):
            repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
            own_card = (folder / CARD).is_file() and not _is_ours((folder / CARD).read_text("utf-8", "replace"))
            card = None
            if not own_card and not _has_own_card(api, repo_id):
                made = made_of(folder, parts)
                base = base or made.get("base")
                licence = licence or _licence_of(api, base)
                card = card_of(repo_id, pipeline, parts, made, evaluations=evaluations, base=base, licence=licence)
            components = [part.component for part in parts]
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload a pruned pipeline",
                ignore_patterns=[".*", "*/.*"] + ([] if own_card else [CARD]),
                # Shards of an earlier push would load in the place of the new weights.
                delete_patterns=[f"{component}/*.safetensors*" for component in components],
            )
            if card is not None:
                api.upload_file(
                    repo_id=repo_id,
                    path_or_fileobj=card.encode(),
                    path_in_repo=CARD,
                    commit_message="Write the model card",
                )
    return Pushed(str(repository), card is not None)


@contextmanager
def _folder_of(folder_or_pipe) -> Iterator[Path]:
    """The folder that was given, or one that the pipeline is saved to meanwhile."""
    if isinstance(folder_or_pipe, (str, os.PathLike)):
        folder = Path(folder_or_pipe)
        if not folder.is_dir():
            raise EcoDiffError(
                f"push: {folder}: there is no such folder; give one that a pruned pipeline was saved to."
            )
        finish_interrupted(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        save(folder_or_pipe, place)
        yield Path(place)


def _is_ours(card: str) -> bool:
    return MARKER in card.splitlines()


def _has_own_card(api, repo_id: str) -> bool:
    """Whether the repository has a card that `push` did not write."""
    if not api.file_exists(repo_id, CARD):
        return False
    with tempfile.TemporaryDirectory() as place:
        path = api.hf_hub_download(repo_id, CARD, local_dir=place)
        return not _is_ours(Path(path).read_text("utf-8", "replace"))


def _licence_of(api, base: str | None) -> str | None:
    """The licence that the original's own card names; None where it names none or cannot be read."""
    from huggingface_hub import ModelCard

    if base is None:
        return None
    try:
        if is_embedded(base):
            return ModelCard.load(data_dir() / "models" / base / CARD).data.license
        data = api.model_info(base).card_data
        return None if data is None else data.license
    except (OSError, ValueError):  # no such model, a gated one, no network: the card says that it is not known
        return None


@contextmanager
def _clear_refusals(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the network as one sentence each."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise EcoDiffError(f"push: {repo_id!r} cannot be the name of a repository: {_first_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise EcoDiffError("push: HF_HUB_OFFLINE is set, so nothing is uploaded: unset it.") from error
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        owner = repo_id.partition("/")[0]
        reasons = {
            401: "the access token is not valid: `hf auth login` stores another one",
            403: f"the access token may not write to {owner}: it needs that right, and {owner} has to be yours",
            404: f"there is no such repository or owner, or the access token may not see it: is {owner} written right?",
            413: "a file is larger than the Hub takes",
            429: "the Hub takes no more requests for now: push again later",
        }
        reason = reasons.get(status or 0, f"the Hub answered {status} ({_first_line(error)}): push again later")
        raise EcoDiffError(f"push: {repo_id}: {reason}.") from error
    except (HTTPError, OSError) as error:
        raise EcoDiffError(
            f"push: {repo_id}: the Hub cannot be reached ({_first_line(error)}): is there a network? "
            "What was uploaded is used again by the next push."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
