// The page of `k2mini serve`: conversations, what is asked, and the answers as they come.

import { call, onKeyWanted, stream } from './api.js';
import { button, byId, copy, download, element, iconButton } from './dom.js';
import { renderMarkdown } from './markdown.js';
import * as store from './store.js';
import { differences, explain, numbers, renderTokens } from './tokens.js';

// name, label, least, most, step, hint
const FIELDS = [
  ['max_tokens', 'Max tokens', 1, 2 ** 31 - 1, 1, 'empty: as many as fit'],
  ['temperature', 'Temperature', 0, 2, 0.1, '0 takes the likeliest token'],
  ['top_p', 'Top p', 0.01, 1, 0.05, '1 keeps all tokens'],
  ['top_k', 'Top k', 0, 1000, 1, '0 keeps all tokens'],
  ['min_p', 'Min p', 0, 1, 0.01, '0 keeps all tokens'],
  ['repetition_penalty', 'Repetition penalty', 1, 2, 0.05, '1 is none'],
  ['seed', 'Seed', 0, 2 ** 31 - 1, 1, 'empty: another each time'],
];
const DEFAULTS = { temperature: 0.7 };

const settings = {
  model: '', base: '', compare: false, template: '', mode: 'chat', theme: '', values: DEFAULTS, ...store.loadSettings(),
};
const isSet = ([name]) => Number.isFinite(settings.values?.[name]);
settings.values = Object.fromEntries(FIELDS.filter(isSet).map(([name]) => [name, settings.values[name]]));
const known = new Map(); // of an id: a conversation that this page has shown, with what the store does not keep
const running = new Map(); // of a conversation: what stops the answer that is coming
const live = new Map(); // of an answer that is coming: when it was asked for
const views = new WeakMap(); // of an answer: the nodes that show it
const asTokens = new WeakMap(); // of an answer: whether its tokens are shown, where a user has said so
const dirty = new Set(); // answers to be drawn in the next frame
let info = { models: [], templates: [], context: 0 };
let current;
const welcome = byId('welcome'); // in the place of turns where there are none

// ---- Conversations

const empty = () => ({ id: store.newId(), title: 'New conversation', at: Date.now(), system: '', turns: [] });
const isRunning = () => running.has(current);
const get = (id) => known.get(id) ?? store.load(id);

/** Save a conversation, or say that it can't be. */
function keep(conversation) {
  conversation.at = Date.now();
  const problem = store.save(conversation);
  if (problem) notify(problem);
  showList();
}

function open(conversation) {
  current = conversation;
  known.set(current.id, current);
  closePanel();
  showSide(false);
  byId('system').value = current.system;
  byId('log').replaceChildren(...(current.turns.length ? current.turns.map(turnNode) : [welcome]));
  byId('log').lastElementChild.scrollIntoView({ block: 'end' });
  requestAnimationFrame(() => byId('log').lastElementChild.scrollIntoView({ block: 'end' })); // heights are known now
  showList();
  showState();
}

function openStored(id) {
  const conversation = get(id);
  if (conversation) open(conversation);
  else notify('This conversation can’t be read.');
}

/** Those that could not be saved stand first. */
function listed() {
  const saved = store.list();
  const ids = new Set(saved.map(({ id }) => id));
  return [...[...known.values()].filter(({ id, turns }) => turns.length && !ids.has(id)), ...saved];
}

function showList() {
  if (byId('list').querySelector('input')) return; // a name is being typed
  const focused = [...byId('list').querySelectorAll('button')].indexOf(document.activeElement);
  byId('list').replaceChildren(...listed().map(({ id, title }) => {
    const chosen = id === current.id;
    const name = button(title, () => openStored(id), { className: 'title', title, ariaCurrent: String(chosen) });
    return element('li', { className: chosen ? 'chosen' : '' }, name,
      iconButton('edit', `Rename ${title}`, () => rename(id, name)),
      iconButton('export', `Export ${title}`, () => exportAll([id], title)),
      iconButton('delete', `Delete ${title}`, () => discard(id, title)));
  }));
  byId('list').querySelectorAll('button')[focused]?.focus();
  document.title = current.turns.length ? `${current.title} – k2mini` : 'k2mini';
}

