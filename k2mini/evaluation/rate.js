'use strict';
// One question at a time. Ratings are kept in this browser, under the page's id and the rater's name, and leave it as a CSV.
const { page, aspects, questions } = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);
const place = (rater) => `k2mini.rate.${page}.${rater}`;
const most = Math.max(...aspects.map((aspect) => aspect.levels.length));
const state = {}; // rater, at, ratings
let rows = []; // of the shown question: { name, levels, node, buttons }
let now = 0; // the marked one

function kept(rater) {
  try { return JSON.parse(localStorage.getItem(place(rater))); } catch { return null; }
}

function keep() {
  try { localStorage.setItem(place(state.rater), JSON.stringify(state)); } catch {
    say('This browser keeps nothing for this page: export before you close it.');
  }
}

function begin(rater) { // and go on where that rater stopped; nobody's: ask for a name, and show no ratings
  Object.assign(state, { at: 0, ratings: {} }, rater && kept(rater), { rater });
  history.replaceState(rater, ''); // which a reload keeps
  document.body.classList.toggle('new', !rater);
  Object.assign($('rater'), { value: rater, readOnly: !!rater });
  $('begin').textContent = rater ? 'Another rater' : 'Start';
  $('guide').open = !rater;
  say('');
  show(state.at);
  if (!rater) $('rater').focus();
}

const say = (text) => { $('said').textContent = text; };

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const names = (question) => question.answers.flatMap(({ id }) => aspects.map(({ name }) => `${id} ${name}`));
const given = (question) => names(question).filter((name) => name in state.ratings).length;
const isDone = (question) => given(question) === names(question).length;

function show(at) {
  state.at = Math.min(Math.max(at, 0), questions.length - 1);
  const question = questions[state.at];
  $('where').textContent = `Question ${state.at + 1} of ${questions.length} · ${question.task}`;
  $('question').textContent = question.question;
  $('reference').open = false;
  $('reference').lastElementChild.textContent = question.reference;
  rows = [];
  $('answers').replaceChildren(...question.answers.map(card));
  now = Math.max(rows.findIndex(({ name }) => !(name in state.ratings)), 0);
  $('back').disabled = state.at === 0;
  $('next').disabled = state.at === questions.length - 1;
  draw();
  $('question').focus({ preventScroll: true });
  $('asked').scrollIntoView({ block: 'nearest' });
}

function card({ id, text }, place) {
  const letter = `Answer ${String.fromCharCode(65 + place)}`;
  const said = text.trim() ? make('div', { className: 'said' }, text) : make('div', { className: 'said empty' }, 'no text');
  const lines = aspects.map((aspect) => {
    const number = rows.length;
    const buttons = aspect.levels.map((level, rank) =>
      make('button', { type: 'button', onclick: () => rate(number, rank + 1) }, `${rank + 1}`, make('small', {}, level)));
    const node = make('div', { className: 'row', role: 'group', ariaLabel: `${aspect.name} of ${letter}` },
      make('span', { title: aspect.what }, aspect.name), make('div', {}, ...buttons));
    rows.push({ name: `${id} ${aspect.name}`, node, buttons });
    return node;
  });
  return make('article', { className: 'answer' }, make('h3', {}, letter), said, make('div', { className: 'rows' }, ...lines));
}

function draw() {
  rows.forEach(({ name, node, buttons }, number) => {
    node.classList.toggle('now', number === now);
    buttons.forEach((button, rank) => { button.ariaPressed = String(state.ratings[name] === rank + 1); });
  });
  const done = questions.filter(isDone).length;
  $('count').textContent = `${done} of ${questions.length} questions rated`;
  Object.assign($('progress'), { max: questions.length, value: done });
  $('export').classList.toggle('main', done === questions.length);
  $('next').classList.toggle('main', isDone(questions[state.at]) && !$('next').disabled);
  [...$('map').children].forEach((button, number) => {
    const question = questions[number];
    button.className = isDone(question) ? 'done' : given(question) ? 'part' : '';
    button.ariaCurrent = number === state.at ? 'true' : null;
    button.ariaLabel = `Question ${number + 1}, ${given(question)} of ${names(question).length} ratings`;
  });
}

function rate(number, value) {
  const { name, buttons } = rows[number];
  if (value > buttons.length) return;
  if (value) state.ratings[name] = value;
  else delete state.ratings[name];
  const onwards = rows.map((_, step) => (number + step) % rows.length);
  now = (value ? onwards.find((place) => !(rows[place].name in state.ratings)) : number) ?? number;
  say(questions.every(isDone) ? 'All questions are rated. Export the CSV and send it to whoever gave you this page.' : '');
  keep();
  draw();
  rows[now].node.scrollIntoView({ block: 'nearest' });
  if (value && isDone(questions[state.at])) (state.at < questions.length - 1 ? $('next') : $('export')).focus();
}

function line(step) {
  now = Math.min(Math.max(now + step, 0), rows.length - 1);
  draw();
  rows[now].node.scrollIntoView({ block: 'nearest' });
}

function turn(at) {
  show(at);
  keep();
}

function exportRatings() {
  const quoted = `"${state.rater.replaceAll('"', '""')}"`;
  const all = questions.flatMap(names).filter((name) => name in state.ratings);
  const lines = all.map((name) => [page, quoted, ...name.split(' '), state.ratings[name]].join(','));
  const text = ['page,rater,item,aspect,value', ...lines, ''].join('\r\n');
  const link = make('a', { download: `ratings_${page}_${state.rater.replace(/[^\p{L}\p{N}]+/gu, '-')}.csv` });
  link.href = URL.createObjectURL(new Blob([text], { type: 'text/csv' }));
  link.click();
  URL.revokeObjectURL(link.href);
  const open = questions.length - questions.filter(isDone).length;
  say(`Exported ${all.length} ratings${open ? `; ${open} questions are not done yet` : '. Thank you!'}`);
}

const keys = {
  ArrowUp: () => line(-1), ArrowDown: () => line(1), ArrowLeft: () => turn(state.at - 1), ArrowRight: () => turn(state.at + 1),
  0: () => rate(now, 0), r: () => { $('reference').open = !$('reference').open; },
  '?': () => { $('guide').open = !$('guide').open; },
};
for (let value = 1; value <= most; value += 1) keys[value] = () => rate(now, value);

addEventListener('keydown', (event) => {
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || !state.rater || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === 'INPUT') return;
  event.preventDefault();
  act();
});
addEventListener('storage', () => { // another tab has rated
  state.ratings = kept(state.rater)?.ratings ?? state.ratings;
  draw();
});

$('most').textContent = most;
$('aspects').append(...aspects.flatMap(({ name, what, levels }) => [make('dt', {}, name),
  make('dd', {}, `${what} ${levels.map((level, rank) => `${rank + 1} ${level}`).join(' · ')}`)]));
$('map').append(...questions.map((_, number) => make('button', { type: 'button', onclick: () => turn(number) }, `${number + 1}`)));
$('who').onsubmit = (event) => {
  event.preventDefault();
  begin(state.rater ? '' : $('rater').value.trim());
};
$('back').onclick = () => turn(state.at - 1);
$('next').onclick = () => turn(state.at + 1);
$('export').onclick = exportRatings;
begin(history.state ?? '');
