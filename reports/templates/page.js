"use strict";

// -- what the page holds ------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);
const block = (id) => JSON.parse(byId(id).textContent);
const page = block("page"); // names, protocols and recorded scores, but no keypoint
const arrays = { f4: Float32Array, u4: Uint32Array, i1: Int8Array };
const loaded = new Map();
let pictures = null;

async function unpack(value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
  if (!("packed" in value)) {
    const entries = Object.entries(value).map(async ([key, part]) => [key, await unpack(part)]);
    return Object.fromEntries(await Promise.all(entries));
  }
  const bytes = Uint8Array.from(atob(value.data), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  if (value.packed === "json") return JSON.parse(new TextDecoder().decode(buffer));
  return new arrays[value.packed](buffer);
}

function load(id) {
  if (!loaded.has(id)) loaded.set(id, unpack(block(id)));
  return loaded.get(id);
}

const loadGround = (number) => load(`ground-${number}`);
const loadCell = (number) => load(`cell-${number}`);

function picture(number) {
  if (number === null) return null;
  pictures ??= block("pictures");
  return `data:image/jpeg;base64,${pictures[number]}`;
}

// -- scoring, as nemf/scoring.py does it: every step in float32, so that borderline keypoints fall
// -- on the same side ---------------------------------------------------------------------------

const f32 = Math.fround;

/** Errors of all keypoints in the rule's frame; NaN = no answer. */
function errorsOf(ground, cell, rule) {
  const { factors } = ground.rules[rule];
  const { starts, truth } = ground;
  const errors = new Float32Array(truth.length / 2);
  for (let pair = 0; pair + 1 < starts.length; pair++) {
    const fx = factors[2 * pair], fy = factors[2 * pair + 1];
    for (let k = starts[pair]; k < starts[pair + 1]; k++) {
      const dx = f32(f32(cell.pred[2 * k] * fx) - f32(truth[2 * k] * fx));
      const dy = f32(f32(cell.pred[2 * k + 1] * fy) - f32(truth[2 * k + 1] * fy));
      errors[k] = Math.sqrt(f32(f32(dx * dx) + f32(dy * dy)));
    }
  }
  return errors;
}

const limitOf = (ground, rule, alpha, pair) => f32(f32(alpha) * ground.rules[rule].length[pair]);
const isCorrect = (error, limit, inclusive) => (inclusive ? error <= limit : error < limit);

/** Number of correct keypoints of every pair. */
function hitsOf(ground, errors, rule, alpha) {
  const { starts } = ground;
  const { inclusive } = ground.rules[rule];
  const hits = new Uint32Array(starts.length - 1);
  for (let pair = 0; pair < hits.length; pair++) {
    const limit = limitOf(ground, rule, alpha, pair);
    for (let k = starts[pair]; k < starts[pair + 1]; k++) {
      if (isCorrect(errors[k], limit, inclusive)) hits[pair]++;
    }
  }
  return hits;
}

/** The fraction correct over some pairs, or null if there is none. */
function pckOf(ground, hits, pairs, averaging) {
  let top = 0, below = 0;
  for (const pair of pairs) {
    const n = ground.starts[pair + 1] - ground.starts[pair];
    top += averaging === "point" ? hits[pair] : hits[pair] / n;
    below += averaging === "point" ? n : 1;
  }
  return below ? top / below : null;
}

/** Groups as the records name them, "class cat" or "scale 2", and the pairs in each. */
function groupsOf(ground) {
  const groups = new Map([["all all", [...ground.category.keys()]]]);
  const add = (name, pair) => {
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(pair);
  };
  const sorted = (start) => {
    const rest = [...groups].slice(start).sort(([a], [b]) => (a < b ? -1 : 1));
    for (const [name] of rest) groups.delete(name);
    for (const [name, pairs] of rest) groups.set(name, pairs);
  };
  ground.category.forEach((code, pair) => add(`class ${ground.categories[code]}`, pair));
  sorted(1);
  for (const [flag, values] of Object.entries(ground.flags)) {
    const start = groups.size;
    values.forEach((value, pair) => value >= 0 && add(`${flag} ${value}`, pair));
    sorted(start);
  }
  return groups;
}

/** What the record says: [pck, low, high], or null where the rule was not scored. */
function recorded(cell, rule, averaging, alpha, group) {
  const scores = page.cells[cell].scores[rule];
  return scores?.[averaging][group]?.[scores.alphas.indexOf(alpha)] ?? null;
}

// -- building elements --------------------------------------------------------------------------

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const html = (name, attributes = {}, ...children) =>
  build(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1));
