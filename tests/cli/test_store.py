"""`xenbus store` against a daemon that `xenbus store serve` runs; Xen's own tools read along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from xenbus.cli.main import run
from xenbus.cli.store import address, escaped

XENBUS = [sys.executable, "-m", "xenbus.cli.main"]


@pytest.fixture(scope="module")
def served():
    """The directory of a store that is served alone."""
    with tempfile.TemporaryDirectory(prefix="xenbus-cli-") as top:
        place = Path(top) / "new"
        command = [*XENBUS, "store", "serve", "--dir", str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"ready\n"
                yield place
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
        assert not (place / "socket").exists()


@pytest.fixture
def store(served, capsys, request):
    """store("read", "/a") -> its output; the exit code is checked. Each test has a subtree of its own."""

    def call(*words, code=0):
        assert run(["store", words[0], "--dir", str(served), *words[1:]]) == code, capsys.readouterr().err
        done = capsys.readouterr()
        return done.out if code == 0 else done.err

    return call


def xenstore_tool(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} (xenstore-utils) is not installed")
    return found


def test_the_socket_is_its_owners(served):
    assert stat.S_IMODE((served / "socket").stat().st_mode) == 0o600
    assert stat.S_IMODE(served.stat().st_mode) == 0o700


def test_what_is_written_is_read(store):
    store("write", "/t1/a", "one")
    store("write", "/t1/b", "two", "/t1/c/d", "tab\tand\\")
    assert store("read", "/t1/a", "/t1/b") == "one\ntwo\n"
    assert store("read", "/t1/c/d") == "tab\\tand\\\\\n"
    assert store("read", "--raw", "/t1/c/d") == "tab\tand\\"
    assert json.loads(store("read", "--json", "/t1/a", "/t1/b")) == {"/t1/a": "one", "/t1/b": "two"}


def test_ls_shows_a_tree_paths_permissions_and_json(store):
    store("write", "/t2/a/b", "1", "/t2/c", "2")
    assert store("ls", "/t2") == 'a = ""\n b = "1"\nc = "2"\n'
    assert store("ls", "-f", "/t2") == '/t2/a = ""\n/t2/a/b = "1"\n/t2/c = "2"\n'
    assert store("ls", "-p", "/t2").splitlines()[2] == 'c = "2"  (n0)'
    assert json.loads(store("ls", "--json", "/t2")) == {"/t2/a": "", "/t2/a/b": "1", "/t2/c": "2"}
    assert json.loads(store("ls", "--json", "-p", "/t2"))["/t2/c"] == {"value": "2", "perms": ["n0"]}


def test_ls_takes_many_children_and_great_depth(store):
    pairs = [word for n in range(200) for word in (f"/t3/n{n:03}", str(n))]
    store("write", *pairs)
    deep = "/t3/deep" + "/x" * 300
    store("write", deep, "bottom")
    lines = store("ls", "-f", "/t3").splitlines()
    assert f'{deep} = "bottom"' in lines
    assert [f'/t3/n{n:03} = "{n}"' for n in range(200)] == [
        line for line in lines if line.startswith("/t3/n")
    ]
    assert len(lines) == 501


def test_bytes_that_are_no_text_come_through(store, served):
    value = bytes(range(1, 256)) * 2
    subprocess.run([*map(os.fsencode, XENBUS), b"store", b"write", b"/t4/v", value], check=True, timeout=30,
                   env=os.environ | {"XENBUS_DIR": str(served)})  # fmt: skip
    assert store("read", "/t4/v") == escaped(value) + "\n"
    assert set(json.loads(store("read", "--json", "/t4/v"))["/t4/v"]) == {"base64"}


def test_mkdir_rm_and_perms(store):
    store("mkdir", "/t5/a/b")
    assert store("perms", "/t5/a") == "n0\n"
    store("perms", "/t5/a", "n0", "r3")
    assert json.loads(store("perms", "--json", "/t5/a")) == {"/t5/a": ["n0", "r3"]}
    store("rm", "/t5/a")
    assert store("ls", "/t5") == ""


def test_what_is_not_there_is_three_and_is_named(store):
    for words in (
        ("read", "/t6/no"),
        ("ls", "/t6/no"),
        ("rm", "/t6/no"),
        ("rm", "/tool/t6/no"),
        ("rm", "/tool/no"),
        ("perms", "/t6/no"),
    ):
        said = store(*words, code=3)
        assert words[1] in said and "ENOENT" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("read", "not/absolute//"), ("write", "/t7/a"), ("perms", "/tool", "x9"), ("read",)]
)
def test_wrong_words_are_two(store, words):
    assert store(*words, code=2)


def test_watch_prints_events_and_meets_its_deadline(store, served):
    command = [*XENBUS, "store", "watch", "--json", "-n", "2", "--timeout", "20", "/t8"]
    env = os.environ | {"XENBUS_DIR": str(served)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert json.loads(process.stdout.readline()) == {"path": "/t8", "watch": "/t8"}
        store("write", "/t8/x", "1")
        assert json.loads(process.stdout.readline()) == {"path": "/t8/x", "watch": "/t8"}
        assert process.wait(10) == 0
    assert "2 events below /t8 (1 came)" in store("watch", "-n", "2", "--timeout", "0.05", "/t8", code=5)


def test_what_read_prints_can_be_written_again(store):
    value = "tab\t, newline\n, back\\slash and \x01\x7f"
    store("write", "/t10/a", value)
    shown = store("read", "/t10/a")[:-1]
    assert shown == r"tab\t, newline\n, back\\slash and \001\x7f"
    store("write", "-e", "/t10/b", shown, "/t10/c", r"\xff\0\377")
    assert store("read", "--raw", "/t10/b") == value
    assert store("read", "-p", "/t10/c", "/t10/b") == f"/t10/c: \\xff\\000\\xff\n/t10/b: {shown}\n"
    assert "backslash" in store("write", "-e", "/t10/b", r"\q", code=2)
    assert "backslash" in store("write", "-e", "/t10/b", "\\777", code=2)
    assert store("read", "--raw", "/t10/b") == value


def test_exists_is_quiet(store):
    store("write", "/t11/a", "1")
    assert store("exists", "/t11/a", "/t11") == ""
    assert store("exists", "/t11/a", "/t11/none", code=3) == ""
    assert "EINVAL" in store("exists", "/t11//a", code=2)


def test_list_prints_names(store):
    store("write", "/t12/a/b", "1", "/t12/c", "2")
    assert store("list", "/t12") == "a\nc\n"
    assert store("list", "-p", "/t12", "/t12/a") == "/t12/a\n/t12/c\n/t12/a/b\n"
    assert json.loads(store("list", "--json", "/t12/a", "/t12/c")) == {"/t12/a": ["b"], "/t12/c": []}
    assert store("list", "/t12/c") == ""


def test_rm_tidies_up_and_removes_all_or_nothing(store):
    store("write", "/t13/keep", "1", "/t13/a/b/c/d", "2", "/t13/v/w", "3", "/t13/v", "value")
    store("rm", "/t13/a/b/c", "/t13/none", code=3)
    assert store("exists", "/t13/a/b/c/d") == ""
    store("rm", "-t", "/t13/a/b/c/d", "/t13/v/w")
    assert store("list", "/t13") == "keep\nv\n"
    store("rm", "-t", "/t13/v", "/t13/keep")
    store("exists", "/t13", code=3)


def test_perms_of_all_below(store):
    store("write", "/t14/a/b", "1", "/t14/c", "2")
    store("perms", "-r", "/t14/a", "n0", "r3")
    lines = store("ls", "-f", "-p", "/t14").splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["(n0,r3)", "(n0,r3)", "(n0)"]


def test_control_asks_the_daemon(store):
    assert store("control", "check") == "OK\n"
    assert store("control", "quota").startswith("Quota settings:\n")
    assert "EINVAL" in store("control", "none", code=2)


def test_nobody_there_is_six(capsys, tmp_path):
    for words in (["--dir", str(tmp_path)], ["--socket", str(tmp_path / "s")]):
        assert run(["store", "ls", *words]) == 6
        assert str(tmp_path) in capsys.readouterr().err


def test_a_second_server_of_a_directory_is_refused(served):
    command = [*XENBUS, "store", "serve", "--dir", str(served)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert str(served) in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout


def test_wrong_quotas_are_named(tmp_path, capsys):
    assert run(["store", "serve", "--dir", str(tmp_path), "--quota", "nodes=many"]) == 2
    assert "nodes=many" in capsys.readouterr().err


def test_which_store_is_meant(tmp_path, monkeypatch):
    assert address(tmp_path, tmp_path / "s") == str(tmp_path / "s")
    assert address(tmp_path, None) == str(tmp_path / "xenstored" / "socket")
    (tmp_path / "socket").touch()
    assert address(tmp_path, None) == str(tmp_path / "socket")
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    monkeypatch.setenv("XENSTORED_RUNDIR", str(tmp_path))
    assert address(None, None) == str(tmp_path / "socket")
    monkeypatch.setenv("XENSTORED_PATH", "/elsewhere")
    assert address(None, None) == "/elsewhere"


def test_xens_own_tools_agree(store, served):
    env = os.environ | {"XENSTORED_RUNDIR": str(served)}
    ls, write = xenstore_tool("xenstore-ls"), xenstore_tool("xenstore-write")
    subprocess.run([write, "/t9/theirs", "a b"], env=env, check=True, timeout=10)
    store("write", "/t9/ours", "line\nwith \\ and \x01 and \x7f", "/t9/e", "")
    theirs = subprocess.run(
        [ls, "-f", "/t9"], env=env, check=True, timeout=10, capture_output=True, text=True
    )
    assert store("ls", "-f", "/t9") == theirs.stdout
    assert '/t9/theirs = "a b"' in theirs.stdout
