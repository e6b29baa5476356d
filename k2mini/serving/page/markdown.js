// Markdown as DOM nodes: paragraphs, headings, lists, quotes, tables, code, emphasis, links. HTML in it stays text, and
// pictures are not loaded. Repetitions are bounded, so that no answer can make a pattern search for long.

import { button, copy, element } from './dom.js';

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+/;
const FIRST_ITEM = /^[ \t]*([-*+]|1[.)])[ \t]+/; // what ends a paragraph; "1986. That year" does not
const DEEPEST = 8; // lists and quotes inside one another; what is deeper stays text
const INLINE = new RegExp(
  [
    /\\([!-/:-@[-`{-~])/, // 1: the character after a backslash
    /(`{1,8})(?!`)(.{0,2000}?[^`])\2(?!`)/, // 3: code
    /\*\*(?=\S)(.{0,1000}?\S)\*\*(?!\*)/, // 4: bold
    /\*(?=[^\s*])(.{0,1000}?[^\s*])\*(?!\*)/, // 5: italic
    /(?<!\w)_(?=[^\s_])(.{0,1000}?[^\s_])_(?!\w)/, // 6: italic
    /!?\[([^\]]{1,500})\]\(((?:[^\s()]|\([^\s()]{0,200}\)){1,2000})\)/, // 7, 8: a link, or a picture, which becomes one
    /(https?:\/\/[^\s<>"'()[\]*]{0,2000}[^\s<>"'()[\]*.,;:!?])/, // 9: an address
  ].map((part) => part.source).join('|'),
  'gs',
);

const made = new WeakMap(); // of a block's node: the text that it was made of

/** Show a text in a container. Blocks that have not changed since the last call stay: a stream costs its last block. */
export function renderMarkdown(container, text, depth = 0) {
  const sources = blocks(text);
  sources.forEach((source, place) => {
    const old = container.children[place];
    if (old && made.get(old) === source) return;
    const node = build(source, depth);
    made.set(node, source);
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > sources.length) container.lastElementChild.remove();
}

/** The text cut into its blocks. */
function blocks(text) {
  const lines = text.split('\n');
  const found = [];
  let end = 0;
  const skip = (more) => {
    while (end < lines.length && more(lines[end])) end += 1;
  };
  while (end < lines.length) {
    const start = end;
    const line = lines[end];
    end += 1;
    if (!line.trim()) continue;
    const fence = FENCE.exec(line);
    if (fence) {
      skip((next) => !closes(next, fence[1]));
      end = Math.min(end + 1, lines.length);
    } else if (QUOTE.test(line)) {
      skip((next) => QUOTE.test(next));
    } else if (ITEM.test(line) && !RULE.test(line)) {
      // A blank line ends a list, unless an item or an indented line follows.
      const goes = (next) => ITEM.test(next) || /^[ \t]{2,}\S/.test(next);
      const lazy = (next) => lines[end - 1].trim() && !opens(next);
      skip((next) => (next.trim() ? goes(next) || lazy(next) : goes(lines[end + 1] ?? '')));
    } else if (!opens(line)) {
      skip((next) => next.trim() && !opens(next));
    }
    found.push(lines.slice(start, end).join('\n'));
  }
  return found;
}

const closes = (line, fence) => line.trim().startsWith(fence) && !line.replaceAll(fence[0], '').trim();
const opens = (line) => [FENCE, HEADING, RULE, QUOTE, FIRST_ITEM].some((pattern) => pattern.test(line));

/** The node of one block. */
function build(source, depth) {
  const lines = source.split('\n');
  const fence = FENCE.exec(lines[0]);
  if (fence) {
    const closed = lines.length > 1 && closes(lines.at(-1), fence[1]);
    return codeBlock(lines.slice(1, closed ? -1 : undefined).join('\n'), fence[2].trim());
  }
  const heading = HEADING.exec(lines[0]);
  if (heading) return element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2]));
  if (RULE.test(lines[0])) return element('hr');
  if (depth < DEEPEST && QUOTE.test(lines[0])) {
    const quote = element('blockquote');
    renderMarkdown(quote, lines.map((line) => line.replace(QUOTE, '')).join('\n'), depth + 1);
    return quote;
  }
  if (depth < DEEPEST && ITEM.test(lines[0])) return list(lines, depth);
  const columns = lines.length > 1 && lines[0].includes('|') ? cells(lines[1]) : [];
  if (columns.length && columns.every((cell) => /^:?-+:?$/.test(cell))) return table(lines, columns);
  return element('p', {}, ...inline(source));
}

function codeBlock(code, language) {
  const copies = button('Copy', () => copy(code, copies));
  return element('div', { className: 'code' },
    element('div', { className: 'code-head' }, element('span', {}, language || 'code'), copies),
    element('pre', { tabIndex: 0, ariaLabel: 'Code' }, element('code', {}, code)));
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const node = element(/\d/.test(mark) ? 'ol' : 'ul');
  if (node.tagName === 'OL') node.start = Number.parseInt(mark, 10);
  const items = [];
  let width = 0; // of an item's indent and mark
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < indent.length + 2) {
      width = item[0].length;
      items.push([line.slice(width)]);
    } else {
      const blank = /^[ \t]*/.exec(line)[0].length;
      items.at(-1).push(line.slice(Math.min(blank, width)));
    }
  }
  for (const item of items) {
    const entry = element('li');
    renderMarkdown(entry, item.join('\n'), depth + 1);
    node.append(entry);
  }
  return node;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, '').split('|').map((cell) => cell.trim());

function table(lines, columns) {
  const row = (line, tag) => element('tr', {}, ...cells(line).slice(0, columns.length).map((cell, place) => {
    const right = columns[place].endsWith(':') ? 'right' : '';
    return element(tag, { className: right }, ...inline(cell));
  }));
  return element('div', { className: 'scroll', tabIndex: 0, role: 'group', ariaLabel: 'Table' }, element('table', {},
    element('thead', {}, row(lines[0], 'th')),
    element('tbody', {}, ...lines.slice(2).map((line) => row(line, 'td')))));
}

/** Texts and nodes of what stands inside a block. */
function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [, escaped, , code, bold, star, underscore, label, target, address] = match;
    parts.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (escaped !== undefined) parts.push(escaped);
    else if (code !== undefined) parts.push(element('code', {}, code.replace(/^ (.*) $/s, '$1')));
    else if (bold !== undefined) parts.push(element('strong', {}, ...inline(bold)));
    else if (label !== undefined) parts.push(link(label, target));
    else if (address !== undefined) parts.push(link(address, address));
    else parts.push(element('em', {}, ...inline(star ?? underscore)));
  }
  parts.push(text.slice(end));
  return parts.filter((part) => part !== '');
}

/** A link that opens elsewhere and shows its target; what is not an address of the web or of mail stays text. */
function link(label, target) {
  const url = URL.canParse(target) ? new URL(target) : null;
  if (!['http:', 'https:', 'mailto:'].includes(url?.protocol)) return `${label} (${target})`;
  return element('a', { href: url.href, title: url.href, target: '_blank', rel: 'noopener noreferrer' }, label);
}
