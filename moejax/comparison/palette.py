"""Colors of the report: of the page, in light and dark, and of each member, for plots and tables."""

from collections.abc import Mapping

from moejax.comparison.record import Comparison, dense_names, pair_members

LIGHT = {
  "page": "#f6f7f9", "card": "#ffffff", "ink": "#1c2126", "muted": "#56606a", "line": "#dde1e6", "axis": "#8b939c",
  "accent": "#0b5fa5", "good": "#0b6b4f", "good-soft": "#dcf2ea", "warn": "#8a4b00", "warn-soft": "#fdeed8",
  "band": "#c9d3dd",
}  # fmt: skip
DARK = {
  "page": "#14171a", "card": "#1d2126", "ink": "#e6e9ec", "muted": "#a9b2bb", "line": "#353b42", "axis": "#6d757e",
  "accent": "#7cc0f4", "good": "#7fdcbb", "good-soft": "#163a2f", "warn": "#f5c07a", "warn-soft": "#43301a",
  "band": "#3f4852",
}  # fmt: skip

FAMILIES = (
  # Each pair has a hue: its dense model, the match, and other candidates, on a light and on a dark page. The hues of
  # Okabe and Ito are distinguishable with every kind of color vision, and the members of a pair differ in lightness.
  (("#0b3c6b", "#1f7fd0", "#4f8fb8", "#6d83c9"), ("#cfe4ff", "#5cb0ff", "#7fa8cc", "#98a2ea")),
  (("#8a3200", "#d9640c", "#b5803f", "#c0705a"), ("#ffd9bd", "#ff9a4d", "#d1a36a", "#dd9480")),
  (("#004d3b", "#0a8f6c", "#5a9440", "#3f8f95"), ("#bff0dd", "#3fcf9f", "#93c47a", "#7cc4c9")),
  (("#5a1846", "#b8559a", "#9a6fb0", "#c46a8a"), ("#f3cfe6", "#ee8fcb", "#c3a0dc", "#e79bb5")),
  (("#3b3b3b", "#757575", "#8a8a8a", "#7f8a94"), ("#e6e6e6", "#b5b5b5", "#9f9f9f", "#aab6c2")),
)

LAYERS = ("#5b74c4", "#2191a0", "#3f9a5a", "#9a8420", "#c8642a", "#b9559a")
"""Colors of layers, from the first to the last. They are legible on both pages."""


def member_colors(comparison: Comparison) -> dict[str, str]:
  """Color by member name, as a variable that `variables` defines for each theme."""
  return {member.name: f"var(--member-{i})" for i, member in enumerate(comparison.members)}


def variables(comparison: Comparison, dark: bool = False) -> dict[str, str]:
  """Colors by variable name: those of the page, and member-0, member-1 and so on for the members."""
  places = {member.name: i for i, member in enumerate(comparison.members)}
  colors = dict(DARK if dark else LIGHT)
  for i, dense in enumerate(dense_names(comparison)):
    family = FAMILIES[i % len(FAMILIES)][dark]
    others = 0
    for member in pair_members(comparison, dense):
      if member.kind == "dense" or member.matched:
        color = family[member.kind != "dense"]
      else:
        # Two colors are made for other candidates. Further ones are shades of these.
        color = _mixed(family[2 + others % 2], colors["ink"], 0.3 * (others // 2))
        others += 1
      colors[f"member-{places[member.name]}"] = color
  return colors


def layer_colors(layers: int) -> list[str]:
  """A color for each layer, in order."""
  if layers == 1:
    return [LAYERS[0]]
  colors = []
  for i in range(layers):
    at = i * (len(LAYERS) - 1) / (layers - 1)
    low = min(int(at), len(LAYERS) - 2)
    colors.append(_mixed(LAYERS[low], LAYERS[low + 1], at - low))
  return colors


def resolve(text: str, colors: Mapping[str, str]) -> str:
  """Replaces var(--NAME) in `text` by the color with this name."""
  for name, color in colors.items():
    text = text.replace(f"var(--{name})", color)
  return text


def _mixed(one: str, other: str, part: float) -> str:
  """The color `one` with this part of `other`."""
  part = min(part, 0.9)
  channels = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (one, other)]
  return "#" + "".join(f"{round(a * (1 - part) + b * part):02x}" for a, b in zip(*channels, strict=True))
