"""Draw a comparison as an SVG: reward against KL, with 95 % intervals.

    python scripts/plot_comparison.py rlhf_home/reports/demo/results.json docs/demo.svg

The figure needs nothing but the results.json that `rlhf compare` or `rlhf run` writes.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 44, 56
COLOURS = {"sft": "#6b7280", "ppo": "#2563eb", "dpo": "#d97706", "best-of-n": "#059669"}
NAMES = {"true_reward": "true reward", "score": "reward-model score"}


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers between two values."""
    span = high - low
    step = next(size for size in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if span / size <= 7)
    first = -(-low // step)
    return [round((first + i) * step, 6) for i in range(int((high - first * step) // step) + 1)]


def draw(results: dict) -> str:
    """The SVG text of a comparison."""
    primary = results["primary"]
    points = []
    for row in results["rows"]:
        reward, kl = row["metrics"][primary], row["metrics"].get("kl")
        bound = row.get("kl_bound")
        if (kl is None and bound is None) or row.get("step") is not None:  # snapshots are in the report
            continue
        x = (bound, bound, bound) if kl is None else (kl["mean"], kl["low"], kl["high"])
        points.append((row["name"], row["stage"], x, (reward["mean"], reward["low"], reward["high"]), kl is None))
    right = max(x[2] for _, _, x, _, _ in points) * 1.25 + 0.1
    low = min(y[1] for _, _, _, y, _ in points)
    high = max(y[2] for _, _, _, y, _ in points)
    low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)

    def px(value: float) -> float:
        return LEFT + value / right * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    title = (
        f"{results['prompts']} {results['split']} prompts x {results['samples']} samples, 95 % intervals over prompts"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" fill="#111827" font-size="14">{escape(results["name"])}: {escape(title)}</text>',
    ]
    for value in ticks(0, right):
        parts.append(
            f'<line x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e5e7eb"/>'
        )
        parts.append(
            f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#374151">{value:g}</text>'
        )
    for value in ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(value):.1f}" y2="{py(value):.1f}" stroke="#e5e7eb"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{py(value) + 4:.1f}" text-anchor="end" fill="#374151">{value:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#111827">'
        f"KL to {escape(str(results['reference']))}, nats per response (best-of-n: upper bound)</text>"
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="18" y="{middle}" text-anchor="middle" fill="#111827" transform="rotate(-90 18 {middle})">'
        f"{escape(NAMES[primary])}</text>"
    )
    for name, stage, x, y, is_bound in points:
        colour = COLOURS.get(stage, "#111827")
        cx, cy = px(x[0]), py(y[0])
        parts.append(f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{py(y[1]):.1f}" y2="{py(y[2]):.1f}" stroke="{colour}"/>')
        if not is_bound:
            parts.append(
                f'<line x1="{px(x[1]):.1f}" x2="{px(x[2]):.1f}" y1="{cy:.1f}" y2="{cy:.1f}" stroke="{colour}"/>'
            )
        fill = "#ffffff" if is_bound else colour
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>')
        below = 18 if is_bound else -8
        parts.append(f'<text x="{cx + 10:.1f}" y="{cy + below:.1f}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Read results.json, write the SVG."""
    if len(sys.argv) != 3:
        sys.exit("usage: plot_comparison.py RESULTS.json OUT.svg")
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
