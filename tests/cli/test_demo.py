"""`xenbus demo` through the real entry: what it shows, what is left when it is ended, what it refuses."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from tests.support import netlab
from tests.support.hosts import place, processes, wait_dead

from xenbus.cli.main import run

pytestmark = pytest.mark.slow
XENBUS = [sys.executable, "-m", "xenbus.cli.main"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_demo_that_is_ended_leaves_nothing_running(number, code):
    with place() as root:
        command = [*XENBUS, "demo", "--json", "--dir", str(root)]
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in demo.stderr:
            if b"Data through the ring" in line:
                break
        pids = processes(root)
        demo.send_signal(number)
        out, err = demo.communicate(timeout=20)
        assert demo.returncode == code and b"Traceback" not in err, err
        assert not wait_dead(pids)
        if number != signal.SIGKILL:
            assert not [path for path in root.rglob("*") if path.is_socket()]
        if number == signal.SIGTERM:
            assert json.loads(out)["ok"] is False


# What the head of FreeBSD's xenbusb.c has.
SEEDS_TREE = """
xenstore0
  xenbusb_front0
    xn0
    xbd0
    xbd1
  xenbusb_back0
    xbbd0
    xnb0
    xnb1
"""


WAYS = (
    "ping and a file over TCP between two kernels' stacks",
    "ARP, ICMP and UDP between two guests through the packet interface",
)


def seen_in_the_picture(shown, kernels):
    """What a demo's --json has of the step with the seed's tree; the facts' texts."""
    assert shown["verdict"].startswith("verified: ") and len(shown["steps"]) in (9, 10)
    assert [way in shown["verdict"] for way in WAYS] == [kernels, not kernels]
    assert "the seed's tree" in shown["verdict"] and "console" in shown["verdict"]
    (step,) = [step for step in shown["steps"] if "seed's own picture" in step["step"]]
    tree = next(lines for name, lines in step["trees"][0].items() if name.startswith("guest "))
    assert [line.partition(" at ")[0] for line in tree] == SEEDS_TREE.strip().splitlines()
    said = [fact["text"] for fact in step["facts"]]
    assert sum("ping from" in text and "5 of 5" in text for text in said) == (3 if kernels else 2)
    return said, [fact["bytes"] for fact in step["facts"] if "bytes" in fact]


def test_the_demo_holds_and_tells_it_as_data(tmp_path):
    """Where there is no `unshare` (nor any other program), guests speak through the packet interface."""
    image = tmp_path / "my.img"
    image.write_bytes(os.urandom(3 << 20))
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    command = [*XENBUS, "demo", "--json", "--image", str(image)]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, timeout=50, env=environment)
    shown = json.loads(done.stdout)
    assert done.returncode == 0 and shown["ok"] is True, shown["verdict"]
    said, moved = seen_in_the_picture(shown, False)
    assert any("unshare is not installed" in text for text in said) and moved == [256 << 10]
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before  # it writes on a copy


def test_a_demo_that_is_held_has_the_picture_until_it_is_interrupted():
    """With kernels' stacks, where there can be."""
    kernels = not netlab.missing()
    with place() as root:
        command = [*XENBUS, "demo", "--hold", "--json", "--dir", str(root)]
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = []
        for line in demo.stderr:
            said.append(line)
            if "Held until Ctrl-C" in line:
                break
        else:
            raise AssertionError("".join(said) + demo.communicate()[0])
        hints = [demo.stderr.readline() for _ in range(3 * kernels)]
        assert all("a shell beside" in hint for hint in hints), hints
        pids = [int(hint.split()[-1]) for hint in hints] + processes(root)
        found = subprocess.run(
            [*XENBUS, "tree", "guest", "--dir", str(root)], capture_output=True, text=True, timeout=20
        )
        held = [line.removeprefix("  ").partition(" at ")[0] for line in found.stdout.splitlines()[1:]]
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=20)
        assert demo.returncode == 0 and "Traceback" not in err, err
        assert not wait_dead(pids)
    assert held == SEEDS_TREE.strip().splitlines()
    _, moved = seen_in_the_picture(json.loads(out), kernels)
    assert moved == ([8 << 20] * 2 if kernels else [256 << 10])


def test_a_demo_that_cannot_be_is_no_traceback(tmp_path, capsys):
    assert run(["demo", "--image", str(tmp_path / "nothing")]) == 2
    (tmp_path / "disk.img").write_text("mine")
    assert run(["demo", "--dir", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "disk.img").read_text() == "mine"


@pytest.mark.parametrize("size", [0, 4096, (2 << 20) + 100])
def test_a_demo_on_an_image_that_cannot_be_its_disk_says_so_first(tmp_path, capsys, size):
    image = tmp_path / "odd.img"
    with image.open("wb") as file:
        file.truncate(size)
    assert run(["demo", "--image", str(image), "--dir", str(tmp_path / "d")]) == 2
    assert f"odd.img: {size} bytes; the demo needs" in capsys.readouterr().err
    assert not (tmp_path / "d" / "disk.img").exists()
