// Building the page. Nodes are made here and never from markup, so that nothing a model says is ever read as HTML.

export const byId = (id) => document.getElementById(id);

/** A new element with properties (not attributes) and children: nodes, texts, or null for none. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A button with a text, which is its name as well. */
export function button(label, onclick, properties = {}) {
  return element('button', { type: 'button', onclick, ...properties }, label);
}

/** A button with a picture, one of index.html's symbols; `label` is read out, and shown as a tip. */
export function iconButton(name, label, onclick) {
  const [svg, use] = ['svg', 'use'].map((tag) => document.createElementNS('http://www.w3.org/2000/svg', tag));
  use.setAttribute('href', `#i-${name}`);
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  return button(svg, onclick, { className: 'icon', ariaLabel: label, title: label });
}

/** Put a text on the clipboard, and say so on the button. */
export async function copy(text, node) {
  const before = node.textContent;
  node.textContent = (await written(text)) ? 'Copied' : 'Not copied';
  setTimeout(() => { node.textContent = before; }, 1500);
}

async function written(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over http from another machine there is no clipboard, only the command of old.
    const area = element('textarea', { value: text, className: 'unseen' });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    focused?.focus();
    return done;
  }
}

/** Hand the user a file. */
export function download(name, text) {
  const href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
  element('a', { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}
