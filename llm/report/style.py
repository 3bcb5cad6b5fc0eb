"""How a page looks: light and dark, on a screen and on paper."""

from __future__ import annotations

CSS = """\
:root {
  color-scheme: light dark;
  --page: #ffffff;
  --ink: #1c1f23;
  --soft: #5c6670;
  --line: #d5dae0;
  --shade: #f4f6f8;
  --good: #00694f;
  --bad: #a83f00;
  --warn: #fff4d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c;
    --ink: #e4e7ea;
    --soft: #9aa4ae;
    --line: #353c44;
    --shade: #1f242a;
    --good: #4fd0ac;
    --bad: #ff9a5c;
    --warn: #43380f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0;
  background: var(--page);
  color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.2rem;
  margin: 2.5rem 0 0.75rem;
  border-bottom: 1px solid var(--line);
  padding-bottom: 0.25rem;
}
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.08rem; }
.note { color: var(--soft); font-size: 0.9rem; }
.banner { background: var(--warn); border-left: 4px solid #e69f00; padding: 0.5rem 0.75rem; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: 0.28rem 0.9em 0.28rem 0;
  text-align: left;
  vertical-align: baseline;
  border-bottom: 1px solid var(--line);
}
thead th {
  color: var(--soft);
  font-weight: 600;
  border-bottom-width: 2px;
}
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; }
td.number, td.short, tbody th.short { white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 3.2rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { display: block; max-width: max(100%, 34rem); height: auto; fill: currentColor; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 46rem; margin-top: 0.4rem; }
.pair figure { flex: 1 1 24rem; min-width: 0; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2rem; }
pre {
  background: var(--shade);
  padding: 0.75rem;
  font-size: 0.8rem;
  line-height: 1.45;
  overflow-x: auto;
  white-space: pre-wrap;
  overflow-wrap: anywhere;
}
summary { cursor: pointer; color: var(--soft); }
@media print {
  :root {
    --page: #ffffff;
    --ink: #000000;
    --soft: #444444;
    --line: #bbbbbb;
    --shade: #f4f4f4;
    --good: #00694f;
    --bad: #a83f00;
    --warn: #ffffff;
    color-scheme: light;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide, figure { overflow: visible; }
  figure svg { max-width: 100%; }
  table { font-size: 7.5pt; }
  details:not([open]) { display: none; }
  @page { margin: 16mm; }
}
"""
