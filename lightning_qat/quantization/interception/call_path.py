"""Run-time identity of ops: the call path from the target's forward down to the torch function.

An op is identified by the chain of module calls around it, by the call sites (code object and bytecode offset) that
lead to it inside the innermost module, and by how often that path was taken before. Frames above the target do not
count. So a branch that adds an op never shifts its neighbours, and a helper called from two places gives two ops.
(Python 3.10 compiles what stands behind ``a if b else c`` once for each branch: there, an op in it is two ops.)

Digests of these paths are the names under which ops are found again in another process. They change when the bytecode
of a function on the path changes, not when lines move.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from types import CodeType
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.interception.code_locations import OWN_DIRECTORY, TORCH_DIRECTORY

MODULE_CALL, SKIP, FUNCTION = range(3)
"""Kinds of frames that are not call sites: a module call, a frame to skip, or a custom ``autograd.Function``."""

_SKIPPED_FILES = (
    OWN_DIRECTORY,
    # between the code of a model and its functions and modules while torch.export runs it
    *(TORCH_DIRECTORY + name + os.sep for name in ("fx", "export", "_export", "_dynamo", "_functorch")),
    TORCH_DIRECTORY + "overrides.py",
)
_MODULE_CALL_CODE = nn.Module._call_impl.__code__
_SKIPPED_CODES = (
    nn.Module._wrapped_call_impl.__code__,
    nn.Module._slow_forward.__code__,  # while torch.jit.trace runs
    # _call_impl's closure that runs forward when a module has hooks
    *(c for c in _MODULE_CALL_CODE.co_consts if isinstance(c, CodeType)),
)
FUNCTION_CODE = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
"""The code object that runs a custom ``autograd.Function``."""
_NOTEBOOK_MARKS = ("<", "ipykernel")
_CACHE_OPCODE = dis.opmap.get("CACHE")
_CALL_OPCODE = dis.opmap.get("CALL")
_PRECALL_OPCODE = dis.opmap.get("PRECALL", -1)

Path = tuple[int, ...]
"""Numbers of call sites, from the op outwards. They are valid in one :class:`CallPaths`; ``describe`` names them."""


class ScopeNode:
    """A module call (or labelled block) at one place of the call tree; interned, shared by all forwards.

    Args:
        key: digest of the path from the target; equal in another process that runs the same code.
        display: name for people, unique per node (``decoder.sine_embed@1``).
        module_path: path of the module from the target (inherited from the parent for labelled blocks).
        module_type: its class name.
        is_module: whether it is a module call rather than a block inside one.
        is_dynamic: whether it is a dynamic block, or inside one.
        body: code of the module's own forward, if decorators wrap it. Paths end there, because decorators may call it
            differently in train and eval mode (checkpointing in training only).
    """

    __slots__ = ("body", "children", "display", "is_dynamic", "is_module", "key", "module_path", "module_type", "ops")

    def __init__(
        self,
        key: str,
        display: str,
        module_path: str,
        module_type: str,
        is_module: bool = False,
        is_dynamic: bool = False,
        body: CodeType | None = None,
    ) -> None:
        self.key = key
        self.display = display
        self.module_path = module_path
        self.module_type = module_type
        self.is_module = is_module
        self.is_dynamic = is_dynamic
        self.body = body
        self.children: dict[Hashable, ScopeNode] = {}
        self.ops: dict[tuple[Path, str], list[Any]] = {}


class CallPaths:
    """Everything known about the call tree of one target. Holds no tensors and no frames.

    Args:
        target: the module whose forward is the region.
        find: maps the digest of a newly met op to the object that stands for it (a planned op, a trace record).
    """

    def __init__(self, target: nn.Module, find: Callable[[str, ScopeNode, str], Any]) -> None:
        self.target = target
        self.find = find
        self.root = ScopeNode("", "", "", type(target).__name__, body=_wrapped_body(type(target)))
        self.sites: dict[int, int | list[int]] = {}
        self._codes: list[CodeType] = []  # keeps code objects alive, so that their ids stay unique
        self._names_of_sites: list[str] = []
        self._displays: dict[str, int] = {}
        self._names: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._unregistered: set[type] = set()
        self._lock = threading.RLock()  # two threads may run the same module

    def sites_of(self, code: CodeType) -> int | list[int]:
        """Classify a code object once: a kind of frame, or the number of the call site at each ``f_lasti // 2``."""
        with self._lock:
            found = self.sites.get(id(code))
            if found is None:
                self._codes.append(code)
                if code is _MODULE_CALL_CODE:
                    found = MODULE_CALL
                elif code is FUNCTION_CODE:
                    found = FUNCTION
                elif code in _SKIPPED_CODES or code.co_filename.startswith(_SKIPPED_FILES):
                    found = SKIP
                else:
                    found = self._number(code)
                self.sites[id(code)] = found
            return found

    def _number(self, code: CodeType) -> list[int]:
        """Number the instructions of a function.

        Whether ``f_lasti`` points at an instruction or at the inline caches behind it depends on whether the
        interpreter specialized the instruction by now, and whether ``torch.compile`` was ever used: caches count as
        the instruction they belong to. Python 3.11 calls with two instructions, of which either can be the one that
        runs the callee: a specialized ``PRECALL`` calls a builtin (``sum`` over ops) by itself.
        """
        name = _describe(code)
        numbers: list[int] = []
        before = None
        for offset, opcode in enumerate(code.co_code[::2]):
            is_cache = opcode == _CACHE_OPCODE and bool(numbers)
            if not is_cache and not (opcode == _CALL_OPCODE and before == _PRECALL_OPCODE):
                self._names_of_sites.append(f"{name}+{2 * offset}")
            before = before if is_cache else opcode
            numbers.append(len(self._names_of_sites) - 1)
        return numbers

    def scope_name(self, module: nn.Module) -> str:
        """Return the path of a module below the target, or ``(Type)`` for one that is not registered there."""
        entry = self._names.get(id(module))
        if entry is None or entry[0]() is not module:
            if type(module) not in self._unregistered:
                self._names = {id(m): (weakref.ref(m), name) for name, m in self.target.named_modules()}
                entry = self._names.get(id(module))
            if entry is None or entry[0]() is not module:
                self._unregistered.add(type(module))  # such as a nn.ReLU() made in forward: do not look again each time
                return f"({type(module).__name__})"
        return entry[1]

    def child(self, parent: ScopeNode, path: Path, name: str, module: nn.Module, hit: int) -> ScopeNode:
        """Return the node of the ``hit``-th call of the module called ``name`` from ``path`` inside ``parent``."""
        lookup = (path, name, hit)
        node = parent.children.get(lookup)
        if node is None:
            key = _digest(parent.key, self.describe(path), name, str(hit))
            node = self._new(parent, lookup, key, _below(parent, name), name, module, is_label=False)
        return node

    def labelled(self, module: nn.Module, label: str) -> ScopeNode:
        """Return the node of a dynamic block: it depends on the label only, not on where or when the block runs."""
        name = self.scope_name(module)
        node = self.root.children.get((name, label))
        if node is None:
            display = f"{name}.{label}" if name else label
            key = _digest("dynamic_block", name, label)
            node = self._new(self.root, (name, label), key, display, name, module, is_label=True)
        return node

    def inner(self, parent: ScopeNode, path: Path, name: str, hit: int) -> ScopeNode:
        """Return the node of a nameless block inside ``parent`` (a checkpointed function): same display name."""
        lookup = (path, name, hit, "inner")
        node = parent.children.get(lookup)
        if node is None:
            key = _digest(parent.key, self.describe(path), name, str(hit))
            node = ScopeNode(key, parent.display, parent.module_path, parent.module_type, is_dynamic=parent.is_dynamic)
            node = parent.children.setdefault(lookup, node)
        return node

    def op(self, node: ScopeNode, path: Path, kind: str, hit: int) -> Any:
        """Return the object that ``find`` gives for the ``hit``-th op of ``kind`` at ``path``, and remember it."""
        with self._lock:
            known = node.ops.setdefault((path, kind), [])
            while len(known) <= hit:
                digest = _digest(node.key, self.describe(path), kind, str(len(known)))
                known.append(self.find(digest, node, kind))
            return known[hit]

    def describe(self, path: Path) -> str:
        """Return a path as text that is the same in another process."""
        return "/".join(self._names_of_sites[site] for site in path)

    def _new(
        self,
        parent: ScopeNode,
        lookup: Hashable,
        key: str,
        display: str,
        module_path: str,
        module: nn.Module,
        is_label: bool,
    ) -> ScopeNode:
        with self._lock:
            node = parent.children.get(lookup)
            if node is None:
                count = self._displays.get(display, 0)
                self._displays[display] = count + 1
                unique = f"{display}@{count}" if count else display
                dynamic = is_label or parent.is_dynamic
                body = None if is_label else _wrapped_body(type(module))
                node = ScopeNode(key, unique, module_path, type(module).__name__, not is_label, dynamic, body)
                parent.children[lookup] = node
            return node


