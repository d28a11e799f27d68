"""Style and behaviour of the page: light and dark, no fonts or scripts from elsewhere."""

#: Colour of every phase, readable on white and on black.
PHASE_COLOURS = {
    "ids": "#4e79a7", "prefetch": "#499894", "read": "#59a14f", "rows": "#f28e2b",
    "pool": "#d7b224", "grads": "#b07aa1", "update": "#e15759", "dense": "#9aa0a6",
    "overhead": "#6d6f73"}
#: Colour of what memory is used for.
USE_COLOURS = {
    "tables": "#4e79a7", "state": "#f28e2b", "cache": "#499894", "buffers": "#d7b224",
    "dense": "#9aa0a6"}

STYLE = """
:root { color-scheme: light dark; --fg: #1c1e21; --soft: #5f6368; --bg: #ffffff; --card: #f5f6f8;
  --line: #dadce0; --track: #e8eaed; --mark: #c5221f; --link: #1a73e8; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8eaed; --soft: #9aa0a6; --bg: #17181b;
  --card: #222428; --line: #3c4043; --track: #2e3136; --mark: #f28b82; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 24px 64px; }
h1 { font-size: 24px; font-weight: 600; margin: 0 0 4px; }
h2 { font-size: 17px; font-weight: 600; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 90ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin: 20px 0; }
.card { background: var(--card); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 12.5px; }
.warn { border-left: 4px solid var(--mark); background: var(--card); padding: 8px 12px;
  border-radius: 4px; margin: 8px 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0 12px; font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px;
  margin-right: 6px; vertical-align: -1px; }
.bars { display: grid; gap: 3px 10px;
  grid-template-columns: max-content 1fr max-content max-content;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars span { white-space: nowrap; font-size: 12.5px; }
.bars .value { text-align: right; }
.bars .soft { color: var(--soft); }
svg.bar { display: block; width: 100%; height: 15px; background: var(--track);
  border-radius: 3px; }
svg.columns { display: block; width: 100%; height: 230px; background: var(--card);
  border-radius: 3px; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px; }
.map { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: 8px; }
.map text { fill: var(--fg); font-size: 11px; }
.map .soft { fill: var(--soft); }
.map .cell { fill: #e15759; }
.map .empty { fill: var(--track); }
.limit { stroke: var(--mark); stroke-width: 2; vector-effect: non-scaling-stroke; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 5px 16px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--bg); font-weight: 600; white-space: nowrap; }
th[data-key] { cursor: pointer; }
th[data-key]:hover { color: var(--link); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { font-weight: 600; overflow-wrap: anywhere; min-width: 90px; }
td.why { color: var(--soft); min-width: 220px; }
input { font: inherit; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--bg); color: var(--fg); width: 260px; margin: 4px 0 10px; }
footer { margin-top: 40px; color: var(--soft); font-size: 12.5px; }
"""

#: Sorting by a click on a heading, and a filter over names; the page reads without it.
SCRIPT = """
const body = document.querySelector('#tables tbody');
document.querySelectorAll('#tables th[data-key]').forEach((head, column) => {
  let down = true;
  head.addEventListener('click', () => {
    const value = row => row.children[column].dataset.value ?? row.children[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b), n = Number(x) - Number(y);
      return (Number.isNaN(n) ? x.localeCompare(y) : n) * (down ? -1 : 1);
    });
    down = !down;
    body.append(...rows);
  });
});
document.querySelector('#filter').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase();
  for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
"""
