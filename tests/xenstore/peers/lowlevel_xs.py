"""Every method of xen.lowlevel.xs, by the Python that it was built for: prints what each gave, as JSON.

Run by test_libraries.py with the folder that has the package `xen` as its argument.
"""

import json
import select
import sys

sys.path.insert(0, sys.argv[1])
import xen.lowlevel.xs as xs

results = []


def note(name, function, *arguments):
    try:
        result = function(*arguments)
    except xs.Error as error:
        result = {"error": [str(word) for word in error.args]}
    if isinstance(result, bytes):
        result = {"bytes": result.hex()}
    results.append([name, result])
    return result


def event(handle):
    assert select.select([handle.fileno()], [], [], 5)[0], "no event"
    return handle.read_watch()


handle = xs.xs()
T = ""
note("mkdir", handle.mkdir, T, "/xs/dir")
note("write", handle.write, T, "/xs/dir/a", "value")
note("write bytes", handle.write, T, "/xs/dir/b", b"\x00\x01\xff")
note("write empty", handle.write, T, "/xs/dir/c", "")
for name in "abc":
    note("read", handle.read, T, f"/xs/dir/{name}")
note("read missing", handle.read, T, "/xs/none")
note("read wrong", handle.read, T, "/xs//none")
note("ls", handle.ls, T, "/xs/dir")
note("ls missing", handle.ls, T, "/xs/none")
note("ls empty", handle.ls, T, "/xs/dir/a")
for number in range(600):
    handle.write(T, f"/xs/many/child-{number:04d}", "")
note("ls many", handle.ls, T, "/xs/many")
note("rm", handle.rm, T, "/xs/many")
note("rm missing", handle.rm, T, "/xs/none")
note("rm no parent", handle.rm, T, "/xs/none/none")
note("get_permissions", handle.get_permissions, T, "/xs/dir")
note(
    "set_permissions",
    handle.set_permissions,
    T,
    "/xs/dir",
    [{"dom": 0, "read": True, "write": False}, {"dom": 0, "read": True, "write": True}],
)
note("get_permissions", handle.get_permissions, T, "/xs/dir")
note("get_permissions missing", handle.get_permissions, T, "/xs/none")

# Transactions: one that ends, one that is given up, one that meets a conflict.
other = xs.xs()
tx = handle.transaction_start()
note("write in", handle.write, tx, "/xs/t", "1")
note("read in", handle.read, tx, "/xs/t")
note("read out", other.read, T, "/xs/t")
note("end", handle.transaction_end, tx, 0)
note("read out", other.read, T, "/xs/t")
tx = handle.transaction_start()
note("write in", handle.write, tx, "/xs/t", "2")
note("abort", handle.transaction_end, tx, 1)
note("read out", other.read, T, "/xs/t")
tx = handle.transaction_start()
note("read in", handle.read, tx, "/xs/t")
note("write out", other.write, T, "/xs/t", "3")
note("write in", handle.write, tx, "/xs/t", "4")
note("end", handle.transaction_end, tx, 0)
note("read out", other.read, T, "/xs/t")
note("end of none", handle.transaction_end, "99", 0)
note("read in none", handle.read, "99", "/xs/t")

# Watches; a token is any object here.
note("watch", handle.watch, "/xs/w", "token")
note("event", event, handle)
note("watch again", handle.watch, "/xs/w", "token")
note("check", handle.check_watch)
other.write(T, "/xs/w/below", "1")
note("event", event, handle)
other.rm(T, "/xs/w")
note("event", event, handle)
note("check", handle.check_watch)
note("unwatch", handle.unwatch, "/xs/w", "token")
note("unwatch again", handle.unwatch, "/xs/w", "token")
note("watch special", handle.watch, "@releaseDomain", "special")
note("event", event, handle)
note("unwatch special", handle.unwatch, "@releaseDomain", "special")

# Domains: none of them is there.
note("get_domain_path", handle.get_domain_path, 7)
note("introduce_domain", handle.introduce_domain, 7, 1, 1)
note("release_domain", handle.release_domain, 7)
note("resume_domain", handle.resume_domain, 7)
note("set_target", handle.set_target, 7, 0)

note("rm", handle.rm, T, "/xs")
note("close", handle.close)
note("read closed", handle.read, T, "/xs")
other.close()
tried = {name for name in dir(handle) if not name.startswith("__")}
print(json.dumps({"results": results, "methods": sorted(tried)}))