const span = (score) =>
  score === null ? "not recorded" : score[1] === null ? "no interval" : `${percent(score[1])}–${percent(score[2])}`;

function numberCell(value, score) {
  if (value === null) return html("td", { class: "number", "data-value": "" }, "–");
  const interval = html("small", {}, span(score));
  return html("td", { class: "number", "data-value": value }, percent(value), interval);
}

function headRow(texts) {
  const heads = texts.map((text, i) =>
    html("th", { scope: "col", class: i ? "number" : null, "aria-sort": "none" }, html("button", { type: "button" }, text)));
  return html("thead", {}, html("tr", {}, ...heads));
}

/** Options of a select; keeps the choice if it is still there. */
function offer(id, options, preferred) {
  const select = byId(id);
  const values = options.map(([value]) => String(value));
  const wanted = [select.value, String(preferred)].find((value) => values.includes(value));
  select.replaceChildren(...options.map(([value, text]) => html("option", { value }, text)));
  select.value = wanted ?? values[0];
}

// -- what is chosen -----------------------------------------------------------------------------

const hidden = new Set(); // methods whose bars are switched off

function choice() {
  const value = (id) => byId(id).value;
  const dataset = page.datasets[value("dataset")];
  const ground = dataset.rules[value("rule")].ground;
  const cells = [...page.cells.keys()].filter((i) => page.cells[i].ground === ground);
  return {
    dataset, rule: value("rule"), averaging: value("averaging"), alpha: Number(value("alpha")),
    groundNumber: ground, cells,
  };
}

function offerRules() {
  const dataset = page.datasets[byId("dataset").value];
  offer("rule", Object.keys(dataset.rules).map((rule) => [rule, rule]), dataset.first_rule);
  const last = dataset.alphas[dataset.alphas.length - 1];
  const preferred = dataset.alphas.includes(page.first_alpha) ? page.first_alpha : last;
  offer("alpha", dataset.alphas.map((alpha) => [alpha, alpha]), preferred);
}

// -- scores and chart ---------------------------------------------------------------------------

function drawScores(chosen, ground, scored) {
  const { dataset, rule, averaging } = chosen;
  const everything = groupsOf(ground).get("all all");
  const rows = scored.map(({ number, errors }) => {
    let check = "no record";
    const cells = dataset.alphas.map((alpha) => {
      const value = pckOf(ground, hitsOf(ground, errors, rule, alpha), everything, averaging);
      const score = recorded(number, rule, averaging, alpha, "all all");
      if (score !== null && check !== "differs") {
        check = Math.abs(score[0] - value) <= 1e-6 ? "equal" : "differs";
      }
      return numberCell(value, score);
    });
    return html("tr", {}, html("th", { scope: "row" }, page.cells[number].method), ...cells, html("td", {}, check));
  });
  const heads = headRow(["Method", ...dataset.alphas.map((alpha) => `@${alpha}`), "Record"]);
  heads.rows[0].cells[dataset.alphas.length + 1].className = "";
  byId("scores").replaceChildren(heads, html("tbody", {}, ...rows));
  byId("description").textContent = `${dataset.rules[rule].description}; per-${averaging} mean.`;
  const here = new Set(chosen.cells.map((i) => page.cells[i].method));
  const others = page.cells.filter((cell) => page.datasets[cell.dataset] === dataset && !here.has(cell.method));
  const absent = [...new Set(others.map((cell) => cell.method))];
  const notes = absent.length ? [`Predicted under another plan, so not here: ${absent.join(", ")}.`] : [];
  for (const [name, reason] of Object.entries(dataset.unscorable)) notes.push(`${name}: ${reason}.`);
  byId("plan-note").textContent = notes.join(" ");
}

function offerGroups(ground) {
  const flags = Object.keys(ground.flags).map((flag) => [flag, `difficulty: ${flag}`]);
  offer("groups", [["class", "classes"], ...flags], "class");
}

function seriesClass(number) {
  return `bar series-${number % 8}${number >= 8 ? " again" : ""}`;
}

function drawSeries(chosen) {
  const labels = chosen.cells.map((number, i) => {
    const method = page.cells[number].method;
    const box = html("input", { type: "checkbox", id: `series-${i}` });
    box.checked = !hidden.has(method);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(method); else hidden.add(method);
      render();
    });
    const swatch = svg("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" },
      svg("rect", { x: 1, y: 1, width: 20, height: 10, class: seriesClass(i) }));
    return html("label", { for: `series-${i}` }, box, swatch, method);
  });
  const names = chosen.cells.map((number) => page.cells[number].method).join("\n");
  if (byId("series").dataset.names === names) return; // keeps the focus
  byId("series").dataset.names = names;
  byId("series").replaceChildren(html("legend", {}, "Methods"), ...labels);
}

