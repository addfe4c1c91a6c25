"""The template of `html`: Python text, so that a wheel carries it like any module."""

from __future__ import annotations

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0;
  --band: #f4f6f8; --link: #0b5cad; --warn: #fff4d6; --warn-edge: #c98a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e3e8ee; --soft: #9aa5b1; --line: #343c46;
    --band: #1c222a; --link: #7cb8ff; --warn: #33290f; --warn-edge: #d9a320;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { max-width: 60rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0;
  padding: 0; list-style: none; font-size: .9rem; }
.warn { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: .5rem .75rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { background: var(--band); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.patch { display: inline-block; width: 1.6em; height: 1em; margin-right: .5em; vertical-align: -.12em;
  border: 1px solid var(--line); }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.gallery { display: flex; flex-wrap: wrap; gap: 1rem; }
.gallery figure { margin: 0; width: 9.5rem; }
.gallery img { display: block; border: 1px solid var(--line); background: var(--band); }
@media print { nav { display: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
</style>
</head>
<body>
{% macro picture(item) %}
<picture>
{% if item.dark %}
<source media="(prefers-color-scheme: dark)" srcset="{{ item.dark }}">
{% endif %}
<img src="{{ item.light }}" alt="{{ item.alt }}">
</picture>
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<nav aria-label="Contents"><ul>
{% for section in sections %}
<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{% endfor %}
</ul></nav>
</header>
<main>
{% for section in sections %}
<section>
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% for block in section.blocks %}
{% if block.kind == "note" %}
<p{% if block.warn %} class="warn"{% endif %}>{{ block.text }}</p>
{% elif block.kind == "table" %}
<div class="wide"><table>
{% if block.caption %}
<caption>{{ block.caption }}</caption>
{% endif %}
<thead><tr>
{% for cell in block.header %}
<th scope="col"{% if loop.index0 >= block.text_columns %} class="number"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index0 >= block.text_columns %} class="number"{% endif %}>
{%- if cell is string %}{{ cell }}{% else -%}
<span class="patch" style="background: {{ cell.colour }}"></span>{{ cell.text }}{% endif -%}
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% elif block.kind == "picture" %}
<figure>
{{ picture(block) }}
{% if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{% endif %}
</figure>
{% else %}
{% if block.caption %}
<p>{{ block.caption }}</p>
{% endif %}
<div class="gallery">
{% for item in block.items %}
<figure>
{{ picture(item) }}
<figcaption>{{ item.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