function rename(id, name) {
  const field = element('input', { value: name.textContent, ariaLabel: 'New name', maxLength: 200 });
  field.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === 'Escape') field.value = '';
    if (event.key === 'Escape' || event.key === 'Enter') field.blur();
  };
  field.onblur = () => {
    const conversation = get(id);
    const title = field.value.trim();
    field.remove();
    if (!conversation || !title) return showList();
    conversation.title = title;
    keep(conversation);
  };
  name.replaceWith(field);
  field.select();
}

function discard(id, title) {
  const conversation = get(id);
  running.get(conversation)?.abort();
  known.delete(id); // what still comes of it is not saved
  store.remove(id);
  if (id === current.id) open(empty());
  else showList();
  notify(`“${title}” is deleted.`, conversation && 'Undo', () => {
    keep(conversation);
    open(conversation);
  });
}

function exportAll(ids, name) {
  const conversations = ids.map(get).filter(Boolean).map((one) => store.pack(one));
  download(`${name.replace(/[^\p{L}\p{N}]+/gu, '-')}.json`, JSON.stringify({ k2mini: 1, conversations }));
}

async function importFile(file) {
  try {
    const found = JSON.parse(await file.text()).conversations.map(store.revive).filter((one) => one.turns.length);
    const problems = found.map(store.save).filter(Boolean);
    found.forEach((one) => known.set(one.id, one));
    if (found.length) open(found[0]);
    notify(problems[0] ?? `${found.length} imported.`);
  } catch {
    notify(`${file.name} is not an export of this page.`);
  }
}

// ---- Turns and answers

const nodes = new WeakMap(); // of a turn: its node

function turnNode(turn) {
  const take = turn.takes[turn.shown];
  const node = element('article', { className: 'turn' },
    questionNode(turn, take),
    element('div', { className: take.answers.length > 1 ? 'answers two' : 'answers' },
      ...take.answers.map((answer) => answerNode(answer, turn))));
  nodes.set(turn, node);
  return node;
}

const redraw = (turn) => nodes.get(turn)?.replaceWith(turnNode(turn));

function questionNode(turn, take) {
  const step = (by) => {
    turn.shown += by;
    store.save(current);
    redraw(turn);
    nodes.get(turn).querySelector('.question .icon:enabled').focus();
  };
  const side = (name, label, by) => {
    const node = iconButton(name, label, () => step(by));
    node.disabled = !turn.takes[turn.shown + by];
    return node;
  };
  const takes = turn.takes.length < 2 ? [] : [
    side('left', 'The take before', -1),
    element('span', {}, `${turn.shown + 1} / ${turn.takes.length}`),
    side('right', 'The next take', 1),
  ];
  const copies = button('Copy', () => copy(take.input ? `${take.content}\n\n${take.input}` : take.content, copies));
  return element('div', { className: 'question' },
    element('div', { className: 'said' }, take.content,
      take.input ? element('div', { className: 'given' }, element('b', {}, 'Input'), take.input) : null),
    element('div', { className: 'acts' }, ...takes, copies, button('Edit', () => edit(turn, take))));
}

