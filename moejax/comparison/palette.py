"""Assigns a color to each member, for plots and tables."""

from moejax.comparison.record import Comparison, dense_names, pair_members

FAMILIES = (
  # Each pair has a hue. The dense model is dark, the match bright, and other candidates are pale. The hues of Okabe and
  # Ito are distinguishable with every kind of color vision, and the members of a pair differ in lightness.
  ("#0b3c6b", "#1f8fd8", "#85bde6", "#6aa3cf"),
  ("#8a3200", "#ee7a1c", "#f2b27c", "#d99a66"),
  ("#004d3b", "#00a37a", "#7fcdb7", "#62b39d"),
  ("#5a1846", "#cc6aa5", "#e2add0", "#c792b3"),
  ("#3b3b3b", "#8a8a8a", "#bdbdbd", "#a6a6a6"),
)


def member_colors(comparison: Comparison) -> dict[str, str]:
  """Color by member name."""
  colors = {}
  for i, dense in enumerate(dense_names(comparison)):
    family = FAMILIES[i % len(FAMILIES)]
    others = 0
    for member in pair_members(comparison, dense):
      if member.kind == "dense":
        colors[member.name] = family[0]
      elif member.matched:
        colors[member.name] = family[1]
      else:
        colors[member.name] = family[2 + others % 2]
        others += 1
  return colors
