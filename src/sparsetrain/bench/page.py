"""One self-contained HTML page of all results: tables and plots in the file, nothing to load."""

from __future__ import annotations

import base64
import html
import tempfile
from pathlib import Path

from sparsetrain.bench import report
from sparsetrain.bench.timing import Json

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block;
  overflow-x: auto }
th, td { border: 1px solid #ccc; padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { background: #f3f3f3; padding: 0.5rem 1rem; overflow-x: auto }
img { max-width: 100% }
.missed { color: #b00020; font-weight: bold }
.good { color: #1b6e20 }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd } pre { background: #24272d } img { background: white }
  .missed { color: #ff7b8a } .good { color: #7ccf83 } th, td { border-color: #444 }
}
"""


def render(results: dict[str, Json]) -> str:
    """The page, from the results of `report.load_results`. Needs matplotlib for the plots."""
    headings = {name: heading for name, _, heading in report.RESULTS}
    links = "".join(f'<li><a href="#{name}">{headings[name]}</a></li>' for name in results)
    parts = [f"<h1>Performance of sparsetrain</h1><ul>{links}</ul>"]
    with tempfile.TemporaryDirectory() as folder:
        for name, data in results.items():
            parts.append(f'<h2 id="{name}">{headings[name]}</h2>')
            parts.append(f"<pre>{html.escape(data['command'])}</pre>")
            for title, file in report.draw(name, data, Path(folder)):
                image = base64.b64encode((Path(folder) / file).read_bytes()).decode()
                source = f"data:image/png;base64,{image}"
                parts.append(f'<p><img alt="{html.escape(title)}" src="{source}"></p>')
            for heading, text in report.sections(name, data):
                parts.append(f"<h3>{html.escape(heading)}</h3>{from_markdown(text)}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparsetrain: performance</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def from_markdown(text: str) -> str:
    """HTML of what our reports consist of: tables, lists and paragraphs."""
    blocks = []
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("| "):
            blocks.append(_table(lines))
        elif lines[0].startswith("- "):
            items = "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines)
            blocks.append(f"<ul>{items}</ul>")
        else:
            blocks.append(f"<p>{html.escape(' '.join(lines))}</p>")
    return "\n".join(blocks)


def _table(lines: list[str]) -> str:
    def row(line: str, tag: str) -> str:
        cells = [
            cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")
        ]
        return "<tr>" + "".join(_cell(cell, tag) for cell in cells) + "</tr>"

    body = "\n".join(row(line, "td") for line in lines[2:])
    return f"<table><thead>{row(lines[0], 'th')}</thead><tbody>{body}</tbody></table>"


def _cell(text: str, tag: str) -> str:
    kinds = {"MISSED": "missed", "wrong": "missed", "crashed": "missed", "aim": "good"}
    mark = f' class="{kinds[text]}"' if tag == "td" and text in kinds else ""
    return f"<{tag}{mark}>{html.escape(text)}</{tag}>"