/** Put a field in the place of a question. */
function edit(turn, take) {
  if (isRunning()) return notify('An answer is coming. Stop it first.');
  const field = (value, ariaLabel) => element('textarea', { value, ariaLabel, rows: 3 });
  const content = field(take.content, take.alone ? 'Instruction' : 'Your message');
  const input = field(take.input, 'Input');
  const sendIt = () => {
    const changed = { content: content.value.trim(), input: input.value.trim(), alone: take.alone, answers: [] };
    if (changed.content) resend(turn, changed);
  };
  const last = turn === current.turns.at(-1);
  const editor = element('div', { className: 'editor' }, content, take.alone ? input : null,
    last ? null : element('p', { className: 'soft' }, 'A copy of the conversation goes on from here; this one stays.'),
    element('div', { className: 'row' },
      button('Send', sendIt, { className: 'primary' }), button('Cancel', () => redraw(turn))));
  editor.onkeydown = (event) => {
    if (event.key === 'Escape') redraw(turn);
    else if (!sends(event)) return;
    else sendIt();
    event.preventDefault();
    event.stopPropagation();
  };
  nodes.get(turn).firstElementChild.replaceWith(editor);
  content.focus();
}

function resend(turn, take) {
  const place = current.turns.indexOf(turn);
  if (place < current.turns.length - 1) {
    const copied = structuredClone(current);
    open({ ...copied, id: store.newId(), title: `${current.title} (edited)`, turns: copied.turns.slice(0, place + 1) });
  }
  ask(current, current.turns[place], take);
}

function answerNode(answer, turn) {
  const copies = button('Copy', () => copy(answer.text, copies));
  const view = {
    copies,
    body: element('div'),
    legend: differences(),
    readout: element('p', { className: 'readout soft', hidden: true }),
    problem: element('div'),
    stats: element('span', { className: 'soft' }),
    toggle: button('Tokens', () => {
      asTokens.set(answer, !showsTokens(answer));
      draw(answer);
    }),
    again: button('Regenerate', () => regenerate(turn), { className: 'regenerate' }),
  };
  view.body.onclick = (event) => chosenToken(event.target, answer);
  view.body.onkeydown = (event) => tokenKey(event, answer);
  view.body.onpointerover = (event) => readOut(event.target, answer, view);
  view.body.addEventListener('focusin', view.body.onpointerover);
  views.set(answer, view);
  const node = element('section', { className: 'answer', ariaLabel: `Answer of ${answer.model}` },
    element('h3', { className: 'who' }, answer.model), view.body, view.legend, view.readout, view.problem,
    element('div', { className: 'acts' }, copies, view.again, view.toggle, view.stats));
  draw(answer);
  return node;
}

const showsTokens = (answer) => asTokens.get(answer) ?? answer.tokens.some((token) => token.base !== undefined);

/** Show what there is of an answer. */
function draw(answer) {
  const view = views.get(answer);
  if (!view) return;
  const tokens = showsTokens(answer);
  if (view.tokens !== tokens) {
    view.tokens = tokens;
    view.body.replaceChildren();
    view.body.className = tokens ? 'tokens' : 'markdown';
    view.readout.hidden = !tokens;
    view.readout.textContent = 'Point at a token for its numbers, click it to see why it stands there.';
    view.toggle.ariaPressed = String(tokens);
  }
  if (tokens) renderTokens(view.body, answer.tokens);
  else renderMarkdown(view.body, answer.text);
  const coming = live.has(answer);
  view.body.classList.toggle('coming', coming);
  view.stats.textContent = statistics(answer);
  view.copies.hidden = !answer.text;
  view.toggle.hidden = !answer.tokens.length;
  view.again.hidden = coming;
  view.legend.hidden = !tokens || answer.tokens.every((token) => token.base === undefined);
  view.problem.className = answer.error ? 'error' : '';
  view.problem.replaceChildren(...(answer.error ? [answer.error.message, button('Try again', () => view.again.click())] : []));
}

function statistics(answer) {
  const { finish, stats: { count, first, rate } } = answer;
  const coming = live.has(answer);
  const parts = [];
  if (coming && !count) parts.push(`Waiting… ${Math.round((performance.now() - live.get(answer)) / 1000)} s`);
  if (count) parts.push(`${count}\u00a0${count === 1 ? 'token' : 'tokens'}`);
  if (rate) parts.push(`${rate.toFixed(1)}\u00a0tokens/s`);
  if (first !== undefined && !coming) parts.push(`first token ${first.toFixed(2)}\u00a0s`);
  if (finish === 'length') parts.push('cut at the token limit');
  if (finish === 'stopped') parts.push('stopped');
  return parts.join(' · ');
}

