"""PDFs to TEI by a GROBID of the user's, over its REST API (GROBID's documentation, "GROBID Service API")."""

from __future__ import annotations

import http.client
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from k2mini.corpus.readers import name_of
from k2mini.files import sha256, write_text

TIMEOUT = 180.0  # seconds without a byte, as GROBID's own client has it
PAUSE = 5.0  # seconds before a request is tried again, doubled each time up to a minute
TRIES = 8  # of a request where all of GROBID's threads are taken (503); of one without an answer, 3
_FIELDS = {"consolidateHeader": "0", "consolidateCitations": "0", "includeRawCitations": "1"}  # no call to CrossRef


def process(
    pdfs: Sequence[Path], url: str, folder: Path, *, concurrency: int = 4, on_error: Callable[[str, str], None]
) -> dict[Path, Path]:
    """PDF -> its TEI, a file in `folder` named by the PDF's SHA-256; what is there is not asked for again.

    Args:
        concurrency: requests at a time; as many as the server's own `concurrency` is best.
        on_error: called, in this thread, with the PDF and the reason where GROBID can't read it. The reason stays in
            `folder` as well (NAME.error); remove that file to have the PDF sent again.

    Raises ValueError where `url` is none or nobody answers there; what was done until then is kept.
    """
    if not re.match(r"https?://[^\s/:@]+(:\d+)?(/\S*)?$", url):
        raise ValueError(f"GROBID's address must be like http://127.0.0.1:8070, not {url!r}")
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[Path, Path] = {}  # without the suffix
    for pdf in pdfs:
        try:
            places[pdf] = folder / sha256(pdf)
        except OSError as error:
            on_error(name_of(pdf), error.strerror or str(error))
    found = {pdf: place.with_suffix(".tei.xml") for pdf, place in places.items()}
    unread = {pdf: place.with_suffix(".error") for pdf, place in places.items()}
    new = {places[pdf]: pdf for pdf in places if not (found[pdf].exists() or unread[pdf].exists())}
    # Last come those that were with a GROBID when it died, for one of them may kill the next.
    todo = deque(sorted(new.items(), key=lambda item: item[0].with_suffix(".last").exists()))
    stop = threading.Event()

    def work() -> None:
        try:
            while todo and not stop.is_set():
                with suppress(IndexError):  # another thread took the last
                    place, pdf = todo.popleft()
                    _one(pdf.read_bytes(), place, url, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(concurrency) as pool:
        workers = [pool.submit(work) for _ in range(concurrency)]
        try:
            wait(workers)
        finally:
            stop.set()
    for failed in filter(None, (worker.exception() for worker in workers)):
        done = sum(tei.exists() for tei in found.values())
        if isinstance(failed, ValueError) and done:
            raise ValueError(
                f"{failed}; {done} of {len(pdfs)} PDFs are done and kept in {folder}, start again to go on"
            )
        raise failed
    for pdf in [pdf for pdf in found if not found[pdf].exists()]:
        on_error(name_of(pdf), unread[pdf].read_text(encoding="utf-8"))
        del found[pdf]
    return found


def _one(content: bytes, place: Path, url: str, stop: threading.Event) -> None:
    """Have a PDF's TEI, or the reason that there is none, in a file. Raises ValueError where nobody answers."""
    silent = 0
    for attempt in range(TRIES):
        if attempt and stop.wait(min(PAUSE * 2 ** (attempt - 1), 60)):
            return
        try:
            status, answer = _request(url, place.name, content)
            if status == 200 and b"<TEI" in answer[:4096] and not answer.rstrip().endswith(b"</TEI>"):
                raise http.client.IncompleteRead(answer)
        except (OSError, http.client.HTTPException) as error:
            reason, silent = f"does not answer ({error or type(error).__name__})", silent + 1
            if silent < 3:
                continue
            try:
                _request(url)
            except (OSError, http.client.HTTPException):
                place.with_suffix(".last").touch()
                raise ValueError(f"GROBID at {url} {reason}") from None
            status, answer = 0, reason.encode()  # it answers, but not to this PDF
        if status == 200 and b"<TEI" in answer[:4096]:
            write_text(place.with_suffix(".tei.xml"), answer.decode(errors="replace"))
            place.with_suffix(".last").unlink(missing_ok=True)
        elif 300 <= status < 400 or status in (401, 403, 404, 405):
            raise ValueError(f"GROBID at {url} answers {status}; is the address right?")
        elif status == 503:
            continue
        else:
            said = re.sub(r"<[^>]*>|\s+", " ", answer[:500].decode(errors="replace")).strip()
            write_text(place.with_suffix(".error"), f"GROBID: {status} {said or 'no text'}".replace(" 0 ", " "))
        return
    raise ValueError(f"GROBID at {url} has no thread free (503, {TRIES} times)")


def _request(url: str, name: str = "", content: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an answer: a PDF's TEI or, without a PDF, whether GROBID is alive; no redirect is followed."""
    server = urlsplit(url)
    kind = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
    connection = kind(server.hostname or "", server.port, timeout=TIMEOUT)
    try:
        if content is None:
            connection.request("GET", f"{server.path.rstrip('/')}/api/isalive")
        else:
            part = f'--{name}\r\nContent-Disposition: form-data; name="'
            body = "".join(f'{part}{field}"\r\n\r\n{value}\r\n' for field, value in _FIELDS.items())
            body += f'{part}input"; filename="{name}.pdf"\r\nContent-Type: application/pdf\r\n\r\n'
            whole = body.encode() + content + f"\r\n--{name}--\r\n".encode()
            form = {"Content-Type": f"multipart/form-data; boundary={name}", "Accept": "application/xml"}
            connection.request("POST", f"{server.path.rstrip('/')}/api/processFulltextDocument", whole, form)
        response = connection.getresponse()
        return response.status, response.read(2**28)
    finally:
        connection.close()
