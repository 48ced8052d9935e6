"""Watches by path, so that a change asks only the watches on its own ancestors. Pure.

Knows connections (to whom an event goes); permissions are judged by the engine.
"""

from __future__ import annotations

from xenbus.xenstore.engine.connection import Connection


class Watch:
    """path: absolute; prefix: how much of an event's path the client does not see (a relative watch);
    depth: levels below `path` that count, -1 for all; serial: order of registration."""

    __slots__ = ("conn", "depth", "path", "prefix", "serial", "token")

    def __init__(
        self, conn: Connection, path: bytes, token: bytes, depth: int, prefix: int, serial: int
    ) -> None:
        self.conn = conn
        self.path = path
        self.token = token
        self.depth = depth
        self.prefix = prefix
        self.serial = serial


class WatchIndex:
    """Every watch of the store. `by_path` has no empty entries: the length of a path bounds a search."""

    __slots__ = ("_serial", "by_path")

    def __init__(self) -> None:
        self.by_path: dict[bytes, dict[Watch, None]] = {}
        self._serial = 0

    def add(self, conn: Connection, path: bytes, token: bytes, depth: int, prefix: int) -> Watch:
        self._serial += 1
        watch = Watch(conn, path, token, depth, prefix, self._serial)
        self.by_path.setdefault(path, {})[watch] = None
        conn.watches[path, token] = watch
        return watch

    def remove(self, watch: Watch) -> None:
        del watch.conn.watches[watch.path, watch.token]
        bucket = self.by_path[watch.path]
        del bucket[watch]
        if not bucket:
            del self.by_path[watch.path]

    def matching(self, path: bytes) -> list[Watch]:
        """Those on `path` or an ancestor whose depth reaches it, in order of registration."""
        by_path = self.by_path
        found: list[Watch] = list(by_path.get(path, ()))
        steps = 0
        end = path.rfind(b"/")
        while end > 0:
            steps += 1
            bucket = by_path.get(path[:end])
            if bucket is not None:
                found += [watch for watch in bucket if watch.depth < 0 or watch.depth >= steps]
            end = path.rfind(b"/", 0, end)
        if end == 0 and len(path) > 1:
            bucket = by_path.get(b"/")
            if bucket is not None:
                steps += 1
                found += [watch for watch in bucket if watch.depth < 0 or watch.depth >= steps]
        if len(found) > 1:
            found.sort(key=_serial)
        return found

    def special(self, name: bytes, domid: int) -> list[tuple[Watch, bytes]]:
        """Who hears that `name` (@introduceDomain, @releaseDomain) happened to `domid`, and under which
        path: `name` itself without a depth, `name/<domid>` with one (MATCH_NODEPTH and MATCH_DEPTH)."""
        named = name + b"/%d" % domid
        on_name = self.by_path.get(name, ())
        found = [(watch, name) for watch in on_name if watch.depth < 0]
        found += [(watch, named) for watch in on_name if watch.depth > 0]
        found += [(watch, named) for watch in self.by_path.get(named, ())]
        return found


def _serial(watch: Watch) -> int:
    return watch.serial
