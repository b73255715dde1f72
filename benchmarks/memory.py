"""What a process holds in memory, as Linux counts it."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def process_bytes(field: str) -> int:
    """Return one of the sizes of this process.

    Args:
        field: "VmRSS", what it holds now, of which "RssAnon" is its own and "RssFile" what it has read of files, or "VmHWM",
            the largest size it had: its own, where what `getrusage` says begins with that of the process which started it.

    Raises:
        RuntimeError: the system does not tell.
    """
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(
        "This system does not tell in /proc/self/status how much memory a process holds; it needs Linux."
    )
