// -- which rankings are on show: one kind of data and one averaging at a time ---------------------

const sections = [...document.querySelectorAll("section.ranking")];
const chosen = (id) => document.getElementById(id).value;

/** Options of a select, all of them first; keeps the choice if it is still there. */
function offer(id, values, everything) {
  const select = document.getElementById(id);
  const options = [["", everything], ...[...new Set(values)].map((value) => [value, value])];
  const kept = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = options.some(([value]) => value === kept) ? kept : "";
}

function draw() {
  const ofKind = sections.filter((section) => section.dataset.kind === chosen("kind"));
  offer("dataset", ofKind.map((section) => section.dataset.dataset), "all datasets");
  const ofDataset = ofKind.filter(
    (section) => !chosen("dataset") || section.dataset.dataset === chosen("dataset"));
  offer("protocol", ofDataset.map((section) => section.dataset.protocol), "all, each by itself");
  const shown = ofDataset.filter(
    (section) => section.dataset.averaging === chosen("averaging")
      && (!chosen("protocol") || section.dataset.protocol === chosen("protocol")));
  for (const section of sections) section.hidden = !shown.includes(section);
  document.getElementById("status").textContent = `${shown.length} of ${sections.length} rankings`;
  document.body.dataset.rendered = Number(document.body.dataset.rendered ?? 0) + 1;
}

document.getElementById("controls").addEventListener("change", draw);
document.getElementById("controls").hidden = false;
draw();
