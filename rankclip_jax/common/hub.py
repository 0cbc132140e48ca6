"""Files of a model on the Hugging Face hub, by its id ORG/NAME: fetched into the hub's cache, or found there.

huggingface_hub does the work, so its variables count: HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT.
"""

import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from rankclip_jax.common.errors import InputError, one_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*[A-Za-z0-9]", re.ASCII)
_OF_FILES = (".json", ".txt", ".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_LOGIN = "`hf auth login` (or HF_TOKEN)"


def is_id(text: str) -> bool:
    """Whether `text` can be a hub id, ORG/NAME. Whether there is a path of that name is for the caller to see first."""
    return bool(_ID.fullmatch(text)) and not re.search(r"--|\.\.", text) and not text.endswith(_OF_FILES)


def fetch(
    repo: str, choose: Callable[[Collection[str]], list[str]], check: Callable[[Path], None] = lambda folder: None
) -> Path:
    """The folder in the hub's cache that holds the files of `repo` that are needed.

    What is missing or has changed is fetched, with progress on stderr. Where the hub cannot be asked, offline for one,
    a whole copy in the cache will do.

    Args:
      repo: as `is_id` accepts.
      choose: names of all files -> names of those that are needed; raises InputError where they are not there.
      check: looks at what is small (.json, .txt) before anything else is fetched; raises InputError.

    Raises:
      InputError: no such id, no access to it, or the hub cannot be asked and the cache has no whole copy.
    """
    import huggingface_hub  # here: whoever reads local files need not wait for it
    from huggingface_hub import constants, errors

    try:
        info = huggingface_hub.HfApi().model_info(repo, timeout=10)
        wanted = choose([file.rfilename for file in info.siblings or ()])
        texts = [name for name in wanted if name.endswith((".json", ".txt"))]
        if texts:
            check(_snapshot(repo, info.sha, texts))
        return _snapshot(repo, info.sha, wanted)
    except InputError as error:
        raise InputError(f"{repo} on the Hugging Face hub: {error}") from None
    except Exception as error:  # those of huggingface_hub, and whatever its version's HTTP client raises
        reason = _reason(repo, error)
        offline = isinstance(error, errors.OfflineModeIsEnabled)
    try:  # no patterns: whatever is there
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True, allow_patterns=[]))
    except Exception:
        cache = constants.HF_HUB_CACHE
        raise InputError(f"{repo}: no such file or folder, nor is it in the hub's cache {cache}; {reason}") from None
    try:
        choose([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
        check(folder)
    except InputError as error:
        raise InputError(f"{repo}: {reason}; its copy {folder} is not whole ({error})") from None
    if not offline:
        print(f"{repo}: {reason}; using the copy in the cache", file=sys.stderr)
    return folder


def _snapshot(repo: str, commit: str | None, names: list[str]) -> Path:
    """The folder of a commit with its files `names`; quiet where all are in the cache already."""
    import huggingface_hub

    found = [huggingface_hub.try_to_load_from_cache(repo, name, revision=commit) for name in names]
    cached = [path for path in found if isinstance(path, str)]
    if len(cached) == len(names):
        return Path(cached[0]).parents[names[0].count("/")]
    return Path(huggingface_hub.snapshot_download(repo, allow_patterns=names))


def _reason(repo: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"the hub's model of that id is gated; ask for access at {constants.ENDPOINT}/{repo}, then {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model on the Hugging Face hub (a private one needs {_LOGIN})"
    if status in (401, 403):
        return f"the Hugging Face hub denies access ({one_line(error)}); renew it by {_LOGIN}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hugging Face hub is not asked (HF_HUB_OFFLINE is set)"
    return f"the Hugging Face hub did not give it ({one_line(error, kind=True)})"
