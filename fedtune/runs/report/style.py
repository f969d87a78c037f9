"""The stylesheet of report.html: one column on phones, two on desktops; follows the light or dark setting; color-blind-safe hues."""

CSS = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1b1c1e; --soft: #5b5f66; --muted: #9a9da3; --rule: #e3e3df;
  --s1: #2a78d6; --s2: #eb6834; --s3: #1baf7a; --s4: #eda100; --s5: #e87ba4; --s6: #008300; --s7: #4a3aa7; --s8: #e34948;
  --good: #0b7a45; --bad: #b3352c; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #ececea; --soft: #a7abb2; --muted: #777b82;
  --rule: #32353a;  --s1: #3987e5; --s2: #d95926; --s3: #199e70; --s4: #c98500; --s5: #d55181; --s6: #2f9e2f; --s7: #9085e9; --s8: #e66767;
  --good: #4cc38a; --bad: #f0776c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 12px; }
h3 { font-size: 0.95rem; margin: 0 0 4px; }
p { margin: 4px 0; }
.soft, figcaption { color: var(--soft); font-size: 0.86rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(178px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px;
  margin: 0; }
.tile b { display: block; font-size: 1.2rem; line-height: 1.4; font-weight: 650; overflow-wrap: anywhere; }
.tile.main { border-left: 4px solid var(--s1); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; align-items: start; }
figure { min-width: 0; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
svg text.small { font-size: 11.5px; } svg text.strong { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; fill: none; } svg .axis { stroke: var(--muted); stroke-width: 1; fill: none; }
svg .dot { stroke: var(--card); stroke-width: 0.8; }
svg .mean { stroke: var(--ink); stroke-width: 2; fill: none; } svg .mean.before { stroke: var(--muted); stroke-dasharray: 3 3; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 0.86rem; color: var(--soft); }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 7em; }
tr:last-child td { border-bottom: 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.86em; white-space: pre-wrap; }
@media (max-width: 560px) {
  .tiles { grid-template-columns: 1fr 1fr; } .tile.main { grid-column: 1 / -1; }
  svg text { font-size: 16px; } svg text.small { font-size: 14px; } th, td { padding: 5px 6px; }
  .answers thead { display: none; } .answers tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--rule); }
  .answers td { display: block; border: 0; padding: 2px 0; } .answers td::before { content: attr(data-name) ": "; color: var(--soft); }
}
details summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: 8px; }
"""
