// Answers token by token: the strip of tokens, and for one of them why it stands there.

import { call } from './api.js';
import { byId, element } from './dom.js';

const BLANKS = { ' ': '␣', '\n': '⏎', '\t': '⇥', '\r': '␍' };
const FULL = 4; // nats of difference at which a tint is full

/** A token's text, all of it to be seen, as in the audit's pages: blanks as signs, what shows nothing as <200B>, and
 *  bytes that are no character alone, of which OpenAI's protocol says bytes:\xe2, as <0xE2>. */
export function visible(text) {
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(text)) return text.slice(6).toUpperCase().replace(/\\X(..)/g, '<0x$1>');
  const hidden = (char) => `<${char.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}>`;
  const sign = (char) => BLANKS[char] ?? (/[\p{C}\p{Z}]/u.test(char) ? hidden(char) : char);
  return [...text].map(sign).join('') || '(empty)';
}

/** In running text a space may stay one; a line's end is shown and breaks the line. */
function running(text) {
  const spaced = /\S/.test(text) ? visible(text).replaceAll('␣', ' ') : visible(text);
  return spaced.replaceAll('⏎', '⏎\n');
}

/** Colour a node: a share of 1 is full, below 0 the other hue. By the CSSOM, since the policy forbids style attributes. */
function shade(node, share) {
  node.style.setProperty('--a', Math.min(1, Math.abs(share)).toFixed(2));
  node.classList.toggle('n', share < 0);
  return node;
}

const percent = (p) => (p >= 0.9995 ? '100%' : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : p > 0 ? '<0.1%' : '0%');
const signed = (value) => `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(2)}`;

/** Bring a container up to an answer's tokens: spans for the new ones, tints for those whose base is known. */
export function renderTokens(container, tokens) {
  const known = container.childElementCount;
  tokens.slice(known).forEach((token, place) => {
    const [, space, rest] = /^( *)(.*)$/s.exec(running(token.text)); // a space before a word is not tinted
    container.append(element('span', {
      role: 'button', tabIndex: known + place ? -1 : 0, className: 'token', ariaLabel: visible(token.text),
    }, space, element('i', {}, rest)));
  });
  tokens.forEach((token, place) => {
    if (token.base !== undefined) shade(container.children[place].lastChild, (token.logprob - token.base) / FULL);
  });
}

/** A token's numbers in one line. */
export function numbers({ text, logprob, base }) {
  if (logprob === undefined) return visible(text);
  const own = `${visible(text)} ${percent(Math.exp(logprob))}`;
  if (base === undefined) return `${own} (log-probability ${signed(logprob)})`;
  return `${own} (${signed(logprob)}), base ${percent(Math.exp(base))} (${signed(base)}): ${signed(logprob - base)} nats`;
}

/** What the colours of differences mean, or those of probabilities. */
export const differences = () => element('div', { className: 'legend' },
  'base', element('i', { className: 'both' }), `adapter likelier by ${FULL} nats`);
const probabilities = () => element('div', { className: 'legend' }, '0', element('i'), '1 probability');

/** Fill the panel for one token of an answer: its alternatives at once, the lens when the server has read it. */
export async function explain(answer, place, signal) {
  const token = answer.tokens[place];
  const lens = element('div', { ariaBusy: 'true' }, element('p', { className: 'soft' }, 'Reading the layers…'));
  byId('why-title').textContent = `Why ${visible(token.text)}`;
  byId('why-body').replaceChildren(
    element('p', {}, numbers(token)),
    element('p', { className: 'soft' }, `Token ${place + 1} of ${answer.model}’s answer.`),
    element('h3', {}, 'What else could have stood here'),
    alternatives(token),
    element('h3', {}, 'What each layer would have said'),
    lens,
  );
  try {
    lens.replaceChildren(...lensTable(await readLens(answer, place, signal), token));
  } catch (error) {
    if (error.name === 'AbortError') return;
    lens.replaceChildren(element('p', { className: 'error' }, error.message));
  }
  lens.ariaBusy = 'false';
}

async function readLens(answer, place, signal) {
  const ids = answer.tokens.slice(0, place + 1).map((token) => token.id);
  if (!answer.prompt.length || !ids.every(Number.isInteger)) {
    throw new Error('The ids of this answer’s tokens are not known. Ask again to see its layers.');
  }
  const response = await call('k2mini/why', { model: answer.model, tokens: [...answer.prompt, ...ids] }, signal);
  return (await response.json()).layers;
}

function alternatives(token) {
  if (!token.top?.length) {
    return element('p', { className: 'soft' }, 'Kept while the page is open only; the last layer below says the same.');
  }
  const all = token.top.some((other) => other.text === token.text) ? token.top : [...token.top, token];
  return element('table', { className: 'bars' }, element('tbody', {}, ...all.map(({ text, logprob }) => {
    const p = Math.exp(logprob);
    const bar = element('i');
    bar.style.setProperty('--share', p.toFixed(4));
    const name = element('th', { scope: 'row', title: visible(text) }, visible(text));
    return element('tr', { className: text === token.text ? 'same' : '' },
      name, element('td', {}, percent(p)), element('td', { className: 'bar' }, bar));
  })));
}

/** Rows are layers, from the first at the top; what is the chosen token is framed. */
function lensTable(layers, token) {
  const cell = (text, p) => shade(element('td', {
    className: text === token.text ? 'same' : '', title: `${visible(text)} ${percent(p)}`,
  }, visible(text)), p);
  const rows = layers.map(({ layer, top, rank, probability }) => element('tr', {},
    element('th', { scope: 'row' }, String(layer)),
    shade(element('td', { title: `${visible(token.text)} ${percent(probability)}` }, String(rank + 1)), probability),
    ...top.map(([text, p]) => cell(text, p))));
  const widest = Math.max(0, ...layers.map(({ top }) => top.length));
  const heads = ['Layer', 'Rank', 'Likeliest', ...Array(Math.max(0, widest - 1)).fill('')];
  return [
    element('p', { className: 'soft' }, `The state after each layer, read as if it were the last (logit lens). Rank is that of `
      + `${visible(token.text)}, 1 the likeliest.`),
    probabilities(),
    element('div', { className: 'scroll', tabIndex: 0, role: 'group', ariaLabel: 'Logit lens' },
      element('table', { className: 'lens' },
        element('thead', {}, element('tr', {}, ...heads.map((head) => element(head ? 'th' : 'td', {}, head)))),
        element('tbody', {}, ...rows))),
    element('p', { className: 'soft' }, '␣ is a space, ⏎ a line’s end, ⇥ a tab, <200B> a character that shows nothing.'),
  ];
}
