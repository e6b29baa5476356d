"""Models and data that are named by their id on the Hugging Face hub, in the hub's own cache (extra: hub).

    OWNER/NAME[@REVISION]                           a model, an adapter or a delta
    hf://[datasets/]OWNER/NAME[@REVISION]/PATH      a file of data, or a folder

What is needed of a repository is downloaded once. Nothing of ours is written into the cache. What arrives is compared
with its hash, since huggingface_hub compares sizes alone (github:huggingface/huggingface_hub, issue 3643).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
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
# Of a model and of an adapter, beside weights.
FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "adapter_config.json", "manifest.json"]
WEIGHTS = (("model.safetensors", "pytorch_model.bin"), ("adapter_model.safetensors", "adapter_model.bin"))
LOGIN = "log in (hf auth login, or HF_TOKEN)"

Choose = Callable[[list[str]], list[str]]  # from all of a repository's files to those that are needed


@cache
def fetch_model(name: str, *, weights: bool = True) -> Path:
    """The directory of a model, adapter or delta by its id, or without weights what tells its shape and tokenizer.

    Raises ValueError, saying what to do, where the hub has none, does not give it, or can't be reached and not all of
    it is in the cache; and where a file has arrived with another hash than it should.
    """

    def choose(names: list[str]) -> list[str]:
        chosen = [*(_weights(names) if weights else ()), *(file for file in FILES if file in names)]
        if not chosen or (weights and chosen[0] in FILES):
            raise ValueError(f"{name}: the hub has nothing of it that k2mini reads; there are {some(names)}")
        return chosen

    id = MODEL.fullmatch(name)
    assert id is not None
    return _fetch(id, choose)


def _weights(names: list[str]) -> Iterator[str]:
    """Of several forms of the same weights one, as directories are read: safetensors first, shards first."""
    for forms in WEIGHTS:
        for file in forms:
            stem, suffix = file.split(".")
            if (index := f"{file}.index.json") in names:
                yield from (n for n in names if n == index or re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", n))
                break
            if file in names:
                yield file
                break


@cache
def fetch_data(name: str) -> Path:
    """The path of a file by its id, or of a folder with all that is in it. Raises ValueError as `fetch_model` does."""
    if (id := DATA.fullmatch(name)) is None:
        raise ValueError(f"{name}: data of the hub are named hf://datasets/OWNER/NAME/PATH, or …/NAME@REVISION/PATH")
    path = id["path"]

    def choose(names: list[str]) -> list[str]:
        if chosen := [file for file in names if f"{file}/".startswith(f"{path}/")]:
            return chosen
        raise ValueError(f"{name}: the hub has no such file; there are {some(names) or 'none'}")

    return _fetch(id, choose) / path


def _fetch(id: re.Match[str], choose: Choose) -> Path:
    """The folder of a repository's files, from the cache if all are in it; one request asks for the newest commit."""
    name, repo, groups = id[0], id["repo"], id.groupdict()
    kind = "dataset" if groups.get("datasets") else "model"
    parts = [repo, groups.get("path"), "--repo-type dataset" * (kind == "dataset")]
    parts += [f"--revision {id['revision']}" if id["revision"] else None, f"--local-dir {repo.split('/')[1]}"]
    by_hand = f"hf download {' '.join(filter(None, parts))}"
    missing = f"there is no {'file' if 'path' in groups else 'directory'} {name}"
    try:
        from huggingface_hub import HfApi, get_cached_repo_tree, is_offline_mode, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError, RevisionResolutionError
    except ImportError:
        first = f"if it is a {kind} on the Hugging Face hub, download it first (pip install huggingface_hub): {by_hand}"
        raise ValueError(f"{missing}; {first}; or {need_extra('hub')}") from None
    hub: Any = {"repo_id": repo, "repo_type": kind}
    try:
        hub["revision"] = HfApi().resolve_revision(**hub, revision=id["revision"], local_files_only=is_offline_mode())
        with suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            files = [escape(file) for file in choose([entry.path for entry in get_cached_repo_tree(**hub)])]
            folder = Path(snapshot_download(**hub, allow_patterns=files, local_files_only=True))
            log.info("%s is at commit %s", name, folder.name)
            return folder
        if not is_offline_mode():
            return _download(name, hub, choose)
    except RevisionResolutionError:
        pass
    except Exception as error:  # of HTTP, of the disk; none is shown whole, for some name the headers, with the token
        raise error if type(error) is ValueError else ValueError(_sentence(error, missing, id, kind)) from None
    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hugging Face hub can't be reached"
    raise ValueError(f"{missing}; {why}, and not all of it is in the cache; with a network: {by_hand}")


def _download(name: str, hub: Any, choose: Choose) -> Path:
    """Complete the cache. Raises as huggingface_hub does; ValueError where there is no room, or a hash is wrong."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    at = {**hub, "revision": (commit := hub["revision"].resolved)}
    tree: dict[str, Any] = {entry.path: entry for entry in HfApi().list_repo_tree(**at, recursive=True)}
    files = choose([path for path, entry in tree.items() if hasattr(entry, "size")])  # the rest are folders
    new = [file for file in files if not isinstance(try_to_load_from_cache(filename=file, **at), str)]
    size, into = sum(tree[file].size for file in new), Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (into, *into.parents) if path.exists())).free
    if size > free:
        room = f"it takes {readable(size)}, {readable(free)} are free where the hub's cache is, {into}"
        raise ValueError(f"{name}: {room}; HF_HOME names another place")
    log.info("%s is at commit %s; downloading %s into %s", name, commit, readable(size), into)
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    quiet: Any = {} if shown else {"tqdm_class": partial(tqdm, disable=True)}
    folder = Path(snapshot_download(**hub, allow_patterns=[escape(file) for file in files], **quiet))
    wrong = [file for file in new if not _is_right(folder / file, tree[file])]
    for path in (folder / file for file in wrong):
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
    if wrong:
        raise ValueError(f"{name}: {some(wrong)} arrived with another hash than the hub's and is removed; start again")
    return folder


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
