"""Two nodes for tests: network namespaces of their own, with a cable between them, names, and addresses by these names."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ADDRESSES = {"node-0": "10.77.0.1", "node-1": "10.77.0.2"}
SETUP = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


@contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, list[str]]]:
    """Make them, or skip the test with the reason why they can't be made.

    Args:
        folder: for a file of their names. The nodes share the file system.

    Yields:
        By a node's name, what to put before a command that is to run there.
    """
    if missing := [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]:
        pytest.skip(f"two nodes need {', '.join(missing)}")
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items()))
    spaces = {name: f"pmm-{folder.name[-20:]}-{name}" for name in ADDRESSES}
    nodes = {
        name: ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "sh", "-c", SETUP, "sh", str(hosts), name]
        for name, space in spaces.items()
    }
    first, second = spaces.values()
    steps = [
        *(["netns", "add", space] for space in spaces.values()),
        ["-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second],
    ]
    for (name, space), link in ((node, link) for node in spaces.items() for link in ("lo", "cable")):
        if link == "cable":
            steps.append(["-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", link])
        steps.append(["-n", space, "link", "set", link, "up"])
    try:
        made = [subprocess.run(["ip", *step], capture_output=True, text=True) for step in steps]
        tried = [subprocess.run([*node, "true"], capture_output=True, text=True) for node in nodes.values()]
        if failed := [done.stderr.strip() for done in (*made, *tried) if done.returncode]:
            pytest.skip(f"no right to make network namespaces: {failed[0]}")
        yield nodes
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def sent_by_cable(node: list[str]) -> int:
    """Tell how many bytes a node has sent to the other."""
    read = subprocess.run([*node, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
    (counts,) = [line.split(":")[1].split() for line in read.splitlines() if line.strip().startswith("cable:")]
    return int(counts[8])


def lose(node: list[str]) -> None:
    """End all of a node's processes at once, as a power cut does."""
    found = subprocess.run(["ip", "netns", "pids", node[3]], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
