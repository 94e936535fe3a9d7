"""How modules are typed where their parts are reached by name."""

from __future__ import annotations

from typing import Any

AnyModule = Any
"""An `nn.Module`. Torch's types say `Tensor | Module` of every attribute of one, so a chain of
names, a call or a number behind a name would not check; diffusers' classes are used by such names
throughout."""
