"""Volumes for a server's store that a test can fill, slow down, and take the power from.

IO: mounts in the temp dir; needs root and Linux (`can_mount` says what is missing). Every
disk is a context manager that unmounts and removes all it made, also after an error; what
a killed process left mounted is removed by the next disk.

What a power cut leaves (`MortalDisk`). There are two caches between a ``write`` and the
image file of a loop device. The upper one, the page cache and the journal of the mounted
ext4, is what a machine loses; the lower one, the page cache of the image file, stands for
the device: what is in it has been handed to the device, and a copy of the file sees it.
`MortalDisk.cut` shuts ext4 down without letting its journal go first, in one call to the
kernel; from then on nothing of the upper cache can reach the device any more, no matter
when the server is killed or how long the copy takes. Then the image is copied as it is, and
the copy is mounted in the same place; its journal is replayed as at any boot.

Not guaranteed: a device that loses its own write cache or tears a sector, and anything
that is younger than its ``fsync`` but was written back by the kernel by itself: ext4
commits its journal every 5 s (``commit=``), and the kernel writes back what has been dirty
for 30 s (``vm.dirty_expire_centisecs``, looked at every 5 s). A run shorter than that loses
what was not synced, all of it; a longer one loses the last 5 to 35 seconds of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

from foundation_nats.testing.scratch import Scratch, run_program

_PREFIX = "foundation-disk-"
_BALLAST = "ballast"
_CHUNK = 256 * 1024
_MIB = 1024**2
_QUIET_TIMEOUT_S = 5.0
_EXT4_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NO_LOG_FLUSH = struct.pack("I", 2)
_THROTTLES = Path("/sys/fs/cgroup/blkio")


@functools.cache
def can_mount() -> str | None:
    """None if the disks of this module work here; else the reason why not."""
    if sys.platform != "linux":
        return "disks need Linux"
    if os.geteuid() != 0:
        return "mounting needs root"
    missing = [name for name in ("mount", "umount", "mkfs.ext4", "cp") if not shutil.which(name)]
    if missing:
        return f"there is no {', '.join(missing)}"
    try:
        with MortalDisk(8) as disk:
            disk.cut()
    except OSError as error:
        return f"a loop device can't be mounted: {error}"
    return None


def can_throttle() -> str | None:
    """None if `SlowDisk` works here; else the reason why not."""
    reason = can_mount()
    if reason is None and not (_THROTTLES / "blkio.throttle.write_iops_device").exists():
        return f"{_THROTTLES} has no throttles (cgroup v1) and there is no dm-delay"
    return reason


class _Disk(Scratch):
    """A volume mounted in a directory of its own."""

    def __init__(self, size_mb: int) -> None:
        self.size_mb = size_mb
        self._home: Path | None = None

    @property
    def path(self) -> Path:
        """Where it is mounted; a server's store."""
        return self._directory / "volume"

    @property
    def free_bytes(self) -> int:
        """What can still be written to it."""
        return shutil.disk_usage(self.path).free

    @property
    def _directory(self) -> Path:
        if self._home is None:
            raise RuntimeError("the disk is not mounted; use it in a with statement")
        return self._home

    def fill(self, leave_kb: int = 0) -> None:
        """Write ballast until only *leave_kb* are free; 0: until nothing more fits."""
        with (self.path / _BALLAST).open("ab", buffering=0) as ballast:
            while True:
                size = min(_CHUNK, self.free_bytes - leave_kb * 1024)
                if leave_kb and size <= 0:
                    return
                try:
                    # At the end the file system itself says that it is full.
                    ballast.write(bytes(max(size, 1)))
                except OSError:
                    return

    def free(self) -> None:
        """Remove the ballast."""
        (self.path / _BALLAST).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it and remove everything; idempotent."""
        home, self._home = self._home, None
        if home is not None:
            _remove(home)

    def _mount(self) -> None:
        raise NotImplementedError

    def _make(self) -> None:
        _remove_abandoned()
        self._home = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self.path.mkdir()
        self._mount()


class SmallDisk(_Disk):
    """A volume in memory of *size_mb* MiB, to be filled.

    Example:
        >>> with SmallDisk(64) as disk:
        ...     async with TestServer(EmbeddedConfig(store=disk.path)) as server:
        ...         disk.fill()
    """

    def _mount(self) -> None:
        run_program(
            "mount", "-t", "tmpfs", "-o", f"size={self.size_mb}m", "foundation", str(self.path)
        )


class MortalDisk(_Disk):
    """A volume of *size_mb* MiB with ext4 whose power can be cut.

    The order at a power cut is SIGKILL of the servers, `cut` of all disks, `power_loss` of
    each, restart of the servers: the volume is again at the same path. A server that still
    runs at the cut sees a disk that fails, and may say so to its clients.

    Args:
        options: of ``mount``; ``commit=300`` keeps ext4 from committing by itself for so long.

    Example:
        >>> with MortalDisk(256) as disk:
        ...     async with TestServer(EmbeddedConfig(store=disk.path)) as server:
        ...         server.kill()
        ...         disk.power_loss()
        ...         await server.restart()
    """

    def __init__(self, size_mb: int, *, options: str = "") -> None:
        super().__init__(size_mb)
        self._options = options
        self._lives = 0
        self._is_cut = False

    def settle(self) -> None:
        """Write everything back, as if it had been written minutes ago."""
        run_program("sync", "-f", str(self.path))

    def cut(self) -> None:
        """Take the power away: nothing reaches the device any more, every write fails."""
        if self._is_cut:
            return
        volume = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(volume, _EXT4_SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(volume)
        self._is_cut = True

    def power_loss(self) -> Path:
        """Cut the power if it is not cut yet, and mount in the same place what is left.

        Files that somebody still has open are of the volume before.

        Returns:
            `path`, with the volume after the power loss.
        """
        self.cut()
        self._wait_quiet()
        before = self._image
        self._lives += 1
        # A copy, because the dead file system lives on in whoever has a file open, and may
        # still write its superblock when the last one is closed.
        run_program("cp", "--sparse=auto", str(before), str(self._image))
        _unmount(self.path)
        before.unlink()
        self._attach()
        return self.path

    @property
    def _image(self) -> Path:
        return self._directory / f"image-{self._lives}"

    def _mount(self) -> None:
        with self._image.open("wb") as image:
            image.truncate(self.size_mb * _MIB)
        # Initialised at once, so that no kernel thread writes later.
        extended = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        run_program("mkfs.ext4", "-q", "-F", "-m", "0", "-E", extended, str(self._image))
        self._attach()

    def _attach(self) -> None:
        options = ",".join(filter(None, ("loop", self._options)))
        run_program("mount", "-t", "ext4", "-o", options, str(self._image), str(self.path))
        self._is_cut = False

    @property
    def _device(self) -> str:
        number = self.path.stat().st_dev
        return f"{os.major(number)}:{os.minor(number)}"

    def _wait_quiet(self) -> None:
        """Wait for what the device had accepted before the cut, so that the copy is of one moment."""
        in_flight = Path(f"/sys/dev/block/{self._device}/inflight")
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        while any(int(count) for count in in_flight.read_text().split()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{in_flight} is not zero after {_QUIET_TIMEOUT_S:g} s")
            time.sleep(0.001)


class SlowDisk(MortalDisk):
    """A `MortalDisk` that does few operations a second, so that ``fsync`` takes long.

    The limit is of the device and for whoever writes to it from the root cgroup, which is
    where tests and their servers are unless somebody moved them.
    """

    def __init__(self, size_mb: int, *, options: str = "") -> None:
        super().__init__(size_mb, options=options)
        self._throttled: str | None = None

    def slow(self, writes_per_s: int) -> None:
        """Allow only so many writes a second from now on; 0 ends it."""
        self._throttled = self._device
        (_THROTTLES / "blkio.throttle.write_iops_device").write_text(
            f"{self._throttled} {writes_per_s}"
        )

    def power_loss(self) -> Path:
        """As `MortalDisk.power_loss`; the volume after it is not slow."""
        self._hurry()
        return super().power_loss()

    def close(self) -> None:
        """Unmount it and remove everything; idempotent."""
        self._hurry()
        super().close()

    def _hurry(self) -> None:
        device, self._throttled = self._throttled, None
        if device is not None:
            (_THROTTLES / "blkio.throttle.write_iops_device").write_text(f"{device} 0")


def _unmount(path: Path) -> None:
    """Unmount; if somebody still has a file open there, at least take it out of sight."""
    # Asked of the kernel: a file system that was shut down does not answer a stat.
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    if str(path) not in (line.split()[1] for line in mounts):
        return
    try:
        run_program("umount", str(path))
    except OSError:
        run_program("umount", "-l", str(path))


def _remove(home: Path) -> None:
    _unmount(home / "volume")
    shutil.rmtree(home, ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove what processes that were killed could not remove themselves."""
    for home in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = home.name.removeprefix(_PREFIX).split("-")[0]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        with contextlib.suppress(OSError):
            _remove(home)


__all__ = ["MortalDisk", "SlowDisk", "SmallDisk", "can_mount", "can_throttle"]
