"""Where execution is inside a region: frames of the running forward, resolved to scopes of the call tree.

The walk is incremental: frames of module calls are remembered while they run, so that an op walks only up to the module
it is in. No hooks are installed on modules; a finished module call is forgotten at the next op.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import FrameType
from typing import Any

from torch import nn

from lightning_qat.quantization.interception.call_path import FUNCTION, MODULE_CALL, CallPaths, Path, ScopeNode


class ScopeRun:
    """One run of a scope: counts how often each path was taken since it was entered."""

    __slots__ = ("body", "counts", "depth", "frame", "node", "uncounted")

    def __init__(self, node: ScopeNode, frame: FrameType, depth: int) -> None:
        self.node = node
        self.frame = frame
        self.depth = depth
        self.body: FrameType | None = None
        self.counts: dict[Hashable, int] = {}
        self.uncounted: tuple[ScopeRun, Hashable] | None = None

    def hit(self, key: Hashable) -> int:
        """Return how often ``key`` was taken before in this run, and count it."""
        seen = self.counts.get(key, 0)
        self.counts[key] = seen + 1
        return seen


class CallStack:
    """Tracks where execution is during one entry of the region, and identifies ops by their call path.

    Implements :class:`~lightning_qat.quantization.interception.op_identity.OpIdentity`.

    Args:
        paths: the call tree.
        frame: the frame below which the region runs.
        node: the scope of that frame; the root by default.
    """

    __slots__ = ("_bodies", "_labels", "_memo", "_sites", "_stack", "paths")

    def __init__(self, paths: CallPaths, frame: FrameType, node: ScopeNode | None = None) -> None:
        self.paths = paths
        self._sites = paths.sites
        run = ScopeRun(node or paths.root, frame, 0)
        self._memo: dict[FrameType, ScopeRun] = {frame: run}
        self._stack: list[ScopeRun] = [run]
        self._labels: dict[FrameType, list[ScopeRun]] = {}
        self._bodies: dict[FrameType, ScopeRun] = {}

    @property
    def owner(self) -> CallPaths:
        """The call tree, which all entries of one region share."""
        return self.paths

    @property
    def target(self) -> nn.Module:
        """The module whose forward is the region."""
        return self.paths.target

    def op(self, frame: FrameType, kind: str) -> Any:
        """Identify the op of ``kind`` called in ``frame``; None inside a custom autograd.Function."""
        located = self._locate(frame)
        if located is None:
            return None
        run, path = located
        key = (path, kind)
        counts = run.counts
        hit = counts.get(key, 0)
        counts[key] = hit + 1
        known = run.node.ops.get(key)
        if known is not None and hit < len(known):
            return known[hit]
        return self.paths.op(run.node, path, kind, hit)

    def bystander(self, frame: FrameType, kind: str) -> Any:
        """Identify an op that only tracing looks at. It counts no module call, as it is not identified at run time."""
        located = self._locate(frame, counting=False)
        if located is None:
            return None
        run, path = located
        return self.paths.op(run.node, path, kind, run.hit((path, kind)))

    def _locate(self, frame: FrameType | None, counting: bool = True) -> tuple[ScopeRun, Path] | None:
        """Return the run that ``frame`` belongs to and the call sites inside it."""
        memo, sites, labels, bodies = self._memo, self._sites, self._labels, self._bodies
        start = frame
        path: list[int] = []
        while frame is not None:
            run = memo.get(frame)
            if run is not None:
                break
            code = frame.f_code
            numbers = sites.get(id(code))
            if numbers is None:
                numbers = self.paths.sites_of(code)
            if type(numbers) is list:
                path.append(numbers[frame.f_lasti >> 1])
                if labels and labels.get(frame):
                    run = labels[frame][-1]
                    break
                if bodies and frame in bodies:
                    run = bodies[frame]
                    break
            elif numbers == MODULE_CALL:
                run = self._open(frame, counting)
                if run is None:
                    return None
                break
            elif numbers == FUNCTION:
                return None
            frame = frame.f_back
        else:
            return None
        if run.node.body is not None and run.frame is frame:
            self._enter_body(run, start, path)
        if counting and run.uncounted is not None:
            self._count(run)
        if self._stack[-1] is not run:
            self._unwind(run)
        return run, tuple(path)

    def _enter_body(self, run: ScopeRun, frame: FrameType | None, path: list[int]) -> None:
        """Cut a path that goes through the body of a wrapped forward there, and remember the body.

        Args:
            run: the call of the module with the wrapped forward.
            frame: where the path starts.
            path: from there to the module call; cut in place.
        """
        length = found = 0
        body: FrameType | None = None
        while frame is not None and frame is not run.frame:
            length += type(self._sites.get(id(frame.f_code))) is list
            if frame.f_code is run.node.body:
                body, found = frame, length
            frame = frame.f_back
        if body is not None:
            if run.body is not None:
                self._bodies.pop(run.body, None)
            run.body = body
            self._bodies[body] = run
            del path[found:]

    def _open(self, frame: FrameType, counting: bool) -> ScopeRun | None:
        """Enter the module call that runs in ``frame``."""
        located = self._locate(frame.f_back, counting)
        if located is None:
            return None
        parent, path = located
        module = frame.f_locals["self"]
        name = self.paths.scope_name(module)
        key = (path, name)
        hit = parent.hit(key) if counting else parent.counts.get(key, 0)
        run = self._push(frame, self.paths.child(parent.node, path, name, module, hit))
        if not counting:
            run.uncounted = parent, key
        return run

    def _count(self, run: ScopeRun) -> None:
        """Count a module call that only bystanders have run in so far. No other can have taken its number."""
        if run.uncounted is not None:
            parent, key = run.uncounted
            run.uncounted = None
            self._count(parent)
            parent.hit(key)

    def _push(self, frame: FrameType, node: ScopeNode) -> ScopeRun:
        run = ScopeRun(node, frame, len(self._stack))
        self._memo[frame] = run
        self._stack.append(run)
        return run

    def _unwind(self, run: ScopeRun) -> None:
        """Forget the module calls that have ended (returned or raised) since the last op."""
        stack, depth = self._stack, run.depth
        if depth < len(stack) and stack[depth] is run:  # else: the block of a generator that was suspended
            self._truncate(depth + 1)

    def _truncate(self, length: int) -> None:
        while len(self._stack) > length:
            ended = self._stack.pop()
            if self._memo.get(ended.frame) is ended:
                del self._memo[ended.frame]
            if ended.body is not None:
                self._bodies.pop(ended.body, None)

    def enter_label(self, frame: FrameType, module: nn.Module, label: str) -> None:
        """Start a dynamic block in ``frame``."""
        self._locate(frame)
        run = ScopeRun(self.paths.labelled(module, label), frame, len(self._stack))
        self._labels.setdefault(frame, []).append(run)
        self._stack.append(run)

    def exit_label(self, frame: FrameType) -> None:
        """End the innermost dynamic block of ``frame``."""
        runs = self._labels.get(frame)
        if not runs:
            return  # the entry of the region has ended in between
        run = runs.pop()
        if not runs:
            del self._labels[frame]
        if run.depth < len(self._stack) and self._stack[run.depth] is run:
            self._truncate(run.depth)

    def inner_scope(self, frame: FrameType, name: str) -> ScopeNode | None:
        """Return the node for a function that ``frame`` is about to call under another name (checkpointing).

        If decorators of a forward call the forward itself that way, the node is that of the forward, as it is without
        checkpointing.
        """
        located = self._locate(frame)
        if located is None:
            return None
        run, path = located
        if run.node.body is not None and run.body is None:
            return run.node
        return self.paths.inner(run.node, path, name, run.hit((path, name)))

    def enter(self, frame: FrameType, node: ScopeNode) -> None:
        """Let ``frame`` run as ``node``."""
        self._push(frame, node)

    def resumed(self, frame: FrameType, node: ScopeNode) -> CallStack:
        """Return the call stack of an entry that starts in ``frame`` as ``node``."""
        return CallStack(self.paths, frame, node)

    def clear(self) -> None:
        """Drop all frames (and the tensors they hold) once the entry has ended."""
        self._memo.clear()
        self._stack.clear()
        self._labels.clear()
        self._bodies.clear()
