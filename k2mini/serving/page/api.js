// The server: requests, streams, errors, and the key where it wants one.

const KEY = 'k2mini.key'; // in sessionStorage alone: gone when the tab is closed

export class ServerError extends Error {
  /** `status` is 0 where there was no answer; `wait` is the seconds after which the server asks to be tried again. */
  constructor(message, status = 0, wait = 0) {
    super(message);
    Object.assign(this, { name: 'ServerError', status, wait });
  }
}

let asking = null; // the question for a key, while it is open
let askKey = async () => null;

/** `ask(wrong)` gives the key that a user has typed, or null; `wrong`: the last one was refused. */
export function onKeyWanted(ask) {
  askKey = ask;
}

/** GET, or POST of a body as JSON. Throws ServerError, or AbortError where `signal` says so. */
export async function call(path, body = undefined, signal = undefined) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const kind = body && { 'Content-Type': 'application/json' };
    const headers = { ...kind, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { method: body ? 'POST' : 'GET', headers, body: JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ServerError('The server can’t be reached. Is it still running?');
    }
    if (response.ok) return response;
    if (response.status !== 401 || !(await renewKey(key))) throw await refusal(response);
  }
}

/** Whether there is another key than the one that was refused. Requests that wait for it share one question. */
async function renewKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return true;
  asking ??= askKey(refused !== null).finally(() => { asking = null; });
  const key = await asking;
  if (key) sessionStorage.setItem(KEY, key);
  return Boolean(key);
}

async function refusal(response) {
  let message = `The server answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message || message;
  } catch { /* a proxy's page, say */ }
  return new ServerError(message, response.status, Number(response.headers.get('Retry-After')) || 0);
}

/** The chunks of a streamed answer, up to [DONE]. Throws as `call` does, and where the stream breaks off. */
export async function* stream(path, body, signal) {
  const response = await call(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines.filter((candidate) => candidate.startsWith('data:'))) {
        const data = line.slice('data:'.length).trim();
        if (data === '[DONE]') return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message ?? 'The server broke off.');
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === 'AbortError' || error instanceof ServerError) throw error;
    throw new ServerError('The connection was lost.');
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ServerError('The connection was lost before the answer’s end.');
}
