"""Draws docs/accuracy.svg: the accuracy that networks keep over the MACs that they keep, refined most."""

from __future__ import annotations

from html import escape

from tables import NETWORKS, ROOT, most_refined

from rankfold.reports.page.pictures import Axis

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 56, 24, 34, 48
FEWEST, LEAST = 0.15, 0.4
"""Where the axes begin: the share of MACs, and of the accuracy."""
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #333 } path, polyline { fill: none } .grid { stroke: #8884 }
polyline { stroke-width: 2.5 } circle { stroke: none }
.s0 { stroke: #0b6e99; fill: #0b6e99 } .s1 { stroke: #a23b72; fill: #a23b72 }
.s2 { stroke: #c26a00; fill: #c26a00 } .s3 { stroke: #2f7d32; fill: #2f7d32 }
polyline.s0, polyline.s1, polyline.s2, polyline.s3 { fill: none } text.s0, text.s1, text.s2, text.s3 { stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .s0 { stroke: #5cc4ee; fill: #5cc4ee } .s1 { stroke: #f08bc0; fill: #f08bc0 }
  .s2 { stroke: #ffb454; fill: #ffb454 } .s3 { stroke: #86d78a; fill: #86d78a }
}
"""


def main() -> None:
    """Writes the picture."""
    across = Axis(FEWEST, 1.0, LEFT, WIDTH - RIGHT)
    up = Axis(LEAST, 1.0, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Top-1 accuracy over the MACs that are kept, both of the original's</title>",
        f"<style>{STYLE}</style>",
        f'<text x="8" y="{TOP - 16}">top-1, of the original’s</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">MACs kept</text>',
    ]
    for tick in range(round(100 * LEAST), 101, 10):
        at = up.place(tick / 100)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 5:.1f}" text-anchor="end">{tick} %</text>')
    for tick in range(20, 101, 10):
        at = across.place(tick / 100)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick} %</text>')
    for number, (model, name) in enumerate(NETWORKS.items()):
        kept = [(one["macs_kept"], one["top1"] / one["base_top1"]) for one in most_refined(model)]
        points = [(across.place(x), up.place(y)) for x, y in (*kept, (1.0, 1.0)) if y >= LEAST]
        parts.append(f'<polyline class="s{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        parts += [f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        x, y = points[0]
        left, high, anchor = (x - 9, y + 5, "end") if x > WIDTH / 4 else (x + 9, y + 16, "start")
        parts.append(
            f'<text class="s{number}" x="{left:.1f}" y="{high:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    (ROOT / "docs" / "accuracy.svg").write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