/** Draw in the next frame what has come since the last one, and stay at the end if that is what was shown. */
function mark(answer) {
  if (!dirty.size) requestAnimationFrame(paint);
  dirty.add(answer);
}

function paint() {
  const log = byId('log');
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  dirty.forEach((answer) => draw(answer));
  dirty.clear();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

setInterval(() => [...live.keys()].forEach(mark), 1000); // the seconds of one that waits

// ---- Tokens of an answer: one of them is in the tab order, the arrows go on from it

function tokenKey(event, answer) {
  const token = event.target;
  if (!token.classList.contains('token')) return;
  const to = {
    ArrowRight: token.nextElementSibling,
    ArrowLeft: token.previousElementSibling,
    Home: token.parentNode.firstElementChild,
    End: token.parentNode.lastElementChild,
  }[event.key];
  if (to) {
    token.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  } else if (event.key === 'Enter' || event.key === ' ') chosenToken(token, answer);
  else return;
  event.preventDefault();
}

function readOut(node, answer, view) {
  const token = node.closest('.token');
  if (token) view.readout.textContent = numbers(answer.tokens[[...view.body.children].indexOf(token)]);
}

let reading = new AbortController();
function chosenToken(target, answer) {
  const node = target.closest('.token');
  if (!node) return;
  reading.abort();
  reading = new AbortController();
  document.querySelector('.token.asked')?.classList.remove('asked');
  node.classList.add('asked');
  explain(answer, [...node.parentNode.children].indexOf(node), reading.signal);
  openPanel('why', node);
}

// ---- Asking

function messagesFor(conversation, turn, take, model) {
  const user = ({ content, input }) => ({ role: 'user', content, ...(input && { input }) });
  const messages = conversation.system ? [{ role: 'system', content: conversation.system }] : [];
  const before = take.alone ? [] : conversation.turns.slice(0, conversation.turns.indexOf(turn));
  for (const { takes, shown } of before) {
    const answers = takes[shown].answers.filter((answer) => answer.text);
    const own = answers.find((answer) => answer.model === model) ?? answers.at(-1);
    if (own) messages.push(user(takes[shown]), { role: 'assistant', content: own.text });
  }
  return [...messages, user(take)];
}

/** Ask for a take of a turn, and go on until its answers are whole, stopped or refused. */
async function ask(conversation, turn, take) {
  const models = settings.compare ? [settings.base, settings.model] : [settings.model];
  take.answers = models.map((model) => ({
    model, text: '', tokens: [], prompt: [], finish: '', error: null, stats: { count: 0 },
  }));
  turn.shown = turn.takes.push(take) - 1;
  let controller = new AbortController();
  running.set(conversation, controller);
  if (nodes.has(turn)) redraw(turn);
  else byId('log').append(turnNode(turn));
  byId('log').scrollTop = byId('log').scrollHeight;
  if (document.activeElement === document.body) byId('log').focus(); // the button that was pressed is gone
  keep(conversation);
  showState();
  const messages = ({ model }) => messagesFor(conversation, turn, take, model);
  await Promise.all(take.answers.map((answer) => fill(answer, messages(answer), controller.signal)));
  if (take.answers.length > 1) {
    controller = new AbortController(); // an answer that was stopped can be compared, too
    running.set(conversation, controller);
    await weigh(...take.answers, controller.signal);
  }
  running.delete(conversation);
  if (known.has(conversation.id)) keep(conversation); // it may have been deleted meanwhile
  showState();
  const finished = take.answers.map(({ model, text, error }) => `${model}: ${text} ${error?.message ?? ''}`);
  byId('finished').textContent = finished.join('\n');
}

/** Stream one answer. Whatever goes wrong becomes a part of it, and what has come of it stays. */
async function fill(answer, messages, signal) {
  const begun = performance.now();
  live.set(answer, begun);
  mark(answer);
  const body = {
    model: answer.model, messages, stream: true, stream_options: { include_usage: true },
    logprobs: true, top_logprobs: 5, return_token_ids: true,
    ...(settings.template && { template: settings.template }), ...settings.values,
  };
  try {
    for await (const chunk of stream('v1/chat/completions', body, signal)) take(chunk, answer, begun);
    answer.finish ||= 'stop';
  } catch (error) {
    answer.finish = error.name === 'AbortError' ? 'stopped' : 'error';
    if (answer.finish === 'error') answer.error = { message: said(error) };
  }
  live.delete(answer);
  mark(answer);
}

const said = (error) => (error.wait ? `${error.message} (The server asks to wait ${error.wait} s.)` : error.message);

/** What a chunk of the stream adds to an answer. */
function take(chunk, answer, begun) {
  const { stats } = answer;
  const choice = chunk.choices?.[0] ?? {};
  const prompt = choice.prompt_token_ids ?? chunk.prompt_token_ids;
  if (prompt) answer.prompt = prompt;
  const entries = choice.logprobs?.content ?? [];
  const ids = choice.token_ids?.length === entries.length ? choice.token_ids : [];
  entries.forEach((entry, place) => answer.tokens.push({
    id: ids[place],
    text: entry.token,
    logprob: entry.logprob,
    top: entry.top_logprobs?.map((other) => ({ text: other.token, logprob: other.logprob })),
  }));
  const text = choice.delta?.content ?? '';
  answer.text += text;
  if (choice.finish_reason) answer.finish = choice.finish_reason;
  stats.count = Math.max(stats.count, answer.tokens.length, chunk.usage?.completion_tokens ?? 0);
  if (text || entries.length) {
    const seconds = (performance.now() - begun) / 1000;
    stats.first ??= seconds;
    if (seconds > stats.first + 0.05) stats.rate = (stats.count - 1) / (seconds - stats.first);
  }
  mark(answer);
}

/** Of each token of the adapter's answer, the log-probability that the base gives it in the same place. */
async function weigh(base, adapter, signal) {
  const { prompt, tokens } = adapter;
  if (!tokens.length || adapter.error) return;
  try {
    const ids = [...prompt, ...tokens.map((token) => token.id)];
    const body = { model: base.model, prompt: ids, echo: true, max_tokens: 0, logprobs: 1 };
    const { choices } = await (await call('v1/completions', body, signal)).json();
    const found = choices[0].logprobs.token_logprobs;
    if (found.length !== ids.length) throw new Error(`${found.length} log-probabilities for ${ids.length} tokens`);
    tokens.forEach((token, place) => { token.base = found[prompt.length + place]; });
  } catch (error) {
    if (error.name === 'AbortError') return;
    adapter.error = { message: `The base’s view of this answer is missing: ${said(error)}` };
  }
  mark(adapter);
}

// ---- The box below, and keys

const sends = (event) => event.key === 'Enter' && !event.shiftKey && !event.isComposing;

function send() {
  const [content, input] = [byId('question'), byId('input')].map((field) => field.value.trim());
  if (!content || isRunning()) return;
  if (!settings.model) return notify('There is no model to ask yet.', 'Try again', start);
  const alone = settings.mode === 'form';
  const turn = { takes: [], shown: 0 };
  if (!current.turns.length) {
    byId('log').replaceChildren();
    current.title = content.slice(0, 60);
  }
  current.turns.push(turn);
  byId('question').value = '';
  byId('input').value = '';
  ask(current, turn, { content, input: alone ? input : '', alone, answers: [] });
}

/** One more take of a turn's question. A take that brought no text is replaced. */
function regenerate(turn) {
  if (isRunning()) return;
  const { content, input, alone, answers } = turn.takes[turn.shown];
  if (answers.every((answer) => !answer.text)) turn.takes.splice(turn.shown, 1);
  ask(current, turn, { content, input, alone, answers: [] });
}

const stop = () => running.get(current)?.abort();

function showState() {
  byId('send').hidden = isRunning();
  byId('stop').hidden = !isRunning();
  const form = settings.mode === 'form';
  byId('input-part').hidden = !form;
  byId('question-label').className = form ? '' : 'unseen';
  byId('question-label').textContent = form ? 'Instruction' : 'Your message';
  byId('question').placeholder = form ? 'What to do' : 'Ask a question';
  byId('mode-hint').textContent = form ? 'asked alone, without the turns above' : '';
  byId('compare').ariaPressed = String(settings.compare);
  byId('model-label').textContent = settings.compare ? 'Adapter' : 'Model';
  byId('base-label').hidden = !settings.compare;
  const columns = current.turns.some(({ takes, shown }) => takes[shown].answers.length > 1);
  document.body.classList.toggle('wide', settings.compare || columns);
}

// ---- Panels, notices, settings

/** On a narrow page the conversations are shown when they are asked for. */
function showSide(shown) {
  document.body.classList.toggle('side', shown);
  byId('menu').ariaExpanded = String(shown);
}

let opener = null;
function openPanel(id, from) {
  closePanel();
  opener = from;
  byId(id).hidden = false;
  document.body.classList.add('panel');
  byId('open-settings').ariaExpanded = String(id === 'settings');
  byId(`${id}-title`).focus();
}

function closePanel() {
  const shown = ['settings', 'why'].map(byId).find((panel) => !panel.hidden);
  if (!shown) return;
  if (shown.contains(document.activeElement)) opener?.focus();
  shown.hidden = true;
  document.body.classList.remove('panel');
  byId('open-settings').ariaExpanded = 'false';
}

let noticeTimer;
function notify(text, label = '', action = null) {
  const act = () => {
    byId('notice').hidden = true;
    action();
  };
  byId('notice').replaceChildren(element('span', {}, text), ...(label ? [button(label, act)] : []),
    iconButton('close', 'Close', () => { byId('notice').hidden = true; }));
  byId('notice').hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { byId('notice').hidden = true; }, 15000);
}