def _wrapped_body(module_type: type[nn.Module]) -> CodeType | None:
    """Return the code of the forward that decorators wrap; None for a forward without decorators."""
    forward = module_type.forward
    body = inspect.unwrap(forward)
    return None if body is forward else getattr(body, "__code__", None)


def _below(parent: ScopeNode, name: str) -> str:
    """Display name of a module inside ``parent``: keeps the ``@k`` of the parent."""
    if name.startswith("("):
        return f"{parent.display}.{name}" if parent.display else name
    if parent.module_path and name.startswith(parent.module_path + "."):
        return parent.display + name[len(parent.module_path) :]
    return name


def _describe(code: CodeType) -> str:
    """Name a function: its file, its name, and a digest of its bytecode, which moved lines and comments leave alone.

    The digest keeps the op at some offset of an edited function from being taken for the one that was there before.
    """
    file = os.path.basename(code.co_filename)
    if any(mark in code.co_filename for mark in _NOTEBOOK_MARKS):
        file = ""  # a notebook cell gets another file name in every session
    name = getattr(code, "co_qualname", code.co_name)
    if code.co_name == "<lambda>":  # these have nothing but their place to tell them apart
        name += f"@{code.co_firstlineno}:{_column(code)}"
    return f"{file}:{name}#{hashlib.blake2b(code.co_code, digest_size=4).hexdigest()}"


def _column(code: CodeType) -> str:
    """Return where a lambda ends in its line. Python 3.10 knows no columns: there, what it reads.

    Not the sets that it reads, whose order is another one in another process.
    """
    if hasattr(code, "co_positions"):
        return str(max((p[2] for p in code.co_positions() if p[2] is not None), default=0))
    constants = [repr(value) for value in code.co_consts if not isinstance(value, (CodeType, frozenset))]
    return _digest(*constants, *code.co_names)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