function drawChart(chosen, ground, scored) {
  const { rule, averaging, alpha } = chosen;
  const kind = byId("groups").value;
  const groups = [...groupsOf(ground)].filter(([name]) => name === "all all" || name.startsWith(`${kind} `));
  const visible = scored
    .map((entry, i) => ({ ...entry, look: seriesClass(i) }))
    .filter(({ number }) => !hidden.has(page.cells[number].method))
    .map((entry) => ({ ...entry, hits: hitsOf(ground, entry.errors, rule, alpha) }));
  const bars = groups.map(([name, pairs]) => ({
    name: name === "all all" ? "all pairs" : kind === "class" ? name.slice(6) : name,
    pairs: pairs.length,
    values: visible.map(({ number, hits }) => ({
      value: pckOf(ground, hits, pairs, averaging),
      score: recorded(number, rule, averaging, alpha, name),
    })),
  }));
  byId("chart-heading").textContent = `PCK@${alpha} by ${kind === "class" ? "class" : kind}`;
  byId("chart").replaceChildren(chartSvg(bars, visible, `PCK at alpha ${alpha} under ${rule}`));
  const rows = bars.map(({ name, pairs, values }) =>
    html("tr", {}, html("th", { scope: "row" }, name), html("td", { class: "number", "data-value": pairs }, pairs),
      ...values.map(({ value, score }) => numberCell(value, score))));
  const heads = [kind === "class" ? "Class" : "Difficulty", "Pairs", ...visible.map(({ number }) => page.cells[number].method)];
  byId("chart-table").replaceChildren(headRow(heads), html("tbody", {}, ...rows));
}

function chartSvg(bars, visible, title) {
  const width = Math.max(260, byId("chart").clientWidth);
  const left = Math.min(130, Math.round(width * 0.3)), right = width - 14;
  const thick = visible.length > 4 ? 7 : 9, gap = 12, top = 22;
  const groupHeight = Math.max(16, visible.length * thick) + gap;
  const height = top + bars.length * groupHeight;
  const x = (value) => left + value * (right - left);
  const label = `${title}: bars with intervals; the numbers are in the table below`;
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    chart.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top - 4, y2: height }),
      svg("text", { class: "soft", x: x(tick), y: 12, "text-anchor": "middle" }, `${100 * tick}`));
  }
  bars.forEach(({ name, pairs, values }, g) => {
    const y = top + g * groupHeight + gap / 2;
    const middle = y + (groupHeight - gap) / 2 + 4;
    const short = name.length * 7 > left ? `${name.slice(0, Math.floor(left / 7) - 1)}…` : name;
    chart.append(svg("text", { x: left - 8, y: middle, "text-anchor": "end" }, short, svg("title", {}, `${name}: ${pairs} pairs`)));
    values.forEach(({ value, score }, i) => {
      const method = page.cells[visible[i].number].method;
      const text = `${name}, ${method}: ${percent(value)} (${span(score)})`;
      const centre = y + (i + 0.5) * thick;
      chart.append(svg("rect", { class: visible[i].look, x: left, y: y + i * thick, width: Math.max(0, x(value) - left), height: thick - 1 },
        svg("title", {}, text)));
      if (score !== null && score[1] !== null) {
        const [low, high] = [x(score[1]), x(score[2])];
        chart.append(svg("path", { class: "interval", d: `M${low} ${centre - 3}v6m0-3H${high}m0-3v6` }));
      }
    });
  });
  return chart;
}

// -- pairs --------------------------------------------------------------------------------------

function offerPairs(chosen, ground) {
  const methods = chosen.cells.map((number) => page.cells[number].method);
  offer("method", methods.map((method) => [method, method]), chosen.dataset.first_method);
  const used = [...new Set(ground.category)].map((code) => ground.categories[code]).sort();
  offer("category", [["", "all classes"], ...used.map((name) => [name, name])], "");
  const flags = Object.entries(ground.flags).map(([flag, values]) =>
    [flag, [...new Set(values)].filter((value) => value >= 0).sort()]);
  if (byId("flags").dataset.offered === JSON.stringify(flags)) return; // keeps the choice
  byId("flags").dataset.offered = JSON.stringify(flags);
  byId("flags").replaceChildren(...flags.map(([flag, values]) => {
    const options = [["", "any"], ...values.map((value) => [value, value])];
    const select = html("select", { id: `flag-${flag}` }, ...options.map(([value, text]) => html("option", { value }, text)));
    select.addEventListener("change", render);
    return html("label", { for: `flag-${flag}` }, flag, select);
  }));
}

