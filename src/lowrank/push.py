"""Files onto the Hugging Face hub: the right to write is checked before, and what fails is tried again."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lowrank.errors import LowrankError, MissingExtraError
from lowrank.log import logger

T = TypeVar("T")
WAITS = (1, 4, 15)  # seconds before a second, third and fourth try, beside huggingface_hub's own
PASSING = (408, 429, 500, 502, 503, 504)
# of a run's folder what others need; not run.json, log.jsonl and reports/, which name files and show rows
PUSHED = (
    "README.md",
    "loss.png",
    "*adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
)
LOG_IN = "Make one that may write at https://huggingface.co/settings/tokens, then: hf auth login"


class HubError(LowrankError, OSError):
    """The hub refused, or could not be reached; the text says what to do. What is here stays as it is."""


def check_push(repo_id: str, token: str | None = None) -> str:
    """The name in full of the repository that a push would write to; nothing is made or written.

    Raises HubError where there is no token, or it may not write there, so that this is known before a training.
    """
    api = _api(token)
    if not api.token:
        raise HubError(f"there is no token for the hub here. {LOG_IN} (or set HF_TOKEN).")
    about = tried(api.whoami, repo_id, api.token)
    owner, _, name = repo_id.rpartition("/")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id):
        raise HubError(f"{repo_id!r} is no name on the hub: owner/name")
    owner = owner or about["name"]
    mine = {about["name"], *(org["name"] for org in about.get("orgs", []))}
    if owner not in mine:
        raise HubError(
            f"the token is {about['name']}'s, who may not write to {owner}'s repositories. "
            f"Owners it may write for: {', '.join(sorted(mine))}."
        )
    access = (about.get("auth") or {}).get("accessToken") or {}
    if not _may_write(access, f"{owner}/{name}"):
        raise HubError(f"the token may read and not write to {owner}/{name}. {LOG_IN}")
    return f"{owner}/{name}"


def _may_write(access: dict[str, Any], repo_id: str) -> bool:
    """Whether a token's role, or its rights one by one, let it write; where that is not told: yes."""
    if access.get("role") != "fineGrained":
        return access.get("role") != "read"
    here = {repo_id, repo_id.split("/")[0]}
    scoped = (access.get("fineGrained") or {}).get("scoped", [])
    rights = [scope for scope in scoped if (scope.get("entity") or {}).get("name") in here]
    return any("repo.write" in scope.get("permissions", ()) for scope in rights)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload LoRA adapter",
    revision: str | None = None,
    create_pr: bool = False,
    files: tuple[str, ...] | None = None,
) -> Any:
    """Uploads `folder` into a repository, which is made where it is not there. Returns huggingface_hub's CommitInfo.

    private: of a new repository; None: as its owner's settings say. files: patterns of what is uploaded; None: all.
    Raises HubError.
    """
    api = _api(token)
    made = tried(
        lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, api.token
    )
    return tried(
        lambda: api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=None if files is None else list(files),
            ignore_patterns=["checkpoint-*"],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        ),
        made.repo_id,
        api.token,
    )


def tried(step: Callable[[], T], repo_id: str, token: str | bool | None) -> T:
    """What `step` returns, after further tries where it fails in a way that may pass. Raises HubError."""
    waits = iter(WAITS)
    while True:
        try:
            return step()
        except Exception as error:
            text = _without(token, str(error))
            wait = next(waits, None) if _may_pass(error) else None
            if wait is None:
                raise HubError(_words(error, text, repo_id)) from None
            logger.warning("pushing to %s: %s; trying again in %d s", repo_id, text, wait)
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """A busy server or a dropped connection; not a refusal."""
    status = _status(error)
    if status is not None:
        return status in PASSING
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in ("httpx", "httpx2")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _words(error: Exception, text: str, repo_id: str) -> str:
    """What is wrong and what to do."""
    status = _status(error)
    if status == 401:
        return f"the hub does not know the token (401): mistyped, expired or revoked. {LOG_IN}"
    if status == 403:
        return f"the token may not write to {repo_id} (403). {LOG_IN}\nThe hub says: {text}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, which forbids all requests. Unset it to push."
    if _may_pass(error):
        return f"the hub could not be reached or did not answer, {len(WAITS) + 1} times: {text}"
    return f"the hub refused {repo_id}: {text}"


def _without(token: str | bool | None, text: str) -> str:
    return text.replace(token, "hf_…") if isinstance(token, str) and token else text


def _api(token: str | bool | None) -> Any:
    """HfApi with the token that is given, or found where huggingface_hub keeps it."""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise MissingExtraError("pushing needs: pip install huggingface_hub") from error
    return HfApi(token=get_token() if token in (None, True) else token)
