"""Models and data that are named by their id on the Hugging Face hub, in the hub's own cache (extra: hub).

    OWNER/NAME[@REVISION]                           a model, an adapter or a delta
    hf://[datasets/]OWNER/NAME[@REVISION]/PATH      a file of data, or a folder

What is needed is downloaded once, and compared with its hash: huggingface_hub compares sizes alone (its issue 3643).
What other programs put into the cache is taken as it is. A file goes on where its connection broke off; of a download
that is stopped, the complete files are kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
from contextlib import suppress
from functools import cache, partial
from glob import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from k2mini.errors import need_extra, some
from k2mini.files import sha256
from k2mini.sizes import readable

log = logging.getLogger(__name__)

_REPO = r"(?P<repo>\w+([.-]\w+)*/\w+([.-]\w+)*)"
MODEL = re.compile(rf"{_REPO}(@(?P<revision>[\w./-]+))?", re.ASCII)
DATA = re.compile(rf"hf://(?>(?P<datasets>datasets/)?){_REPO}(@(?P<revision>refs/\w+/\w+|[\w.-]+))?/(?P<path>.*[^/])/*")
# What is read of a model or an adapter: files, and of each group of patterns the first that the repository has.
FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "adapter_config.json", "manifest.json"]
FIRST_FILES = ["vocab.json", "merges.txt"]  # of GPT-2 and OPT where they have no tokenizer.json
WEIGHTS = (
    (
        r"model\.safetensors",
        r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
        r"pytorch_model\.bin",
        r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
    ),
    (r"adapter_model\.safetensors", r"adapter_model\.bin"),
)
LOGIN = "log in (hf auth login, or HF_TOKEN)"


@cache
def fetch(name: str, *, weights: bool = True) -> Path:
    """The directory of a model, or the path of a file or folder of data, by its id. A process asks for each id once.

    Args:
        weights: False: without them, for a model's shape or tokenizer.

    Raises ValueError, saying what to do, where the hub has none, does not give it, or can't be reached and not all of
    it is in the cache; and where a file has arrived with another hash than it should.
    """
    id = DATA.fullmatch(name) or MODEL.fullmatch(name)
    if id is None:
        raise ValueError(f"{name}: data of the hub are named hf://datasets/OWNER/NAME/PATH, or …/NAME@REVISION/PATH")
    repo, path = id["repo"], id.groupdict().get("path") or ""
    kind = "dataset" if id.groupdict().get("datasets") else "model"
    parts = [path, "--repo-type dataset" * (kind == "dataset")]
    parts += [f"--revision {id['revision']}" * bool(id["revision"]), f"--local-dir {repo.split('/')[1]}"]
    by_hand = " ".join(filter(None, [f"hf download {repo}", *parts]))
    missing = f"there is no {'file' if path else 'directory'} {name}"
    try:
        from huggingface_hub import HfApi, get_cached_repo_tree, is_offline_mode, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError, RevisionResolutionError
    except ImportError:
        first = f"if it is a {kind} on the Hugging Face hub, download it first (pip install huggingface_hub): {by_hand}"
        raise ValueError(f"{missing}; {first}; or {need_extra('hub')}") from None
    hub: Any = {"repo_id": repo, "repo_type": kind}
    try:  # one request, for the commit
        hub["revision"] = HfApi().resolve_revision(**hub, revision=id["revision"], local_files_only=is_offline_mode())
        with suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            files = _needed(name, [entry.path for entry in get_cached_repo_tree(**hub)], path, weights)
            folder = snapshot_download(**hub, allow_patterns=[*map(escape, files)], local_files_only=True)
            log.info("%s is at commit %s", name, hub["revision"].resolved)
            return Path(folder, path)
        if not is_offline_mode():
            return _download(name, hub, path, weights) / path
    except RevisionResolutionError:
        pass
    except Exception as error:  # of HTTP, of the disk; none is shown whole, for it may name headers, with the token
        raise error if type(error) is ValueError else ValueError(_sentence(error, missing, id, kind)) from None
    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hugging Face hub can't be reached"
    raise ValueError(f"{missing}; {why}, and not all of it is in the cache; with a network: {by_hand}")


def _needed(name: str, there: list[str], path: str, weights: bool) -> list[str]:
    """Of all files of a repository those to download: what is at `path`, or what is read of a model."""
    if path:
        needed = [file for file in there if f"{file}/".startswith(f"{path}/")]
    else:
        forms = [[[f for f in there if re.fullmatch(form, f)] for form in group] for group in WEIGHTS if weights]
        found = [file for group in forms for file in next(filter(None, group), [])]
        side = FILES + FIRST_FILES * (not {"tokenizer.json", "tokenizer.model"} & {*there})
        needed = [*found, *(file for file in side if file in there)] if found or not weights else []
    if not needed:
        raise ValueError(f"{name}: the hub has nothing there that k2mini reads; its files are {some(there) or 'none'}")
    return needed


def _download(name: str, hub: Any, path: str, weights: bool) -> Path:
    """Complete the cache. Raises as huggingface_hub does; ValueError where there is no room, or a hash is wrong."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

    at = {**hub, "revision": (commit := hub["revision"].resolved)}
    listed: Any = HfApi().list_repo_tree(**at, recursive=True)
    tree = {entry.path: entry for entry in listed if hasattr(entry, "size")}  # the rest are folders
    files = _needed(name, [*tree], path, weights)
    new = [file for file in files if not isinstance(try_to_load_from_cache(filename=file, **at), str)]
    size, into = sum(tree[file].size for file in new), Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(place for place in (into, *into.parents) if place.exists())).free
    if size > free:
        room = f"it takes {readable(size)}, {readable(free)} are free where the hub's cache is, {into}"
        raise ValueError(f"{name}: {room}; HF_HOME names another place")
    log.info("%s is at commit %s; downloading %s into %s", name, commit, readable(size), into)
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    quiet: Any = {} if shown else {"tqdm_class": partial(tqdm, disable=True)}
    got = [Path(hf_hub_download(filename=file, **at, **quiet)) for file in files]  # Ctrl-C ends it at once
    wrong = {file: where for file, where in zip(files, got, strict=True) if not _is_right(where, tree[file])}
    for where in wrong.values():
        blob = where.resolve()
        where.unlink()
        blob.unlink(missing_ok=True)
    if wrong:
        raise ValueError(f"{name}: {some([*wrong])} came with another hash than the hub's, and is removed; start again")
    # Only this notes the list of files, without which all are downloaded and compared by the next start, or rank.
    return Path(snapshot_download(**hub, allow_patterns=[*map(escape, files)], **quiet))


def _is_right(path: Path, entry: Any) -> bool:
    """Whether a file has the hash that the repository notes: SHA-256 of a large one, else git's, over a header too."""
    if entry.lfs is not None:
        return sha256(path) == entry.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id


def _sentence(error: BaseException, missing: str, id: re.Match[str], kind: str) -> str:
    from huggingface_hub import errors

    error = (isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__) or error  # what a download met
    repo, status = id["repo"], getattr(getattr(error, "response", None), "status_code", None)
    page = f"huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return f"{missing}, nor a {kind} {repo} on the Hugging Face hub; if it is private, {LOGIN}"
    if status in (401, 403):
        return f"the hub refuses {repo} ({status}): accept the licence on its page, {page}, and {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {id['revision'] or 'main'}; {page} has a list of its branches"
    words = status or (str(error).split("\n")[0] if isinstance(error, OSError) else type(error).__name__)
    return f"{id[0]}: the download ended with {words}; what is complete is kept, start again to go on"
