// Conversations in the browser's localStorage, each under keys of its own: saving one touches no other, and two tabs
// don't overwrite one another's lists.
//
// A conversation is {id, title, at, system, turns}, `at` the time of its last change. A turn is {takes, shown}: a
// question edited or an answer regenerated is another take, and none is lost. A take is {content, input, alone,
// answers}; an answer {model, text, tokens, prompt, finish, error, stats}, a token {id, text, logprob, base, top}.

const TURNS = 'k2mini.turns.';
const TITLE = 'k2mini.title.';
const SETTINGS = 'k2mini.settings';

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
export const isTurns = (key) => key?.startsWith(TURNS) && key.slice(TURNS.length);

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

/** [{id, title, at}] of all conversations, the newest first. The conversations themselves are not read. */
export function list() {
  try {
    const ids = Object.keys(localStorage).map(isTurns).filter(Boolean);
    return ids.map((id) => ({ title: 'Untitled', at: 0, ...read(TITLE + id), id })).sort((a, b) => b.at - a.at);
  } catch {
    return [];
  }
}

/** The conversation, or null where it is not there or can't be read. */
export function load(id) {
  const raw = read(TURNS + id);
  return raw && { ...revive(raw), id };
}

/** Keep a conversation. Returns what is to be said of it: '' where all is well. */
export function save(conversation) {
  for (const whole of [true, false]) {
    try {
      localStorage.setItem(TURNS + conversation.id, JSON.stringify(pack(conversation, whole)));
      localStorage.setItem(TITLE + conversation.id, JSON.stringify({ title: conversation.title, at: conversation.at }));
      return whole ? '' : 'The browser’s storage is full: of this conversation the texts are kept, not the tokens.';
    } catch { /* the quota, or a browser that stores nothing */ }
  }
  return 'The browser’s storage is full or off: export this conversation before you close the page, or delete others.';
}

export function remove(id) {
  localStorage.removeItem(TURNS + id);
  localStorage.removeItem(TITLE + id);
}

export const loadSettings = () => read(SETTINGS) ?? {};
export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* the next visit begins with the defaults */ }
}

/** A conversation as plain JSON. The alternatives of tokens are left out: they are most of the bytes. */
export function pack(conversation, whole = true) {
  const token = ({ id, text, logprob, base }) => [id, text, rounded(logprob), rounded(base)];
  const answer = ({ tokens, prompt, ...rest }) => (whole ? { ...rest, prompt, tokens: tokens.map(token) } : rest);
  const take = (one) => ({ ...one, answers: one.answers.map(answer) });
  return { ...conversation, turns: conversation.turns.map((turn) => ({ ...turn, takes: turn.takes.map(take) })) };
}

const rounded = (value) => Math.round(value * 1e4) / 1e4; // of undefined NaN, which JSON makes null
const text = (value) => (typeof value === 'string' ? value : '');
const number = (value) => (Number.isFinite(value) ? value : undefined);
const items = (value) => (Array.isArray(value) ? value : []);

/** A conversation from JSON that nobody vouches for: what is known is taken, anything else left. */
export function revive(raw) {
  const token = ([id, shown, logprob, base]) => (
    { id: number(id), text: text(shown), logprob: number(logprob), base: number(base) });
  const answer = (one) => ({
    model: text(one?.model),
    text: text(one?.text),
    finish: text(one?.finish) || 'stopped',
    error: one?.error ? { message: text(one.error.message), wait: 0 } : null,
    stats: { count: number(one?.stats?.count) ?? 0, first: number(one?.stats?.first), rate: number(one?.stats?.rate) },
    prompt: items(one?.prompt).filter(Number.isInteger),
    tokens: items(one?.tokens).filter(Array.isArray).map(token),
  });
  const take = (one) => ({
    content: text(one?.content),
    input: text(one?.input),
    alone: one?.alone === true,
    answers: items(one?.answers).map(answer),
  });
  const turn = (one) => {
    const takes = items(one?.takes).map(take);
    return { takes, shown: Math.max(0, Math.min(number(one?.shown) ?? 0, takes.length - 1)) };
  };
  return {
    id: newId(),
    title: text(raw?.title) || 'Untitled',
    at: number(raw?.at) ?? Date.now(),
    system: text(raw?.system),
    turns: items(raw?.turns).map(turn).filter((one) => one.takes.length),
  };
}