function filtered(ground) {
  const category = byId("category").value;
  const wanted = Object.keys(ground.flags).map((flag) => [ground.flags[flag], byId(`flag-${flag}`).value]);
  return [...ground.category.keys()].filter((pair) =>
    (category === "" || ground.categories[ground.category[pair]] === category) &&
    wanted.every(([values, value]) => value === "" || values[pair] === Number(value)));
}

/** Pairs in the order asked for; equal fractions by the distance in units of the length. */
function ranked(ground, errors, chosen, kind) {
  const pairs = filtered(ground);
  if (kind === "random") {
    const place = new Uint32Array(ground.order.length);
    ground.order.forEach((pair, i) => { place[pair] = i; });
    return pairs.sort((a, b) => place[a] - place[b]);
  }
  const hits = hitsOf(ground, errors, chosen.rule, chosen.alpha);
  const { length } = ground.rules[chosen.rule];
  const score = new Map(pairs.map((pair) => {
    let distance = 0;
    const [start, stop] = [ground.starts[pair], ground.starts[pair + 1]];
    for (let k = start; k < stop; k++) distance += errors[k] < length[pair] ? errors[k] / length[pair] : 1;
    return [pair, [hits[pair] / (stop - start), distance / (stop - start)]];
  }));
  const sign = kind === "best" ? 1 : -1;
  return pairs.sort((a, b) => {
    const [[hitA, farA], [hitB, farB]] = [score.get(a), score.get(b)];
    return sign * (hitB - hitA || farA - farB || a - b);
  });
}

function drawPairs(chosen, ground, scored) {
  const method = byId("method").value;
  const entry = scored.find(({ number }) => page.cells[number].method === method);
  const order = ranked(ground, entry.errors, chosen, byId("kind").value);
  const shown = order.slice(0, page.shown);
  byId("pairs-status").textContent = shown.length ? `${shown.length} of ${order.length} pairs` : "No pair is like that.";
  byId("pairs").replaceChildren(...shown.map((pair) => pairFigure(chosen, ground, entry, pair)));
}

function pairFigure(chosen, ground, { cell, errors }, pair) {
  const { rule, alpha } = chosen;
  const { factors, length, inclusive } = ground.rules[rule];
  const limit = limitOf(ground, rule, alpha, pair);
  const at = (points, k) => [points[2 * k], points[2 * k + 1]];
  const points = [];
  for (let k = ground.starts[pair]; k < ground.starts[pair + 1]; k++) {
    points.push({
      label: points.length + 1, name: ground.names[ground.name[k]], query: at(ground.queries, k),
      truth: at(ground.truth, k), pred: at(cell.pred, k), error: errors[k],
      correct: isCorrect(errors[k], limit, inclusive),
    });
  }
  const radii = [limit / factors[2 * pair], limit / factors[2 * pair + 1]];
  const [query, reference] = [ground.images[ground.query[pair]], ground.images[ground.reference[pair]]];
  const right = points.filter((point) => point.correct).length;
  const unanswered = points.filter((point) => Number.isNaN(point.error)).map((point) => point.label);
  const flags = Object.entries(ground.flags).map(([flag, values]) => `${flag} ${values[pair] < 0 ? "–" : values[pair]}`);
  const facts = [ground.categories[ground.category[pair]], ...flags];
  if (unanswered.length) facts.push(`no answer: ${unanswered.join(", ")}`);
  return html("figure", { "data-pair": pair },
    html("div", { class: "pictures" },
      overlay(query, `query image with ${points.length} points`, (frame, mark) => points.forEach((point) => drawQuery(frame, mark, point))),
      overlay(reference, `reference image: ${right} of ${points.length} predictions correct`, (frame, mark) => drawAnswers(frame, mark, points, radii))),
    html("figcaption", {}, html("strong", {}, `${right} of ${points.length} correct`), html("span", {}, facts.join(" · ")),
      html("span", {}, ground.ids[pair]), html("span", {}, `${query.name} → ${reference.name}`)),
    keypointTable(points, limit, length[pair]));
}