function change(changes) {
  Object.assign(settings, changes);
  store.saveSettings(settings);
  showState();
}

function showFields() {
  byId('fields').replaceChildren(...FIELDS.map(([name, label, least, most, step, hint]) => {
    const limit = name === 'max_tokens' && info.context ? info.context : most;
    const field = element('input', {
      type: 'number', id: `set-${name}`, min: least, max: limit, step, placeholder: 'server’s', value: settings.values[name] ?? '',
    });
    field.onchange = () => {
      const typed = step === 1 ? Math.round(field.valueAsNumber) : field.valueAsNumber;
      const value = Math.min(limit, Math.max(least, typed)); // NaN where nothing is typed
      const { [name]: _, ...others } = settings.values;
      change({ values: Number.isNaN(value) ? others : { ...others, [name]: value } });
      field.value = Number.isNaN(value) ? '' : value;
    };
    const said = element('span', {}, label, element('small', {}, hint));
    return element('label', { className: 'field number' }, said, field);
  }));
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

function flipTheme() {
  const system = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
  const next = (settings.theme || system) === 'dark' ? 'light' : 'dark';
  change({ theme: next === system ? '' : next });
  showTheme();
}

/** Fill the menus from what the server says of itself. */
async function start() {
  try {
    info = await (await call('k2mini/info')).json();
  } catch (error) {
    if (error.status === 503) setTimeout(start, 1000 * (error.wait || 5)); // the model is being loaded
    return notify(said(error), 'Try again', start);
  }
  byId('notice').hidden = true;
  const ids = info.models.map(({ id }) => id);
  const option = ({ id, adapter }) => element('option', { value: id }, adapter ? `${id} (adapter)` : id);
  for (const name of ['base', 'model']) byId(name).replaceChildren(...info.models.map(option));
  byId('template').replaceChildren(
    element('option', { value: '' }, `The model’s (${info.template})`),
    ...info.templates.map((name) => element('option', { value: name }, name)));
  const or = (chosen, usual) => (ids.includes(chosen) ? chosen : usual);
  const alone = ids.length < 2;
  byId('compare').disabled = alone;
  byId('compare').title = alone ? 'There is one model; k2mini serve --adapter NAME=DIR adds one' : 'Ask two models at once';
  change({
    base: or(settings.base, ids[0]),
    model: or(settings.model, ids.at(-1)), // the adapter named last, the demo's last stage
    compare: settings.compare === true && !alone,
    template: info.templates.includes(settings.template) ? settings.template : '',
  });
  for (const name of ['base', 'model', 'template']) byId(name).value = settings[name];
  showFields();
}

function typedKey(wrong) {
  const dialog = byId('key-dialog');
  byId('key-text').textContent = wrong ? 'That key was refused.' : 'It is kept until this tab is closed.';
  byId('key').value = '';
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue && byId('key').value);
  });
}

