"""Builds HTML from elements. Text is escaped unless it is already markup."""

import html

VOID = ("meta", "link", "br")


class Markup(str):
  """A string that is HTML."""

  __slots__ = ()


def element(tag: str, *children: object, **attributes: str | None) -> Markup:
  """<tag attribute="...">children</tag>. `class_` means class, data_value means data-value, and None is omitted."""
  named = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
    for name, value in attributes.items()
    if value is not None
  )
  return Markup(f"<{tag}{named}>" if tag in VOID else f"<{tag}{named}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
  """Concatenates the children. Text is escaped, and None is omitted."""
  return Markup(
    "".join(child if isinstance(child, Markup) else html.escape(str(child)) for child in children if child is not None)
  )