/** An image in its own pixels, pixel centres at integers, and what ``draw`` puts on it. */
function overlay(image, label, draw) {
  const { width, height } = image;
  const source = picture(image.picture);
  const ground = { x: -0.5, y: -0.5, width, height };
  const frame = svg("svg", { class: "overlay", viewBox: `-0.5 -0.5 ${width} ${height}`, role: "img", "aria-label": label },
    source === null ? svg("rect", { ...ground, class: "plain" }) : svg("image", { ...ground, href: source, preserveAspectRatio: "none" }));
  draw(frame, Math.max(width, height) / 48);
  return frame;
}

/** A shape twice: a light halo, then itself, so that it shows on any picture. */
function twice(frame, name, attributes, look, halo = "halo") {
  frame.append(svg(name, { ...attributes, class: halo }), svg(name, { ...attributes, class: look }));
}

function numberAt(frame, mark, [x, y], label) {
  frame.append(svg("text", { x: x + 1.3 * mark, y: y - 0.9 * mark, "font-size": 2.6 * mark, "stroke-width": 0.6 * mark }, label));
}

function drawQuery(frame, mark, { query, label }) {
  twice(frame, "circle", { cx: query[0], cy: query[1], r: mark }, "query");
  numberAt(frame, mark, query, label);
}

function drawAnswers(frame, mark, points, [rx, ry]) {
  for (const { truth } of points) {
    twice(frame, "ellipse", { cx: truth[0], cy: truth[1], rx, ry }, "threshold", "halo thin");
  }
  for (const { truth, pred, error, correct } of points) {
    if (Number.isNaN(error)) continue;
    const line = { x1: truth[0], y1: truth[1], x2: pred[0], y2: pred[1] };
    twice(frame, "line", line, `link ${correct ? "right" : "wrong"}`, "halo thin");
  }
  for (const { truth, pred, error, correct, label } of points) {
    twice(frame, "circle", { cx: truth[0], cy: truth[1], r: 0.8 * mark }, "truth");
    if (!Number.isNaN(error)) {
      const [x, y] = pred;
      const arm = 0.8 * mark;
      if (correct) twice(frame, "circle", { cx: x, cy: y, r: 0.5 * mark }, "right");
      else twice(frame, "path", { d: `M${x - arm} ${y - arm}l${2 * arm} ${2 * arm}m0 ${-2 * arm}l${-2 * arm} ${2 * arm}` }, "wrong");
    }
    numberAt(frame, mark, truth, label);
  }
}

function keypointTable(points, limit, length) {
  const rows = points.map(({ label, name, error, correct }) =>
    html("tr", {}, html("th", { scope: "row" }, `${label} (${name})`),
      html("td", { class: "number" }, Number.isNaN(error) ? "no answer" : error.toFixed(1)),
      html("td", {}, correct ? "correct" : "wrong")));
  const heads = html("tr", {}, ...["Keypoint", "Error", "Verdict"].map((text, i) => html("th", { scope: "col", class: i === 1 ? "number" : null }, text)));
  return html("details", {}, html("summary", {}, "Keypoints"),
    html("p", { class: "hint" }, `In the scoring frame: length ${length.toFixed(1)}, threshold ${limit.toFixed(1)}.`),
    html("table", {}, html("thead", {}, heads), html("tbody", {}, ...rows)));
}

// -- together -----------------------------------------------------------------------------------

let turn = 0;
let redrawChart = () => {};

async function render() {
  const mine = ++turn;
  const chosen = choice();
  const ground = await loadGround(chosen.groundNumber);
  const cells = await Promise.all(chosen.cells.map(loadCell));
  if (mine !== turn) return; // something else was chosen meanwhile
  const scored = chosen.cells.map((number, i) => ({ number, cell: cells[i], errors: errorsOf(ground, cells[i], chosen.rule) }));
  offerGroups(ground);
  offerPairs(chosen, ground);
  drawScores(chosen, ground, scored);
  drawSeries(chosen);
  redrawChart = () => drawChart(chosen, ground, scored);
  redrawChart();
  drawPairs(chosen, ground, scored);
  document.body.dataset.rendered = turn;
}

offer("dataset", Object.entries(page.datasets).map(([name, { title }]) => [name, title]));
offerRules();
byId("averaging").value = page.averaging;
byId("dataset").addEventListener("change", () => { offerRules(); render(); });
for (const id of ["rule", "averaging", "alpha", "groups", "method", "kind", "category"]) {
  byId(id).addEventListener("change", render);
}
let chartWidth = 0;
new ResizeObserver(([entry]) => {
  if (Math.abs(entry.contentRect.width - chartWidth) < 1) return;
  chartWidth = entry.contentRect.width;
  redrawChart();
}).observe(byId("chart"));
render();