// ---- Wiring

onKeyWanted(typedKey);

byId('ask').onsubmit = (event) => {
  event.preventDefault();
  send();
};
for (const name of ['question', 'input']) {
  byId(name).onkeydown = (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  };
}
document.onkeydown = (event) => {
  if (event.key !== 'Escape' || byId('key-dialog').open) return;
  if (isRunning()) stop();
  else if (document.body.classList.contains('side')) showSide(false);
  else closePanel();
};
byId('stop').onclick = () => {
  stop();
  byId('question').focus();
};
byId('new').onclick = () => {
  open(empty());
  byId('question').focus();
};
byId('import').onclick = () => byId('file').click();
byId('file').onchange = async () => {
  for (const file of byId('file').files) await importFile(file);
  byId('file').value = '';
};
byId('export').onclick = () => exportAll(listed().map(({ id }) => id), 'k2mini-conversations');
byId('menu').onclick = () => showSide(!document.body.classList.contains('side'));
byId('log').addEventListener('click', () => showSide(false));
byId('open-settings').onclick = (event) => {
  if (byId('settings').hidden) openPanel('settings', event.currentTarget);
  else closePanel();
};
for (const node of document.querySelectorAll('.close')) node.onclick = closePanel;
byId('theme').onclick = flipTheme;
byId('compare').onclick = () => change({ compare: !settings.compare });
for (const name of ['base', 'model', 'template']) byId(name).onchange = () => change({ [name]: byId(name).value });
byId('defaults').onclick = () => {
  change({ values: { ...DEFAULTS } });
  showFields();
};
byId('system').onchange = () => {
  current.system = byId('system').value.trim();
  if (current.turns.length) keep(current);
};
for (const radio of document.querySelectorAll('[name=mode]')) {
  radio.checked = radio.value === settings.mode;
  radio.onchange = () => change({ mode: radio.value });
}
addEventListener('pagehide', () => running.forEach((_, conversation) => store.save(conversation)));
addEventListener('storage', (event) => { // another tab
  const id = store.isTurns(event.key);
  if (!id) return;
  const here = known.get(id);
  if (running.has(here) && event.newValue) { // both have gone on with it: two conversations from here
    here.id = store.newId();
    known.set(here.id, here);
    known.delete(id);
    keep(here);
  } else if (!running.has(here) && (id !== current.id || event.newValue)) known.delete(id);
  if (id === current.id && !known.has(id)) openStored(id);
  else showList();
});

showTheme();
showFields();
open(empty());
start();
