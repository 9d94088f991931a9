"""Run-time identity of ops: the call path from the target's forward down to the torch function.

An op is identified by the chain of module calls it happens in and, inside the innermost one, by the call sites (code
object and bytecode offset) that lead to it, plus how often that path was taken before. Nothing above the target counts.
So a branch that adds an op never shifts its neighbours, and a helper called from two places is two ops.

The walk is incremental: frames of module calls are remembered while they run, so that an op walks only to the module it
is in. No hooks are installed on modules; a finished module call is forgotten at the next op.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_PLAIN, _MODULE_CALL, _SKIP, _FUNCTION = range(4)
_TORCH_DIRECTORY = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OWN_DIRECTORY = os.path.dirname(os.path.abspath(__file__)) + os.sep
_MODULE_CALL_CODE = nn.Module._call_impl.__code__
_SKIPPED_CODES = (
    nn.Module._wrapped_call_impl.__code__,
    # _call_impl's closure that runs forward when a module has hooks
    *(c for c in _MODULE_CALL_CODE.co_consts if isinstance(c, CodeType)),
)
_FUNCTION_CODE = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_NOTEBOOK_MARKS = ("<", "ipykernel")

Path = tuple[int, ...]


class ScopeNode:
    """A module call (or labelled block) at one place of the call tree; interned, shared by all forwards.

    Args:
        key: digest of the path from the target; equal in another process that runs the same code.
        display: name for people, unique per node (``decoder.sine_embed@1``).
        module_path: path of the module from the target (inherited from the parent for labelled blocks).
        module_type: its class name.
    """

    __slots__ = ("children", "display", "key", "module_path", "module_type", "ops")

    def __init__(self, key: str, display: str, module_path: str, module_type: str) -> None:
        self.key = key
        self.display = display
        self.module_path = module_path
        self.module_type = module_type
        self.children: dict[Hashable, ScopeNode] = {}
        self.ops: dict[Hashable, list[Any]] = {}


class ScopeRun:
    """One run of a scope: counts how often each path was taken since it was entered."""

    __slots__ = ("counts", "node")

    def __init__(self, node: ScopeNode) -> None:
        self.node = node
        self.counts: dict[Hashable, int] = {}

    def hit(self, key: Hashable) -> int:
        """Return how often ``key`` was taken before in this run, and count it."""
        seen = self.counts.get(key, 0)
        self.counts[key] = seen + 1
        return seen


class CallPaths:
    """Everything known about the call tree of one target. Holds no tensors and no frames.

    Args:
        target: the module whose forward is the region.
        find: maps the digest of a newly met op to the object that stands for it (a planned op, a trace record).
    """

    def __init__(self, target: nn.Module, find: Callable[[str, ScopeNode, str], Any]) -> None:
        self.target = target
        self.find = find
        self.root = ScopeNode("", "", "", type(target).__name__)
        self.codes: dict[int, CodeType] = {}  # keeps the code objects alive, so that their ids stay unique
        self.frame_kinds: dict[int, int] = {}
        self._displays: dict[str, int] = {}
        self._module_paths: dict[int, str] = {}

    def frame_kind(self, code: CodeType) -> int:
        """Classify a code object once."""
        self.codes[id(code)] = code
        if code is _MODULE_CALL_CODE:
            kind = _MODULE_CALL
        elif code is _FUNCTION_CODE:
            kind = _FUNCTION
        elif code in _SKIPPED_CODES or code.co_filename.startswith(_OWN_DIRECTORY):
            kind = _SKIP
        else:
            kind = _PLAIN
        self.frame_kinds[id(code)] = kind
        return kind

    def module_path(self, module: nn.Module) -> str | None:
        """Return the path of a module below the target, or None if it is not registered there."""
        path = self._module_paths.get(id(module))
        if path is None:
            self._module_paths = {id(m): name for name, m in self.target.named_modules()}
            path = self._module_paths.get(id(module))
        return path

    def child(self, parent: ScopeNode, path: Path, module: nn.Module, hit: int) -> ScopeNode:
        """Return the node of the ``hit``-th call of ``module`` from ``path`` inside ``parent``."""
        lookup = (path, id(module), hit)
        node = parent.children.get(lookup)
        if node is None:
            registered = self.module_path(module)
            module_type = type(module).__name__
            module_path = f"({module_type})" if registered is None else registered
            key = _digest(parent.key, self.describe(path), module_path, str(hit))
            display = self._unique_display(_below(parent, module_path))
            node = parent.children[lookup] = ScopeNode(key, display, module_path, module_type)
            self.codes[id(module)] = module  # type: ignore[assignment]  # an unregistered module's id must stay unique
        return node

    def labelled(self, module: nn.Module, label: str) -> ScopeNode:
        """Return the node of a dynamic block: it depends on the label only, not on where or when the block runs."""
        module_path = self.module_path(module) or ""
        lookup = (module_path, label)
        node = self.root.children.get(lookup)
        if node is None:
            display = f"{module_path}.{label}" if module_path else label
            key = _digest("dynamic_block", module_path, label)
            node = ScopeNode(key, self._unique_display(display), module_path, type(module).__name__)
            self.root.children[lookup] = node
        return node

    def inner(self, parent: ScopeNode, path: Path, name: str, hit: int) -> ScopeNode:
        """Return the node of a nameless block inside ``parent`` (a checkpointed function): same display name."""
        lookup = (path, name, hit)
        node = parent.children.get(lookup)
        if node is None:
            key = _digest(parent.key, self.describe(path), name, str(hit))
            node = ScopeNode(key, parent.display, parent.module_path, parent.module_type)
            parent.children[lookup] = node
        return node

    def op(self, node: ScopeNode, path: Path, kind: str, hit: int) -> Any:
        """Return what ``find`` says of the ``hit``-th op of ``kind`` at ``path``, remembered from then on."""
        known = node.ops.setdefault((path, kind), [])
        while len(known) <= hit:
            digest = _digest(node.key, self.describe(path), kind, str(len(known)))
            known.append(self.find(digest, node, kind))
        return known[hit]

    def describe(self, path: Path) -> str:
        """Spell a path so that it is the same in another process."""
        sites = []
        for code_id, offset in zip(path[::2], path[1::2], strict=True):
            code = self.codes[code_id]
            file = os.path.basename(code.co_filename)
            if any(mark in code.co_filename for mark in _NOTEBOOK_MARKS):
                file = ""  # a notebook cell gets another file name in every session
            sites.append(f"{file}:{getattr(code, 'co_qualname', code.co_name)}+{offset}")
        return "/".join(sites)

    def _unique_display(self, display: str) -> str:
        count = self._displays.get(display, 0)
        self._displays[display] = count + 1
        return f"{display}@{count}" if count else display


class CallStack:
    """Where execution is, during one entry of the region. Fresh per entry, so nothing survives an exception.

    Args:
        paths: the call tree.
        frame: the frame below which the region runs.
        node: the scope of that frame; the root by default.
    """

    __slots__ = ("_labels", "_memo", "_stack", "paths")

    def __init__(self, paths: CallPaths, frame: FrameType, node: ScopeNode | None = None) -> None:
        self.paths = paths
        run = ScopeRun(node or paths.root)
        self._memo: dict[FrameType, ScopeRun] = {frame: run}
        self._stack: list[tuple[FrameType, ScopeRun]] = [(frame, run)]
        self._labels: dict[FrameType, list[ScopeRun]] = {}

    def op(self, frame: FrameType, kind: str) -> Any:
        """Identify the op of ``kind`` called in ``frame``; None inside a custom autograd.Function."""
        located = self._locate(frame)
        if located is None:
            return None
        run, path = located
        hit = run.hit((path, kind))
        known = run.node.ops.get((path, kind))
        if known is not None and hit < len(known):
            return known[hit]
        return self.paths.op(run.node, path, kind, hit)

    def _locate(self, frame: FrameType | None) -> tuple[ScopeRun, Path] | None:
        memo, kinds, labels = self._memo, self.paths.frame_kinds, self._labels
        path: list[int] = []
        while frame is not None:
            run = memo.get(frame)
            if run is not None:
                break
            code = frame.f_code
            kind = kinds.get(id(code))
            if kind is None:
                kind = self.paths.frame_kind(code)
            if kind == _PLAIN:
                path.append(id(code))
                path.append(frame.f_lasti)
                if labels and labels.get(frame):
                    run = labels[frame][-1]
                    break
            elif kind == _MODULE_CALL:
                run = self._open(frame)
                if run is None:
                    return None
                break
            elif kind == _FUNCTION:
                return None
            frame = frame.f_back
        else:
            return None
        self._unwind(run)
        return run, tuple(path)

    def _open(self, frame: FrameType) -> ScopeRun | None:
        """Enter the module call that runs in ``frame``."""
        located = self._locate(frame.f_back)
        if located is None:
            return None
        parent, path = located
        module = frame.f_locals["self"]
        node = self.paths.child(parent.node, path, module, parent.hit((path, id(module))))
        return self._push(frame, node)

    def _push(self, frame: FrameType, node: ScopeNode) -> ScopeRun:
        run = ScopeRun(node)
        self._memo[frame] = run
        self._stack.append((frame, run))
        return run

    def _unwind(self, run: ScopeRun) -> None:
        """Forget the module calls that have ended (returned or raised) since the last op."""
        stack = self._stack
        while len(stack) > 1 and stack[-1][1] is not run:
            frame, ended = stack.pop()
            if self._memo.get(frame) is ended:
                del self._memo[frame]

    def enter_label(self, frame: FrameType, module: nn.Module, label: str) -> None:
        """Start a dynamic block in ``frame``."""
        self._locate(frame)
        run = ScopeRun(self.paths.labelled(module, label))
        self._labels.setdefault(frame, []).append(run)
        self._stack.append((frame, run))

    def exit_label(self, frame: FrameType) -> None:
        """End the innermost dynamic block of ``frame``."""
        run = self._labels[frame].pop()
        if not self._labels[frame]:
            del self._labels[frame]
        while len(self._stack) > 1 and any(entry[1] is run for entry in self._stack):
            ended_frame, ended = self._stack.pop()
            if self._memo.get(ended_frame) is ended:
                del self._memo[ended_frame]

    def inner_node(self, frame: FrameType, name: str) -> ScopeNode | None:
        """Return the node for a function that ``frame`` is about to call under another name (checkpointing)."""
        located = self._locate(frame)
        if located is None:
            return None
        run, path = located
        return self.paths.inner(run.node, path, name, run.hit((path, name)))

    def enter(self, frame: FrameType, node: ScopeNode) -> None:
        """Let ``frame`` run as ``node``."""
        self._push(frame, node)

    def clear(self) -> None:
        """Drop all frames (and the tensors they hold) once the entry has ended."""
        self._memo.clear()
        self._stack.clear()
        self._labels.clear()


def user_location(frame: FrameType | None) -> str:
    """Return ``file.py:line`` of the innermost frame that belongs neither to torch nor to this package."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH_DIRECTORY, _OWN_DIRECTORY)):
            inside = os.path.relpath(file) if os.path.isabs(file) else file
            return f"{file if inside.startswith('..') else inside}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _below(parent: ScopeNode, module_path: str) -> str:
    """Display name of a module inside ``parent``: keeps the ``@k`` of the parent."""
    if module_path.startswith("("):
        return f"{parent.display}.{module_path}" if parent.display else module_path
    if parent.module_path and module_path.startswith(parent.module_path + "."):
        return parent.display + module_path[len(parent.module_path) :]
    return module_path


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
