"""A griffe extension: what is Sphinx's in the docstrings, as mkdocs writes it."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")  # :func:`densreg.pnorm`
TABLE = re.compile(r"^=+ [= ]+\n.*?^=+ [= ]+\n.*?^=+ [= ]+$", re.MULTILINE | re.DOTALL)


class Roles(griffe.Extension):
    """Roles become links where the target is documented and code where it is not; tables are shown as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: _link(found[1], obj), obj.docstring.value)
            obj.docstring.value = TABLE.sub(lambda found: f"```text\n{found[0]}\n```", text)


def _link(target: str, where: griffe.Object) -> str:
    full = target if "." in target else f"{where.module.path}.{target}"
    return f'<autoref optional identifier="{full}"><code>{target}</code></autoref>'
