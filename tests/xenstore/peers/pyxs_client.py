"""pyxs against a store: prints what each of its methods gave, as JSON. Its socket is the argument.

A process of its own: pyxs waits for ever where a daemon does not answer.
"""

import json
import sys

import pyxs

results = []


def note(name, function, *arguments, **options):
    try:
        result = function(*arguments, **options)
        if name in ("walk",):
            result = [
                [top.decode(), value.decode(), [child.decode() for child in below]]
                for top, value, below in result
            ]
        if name in ("ls",):
            result = [child.decode() for child in result]
        if name in ("perms",):
            result = [perm.decode() for perm in result]
    except (pyxs.PyXSError, ValueError) as error:  # the latter for what is not ASCII
        result = {"error": [type(error).__name__, *map(str, error.args)]}
    if isinstance(result, bytes):
        result = {"bytes": result.hex()}
    results.append([name, result])
    return result


with pyxs.Client(unix_socket_path=sys.argv[1]) as client, pyxs.Client(unix_socket_path=sys.argv[1]) as other:
    note("write", client.write, b"/pyxs/a", b"value")
    note("write", client.write, b"/pyxs/b", b"\x00\x01\xff")
    note("mkdir", client.mkdir, b"/pyxs/dir/deep")
    note("read", client.read, b"/pyxs/a")
    note("read", client.read, b"/pyxs/b")
    note("read default", client.read, b"/pyxs/none", b"default")
    note("read missing", client.read, b"/pyxs/none")
    note("item", client.__getitem__, b"/pyxs/a")
    note("exists", client.exists, b"/pyxs/a")
    note("exists", client.exists, b"/pyxs/none")
    note("ls", client.list, b"/pyxs")
    note("ls", client.list, b"/pyxs/none")
    note("walk", client.walk, b"/pyxs")
    note("perms", client.get_perms, b"/pyxs/a")
    note("set", client.set_perms, b"/pyxs/a", [b"n0", b"r0"])
    note("perms", client.get_perms, b"/pyxs/a")
    note("rm", client.delete, b"/pyxs/dir")
    note("rm", client.delete, b"/pyxs/none/none")
    note("domain path", client.get_domain_path, 7)
    note("introduced", client.is_domain_introduced, 7)
    note("introduced", client.is_domain_introduced, 0)
    note("release", client.release_domain, 7)
    note("resume", client.resume_domain, 7)
    note("target", client.set_target, 7, 0)

    client.transaction()
    note("write in", client.write, b"/pyxs/t", b"1")
    note("read in", client.read, b"/pyxs/t")
    note("read out", other.read, b"/pyxs/t", b"")
    note("commit", client.commit)
    note("read out", other.read, b"/pyxs/t", b"")
    client.transaction()
    note("write in", client.write, b"/pyxs/t", b"2")
    client.rollback()
    note("read out", other.read, b"/pyxs/t")
    client.transaction()
    note("read in", client.read, b"/pyxs/t")
    note("write out", other.write, b"/pyxs/t", b"3")
    note("write in", client.write, b"/pyxs/t", b"4")
    note("commit", client.commit)
    note("read out", other.read, b"/pyxs/t")

    with client.monitor() as monitor:
        monitor.watch(b"/pyxs/w", b"token")
        events = monitor.wait()
        note("event", lambda: [word.decode() for word in next(events)])
        for path in (b"/pyxs/w", b"/pyxs/w/below"):
            other.write(path, b"1")
            note("event", lambda: [word.decode() for word in next(events)])
        note("unwatch", monitor.unwatch, b"/pyxs/w", b"token")
    note("rm", client.delete, b"/pyxs")

print(json.dumps({"results": results}))
