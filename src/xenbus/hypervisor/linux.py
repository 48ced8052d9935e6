"""A domain's handle on a real Xen, from user space of Linux: gntdev, gntalloc, evtchn.

May know the interface, memory and the devices' ABI; knows nothing of the store: the caller says which domain
this is (the store's node `domid`). Whatever this process leaves open the kernel gives back when it dies.
Linux tells user space nothing at a resume: who sees one closes this handle and opens another.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xenbus.errors import HypervisorError, LinkDown, UsageError
from xenbus.hypervisor import linux_abi as abi
from xenbus.hypervisor.handle import Handle
from xenbus.hypervisor.interface import (
    PAGE_SIZE,
    CopyOp,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_general_error,
    GNTST_okay,
    GrantedPages,
    Held,
    Hypervisor,
    Mapping,
    PageCopier,
    check_copy,
)
from xenbus.hypervisor.limits import check_domid
from xenbus.hypervisor.linux_channels import LinuxChannel, PortTable
from xenbus.hypervisor.memory import Region

# Pieces that one system call of `copy_run` copies at most.
SEGMENTS = 512
# Xen names a page that may not be used by one number or the other, depending on how far it looked.
_PROBE_ERRORS = {GNTST_bad_gntref: "ENOENT", GNTST_bad_domain: "ENOENT"}


class LinuxPages:
    """GrantedPages and Mapping: pages behind one of the two devices. `view` raises ValueError once they are
    given back."""

    __slots__ = ("_region", "domid", "index", "refs", "view", "writable")

    def __init__(self, domid: int, refs: tuple[int, ...], writable: bool, region: Region, index: int) -> None:
        self._region = region
        self.domid = domid
        self.refs = refs
        self.writable = writable
        self.index = index
        self.view = region.view

    def drop(self) -> None:
        """The pages leave this address space now. A slice that somebody kept reads zeros from here on: the
        peer has its pages back at once, and a late reader does not crash."""
        self._region.detach()


class LinuxHypervisor(Handle):
    """Hypervisor. Made in a running loop; each device is opened when it is first needed."""

    def __init__(self, domid: int) -> None:
        super().__init__(check_domid(domid))
        self._fds: dict[str, int] = {}
        self._granted: dict[LinuxPages, None] = {}
        self._mapped: dict[LinuxPages, None] = {}
        self._granted_pages = 0
        self._mapped_pages = 0
        self._ports = PortTable()
        self._segments: Region | None = None  # what `copy_run` tells the kernel
        self._closed = False

    def held(self) -> Held:
        return Held(self._granted_pages, self._mapped_pages, len(self._ports))

    def _check_open(self) -> None:
        if self._closed:
            raise LinkDown(f"the handle of domain {self._domid} is closed")

    def _device(self, path: str) -> int:
        self._check_open()
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = abi.open_device(path)
        return fd

    # -- grants

    async def alloc(self, domid: int, count: int, *, writable: bool = True) -> LinuxPages:
        """ENOSPC: gntalloc's own limit, for the whole domain, is 1024 pages (module parameter `limit`)."""
        fd = self._device(abi.GNTALLOC)
        check_domid(domid)
        if count < 1:
            raise UsageError(f"{count} pages")
        what = f"granting {count} pages to domain {domid}"
        flags = abi.GNTALLOC_FLAG_WRITABLE if writable else 0
        argument = bytearray(abi.ALLOC_GREF.pack(domid, flags, count, 0)) + bytes(4 * max(count, 2))
        abi.call(fd, abi.IOCTL_GNTALLOC_ALLOC_GREF, argument, what)
        index: int = abi.ALLOC_GREF.unpack_from(argument)[3]
        with memoryview(argument)[abi.ALLOC_GREF.size :].cast("I") as words:
            refs = tuple(words[:count])
        try:
            region = Region.of_fd(fd, count * PAGE_SIZE, writable=True, offset=index)
        except HypervisorError:
            self._dealloc(index, count)
            raise
        pages = LinuxPages(domid, refs, writable, region, index)
        self._granted[pages] = None
        self._granted_pages += count
        return pages

    async def revoke(self, pages: GrantedPages) -> None:
        """While the peer still maps a page it may map it again: Linux withdraws the grant after the last
        unmap (drivers/xen/grant-table.c, gnttab_end_foreign_access)."""
        if isinstance(pages, LinuxPages) and pages in self._granted:
            del self._granted[pages]
            self._granted_pages -= len(pages.refs)
            pages.drop()
            self._dealloc(pages.index, len(pages.refs))

    def _dealloc(self, index: int, count: int) -> None:
        argument = abi.DEALLOC_GREF.pack(index, count)
        abi.call(
            self._fds[abi.GNTALLOC], abi.IOCTL_GNTALLOC_DEALLOC_GREF, argument, f"revoking {count} pages"
        )

    # -- others' pages

    async def map(self, domid: int, refs: Sequence[int], *, writable: bool = True) -> LinuxPages:
        """HypervisorError EPERM also for a ref that nobody uses: Xen does not tell it from one for another
        domain. ENOENT for a ref beyond the table, or no such domain."""
        fd = self._device(abi.GNTDEV)
        check_domid(domid)
        if not refs:
            raise UsageError("mapping no page")
        what = f"mapping {len(refs)} pages of domain {domid} for domain {self._domid}"
        if any(not 0 <= ref < 1 << 32 for ref in refs):
            raise HypervisorError("ENOENT", what)
        argument = bytearray(abi.MAP_GRANT.pack(len(refs), 0, 0))
        argument += b"".join(abi.MAP_GRANT_REF.pack(domid, ref) for ref in refs)
        abi.call(fd, abi.IOCTL_GNTDEV_MAP_GRANT_REF, argument, what)
        index: int = abi.MAP_GRANT.unpack_from(argument)[2]
        try:
            region = Region.of_fd(fd, len(refs) * PAGE_SIZE, writable=writable, offset=index)
        except HypervisorError as error:
            self._forget_index(index, len(refs))
            name, why = self._why_not(domid, refs, error.name)
            raise HypervisorError(name, f"{what}{why}") from None
        mapping = LinuxPages(domid, tuple(refs), writable, region, index)
        self._mapped[mapping] = None
        self._mapped_pages += len(refs)
        return mapping

    def _why_not(self, domid: int, refs: Sequence[int], name: str) -> tuple[str, str]:
        """gntdev says EINVAL whatever Xen had against a page; a copy of one byte of each says more. The name
        of the error, and which page it is about."""
        if name != "EINVAL":
            return name, ""
        byte = memoryview(bytearray(1))
        tried = self._copy([CopyOp(domid, ref, 0, 1, byte, False) for ref in refs])
        for ref, status in zip(refs, tried, strict=True):
            if status != GNTST_okay:
                return _PROBE_ERRORS.get(status, "EPERM"), f" (ref {ref})"
        return "EPERM", f" (refs {refs[0]} to {refs[-1]} can be read, and not written)"

    async def unmap(self, mapping: Mapping) -> None:
        if isinstance(mapping, LinuxPages) and mapping in self._mapped:
            del self._mapped[mapping]
            self._mapped_pages -= len(mapping.refs)
            mapping.drop()
            self._forget_index(mapping.index, len(mapping.refs))

    def _forget_index(self, index: int, count: int) -> None:
        argument = abi.UNMAP_GRANT.pack(index, count, 0)
        abi.call(
            self._fds[abi.GNTDEV], abi.IOCTL_GNTDEV_UNMAP_GRANT_REF, argument, f"unmapping {count} pages"
        )

    def notify_on_unmap(
        self, pages: LinuxPages, *, clear_byte: int | None = None, channel: LinuxChannel | None = None
    ) -> None:
        """What the kernel does when `pages` (mapped or granted by this handle) are given back, by us or by
        the end of this process: sets the byte at offset `clear_byte` to 0, kicks `channel`. There is one such
        order for a mapping, and for each granted page; another call replaces it, with neither ends it."""
        self._check_open()
        if pages not in self._mapped and pages not in self._granted:
            raise UsageError("pages that this handle does not hold")
        action = abi.UNMAP_NOTIFY_CLEAR_BYTE if clear_byte is not None else 0
        action |= abi.UNMAP_NOTIFY_SEND_EVENT if channel is not None else 0
        offset = clear_byte or 0
        if not 0 <= offset < len(pages.refs) * PAGE_SIZE:
            raise UsageError(f"byte {offset} of {len(pages.refs)} pages")
        argument = abi.UNMAP_NOTIFY.pack(pages.index + offset, action, channel.port if channel else 0)
        fd = self._fds[abi.GNTDEV if pages in self._mapped else abi.GNTALLOC]
        abi.call(fd, abi.IOCTL_SET_UNMAP_NOTIFY, argument, "what happens on unmap")

    async def copy(self, ops: Sequence[CopyOp]) -> list[int]:
        self._check_open()
        return self._copy(ops)

    def _copy(self, ops: Sequence[CopyOp]) -> list[int]:
        status = [_check(op) for op in ops]
        good = [number for number, value in enumerate(status) if value == GNTST_okay]
        if not good:
            return status
        segments = bytearray(abi.COPY_SEGMENT_SIZE * len(good))
        kept: list[object] = []
        for at, number in enumerate(good):
            _pack_segment(segments, at * abi.COPY_SEGMENT_SIZE, ops[number], kept)
        argument = abi.GRANT_COPY.pack(len(good), _address(segments, kept))
        try:
            abi.call(self._device(abi.GNTDEV), abi.IOCTL_GNTDEV_GRANT_COPY, argument, "grant copy")
        except HypervisorError:
            for number in good:  # gntdev.h: the status of all segments is undefined
                status[number] = GNTST_general_error
            return status
        for at, number in enumerate(good):
            end = at * abi.COPY_SEGMENT_SIZE + abi.COPY_END
            status[number] = abi.COPY_TAIL.unpack_from(segments, end)[2]
        return status

    def copy_run(
        self, domid: int, pieces: Sequence[tuple[int, int, int]], region: Region, *, to_remote: bool
    ) -> bool:
        """PageCopier: one system call for SEGMENTS of them."""
        self._check_open()
        if self._segments is None:
            self._segments = Region(SEGMENTS * abi.COPY_SEGMENT_SIZE, shared=False)
        at = region.address
        for start in range(0, len(pieces), SEGMENTS):
            part = pieces[start : start + SEGMENTS]
            if not self._copy_part(domid, part, at, self._segments, to_remote):
                return False
            at += sum([length for _, _, length in part])
        return True

    def _copy_part(
        self, domid: int, pieces: Sequence[tuple[int, int, int]], at: int, segments: Region, to_remote: bool
    ) -> bool:
        view, size, end = segments.view, abi.COPY_SEGMENT_SIZE, 0
        if to_remote:
            pack, flag = abi.COPY_OUT.pack_into, abi.GNTCOPY_dest_gref
            for ref, offset, length in pieces:
                pack(view, end, at, ref, offset, domid, length, flag, 0)
                at += length
                end += size
        else:
            pack, flag = abi.COPY_IN.pack_into, abi.GNTCOPY_source_gref
            for ref, offset, length in pieces:
                pack(view, end, ref, offset, domid, at, length, flag, 0)
                at += length
                end += size
        argument = abi.GRANT_COPY.pack(len(pieces), segments.address)
        try:
            abi.call(self._device(abi.GNTDEV), abi.IOCTL_GNTDEV_GRANT_COPY, argument, "grant copy")
        except HypervisorError:
            return False
        # grant_table.h: GNTST_* are from -13 to 0, so that the lower byte says whether it is 0.
        return not any(view[:end].tobytes()[abi.COPY_STATUS :: size])

    # -- event channels

    async def alloc_unbound(self, remote_domid: int, handler: Callable[[], None]) -> LinuxChannel:
        self._check_open()
        return self._ports.alloc_unbound(check_domid(remote_domid), handler)

    async def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: Callable[[], None]
    ) -> LinuxChannel:
        self._check_open()
        return self._ports.bind_interdomain(check_domid(remote_domid), remote_port, handler)

    def abandon(self) -> None:
        """This domain was restored: refs and ports are of a life that is over, and whatever has their numbers
        now is another's. gntalloc and gntdev can bear to be closed then, evtchn can not (see PortTable)."""
        self._closed = True
        self._ports.abandon()
        self._let_go()

    async def close(self) -> None:
        self._closed = True
        self._ports.close()
        self._let_go()

    def _let_go(self) -> None:
        for pages in (*self._mapped, *self._granted):
            pages.drop()
        self._mapped.clear()
        self._granted.clear()
        self._mapped_pages = self._granted_pages = 0
        if self._segments is not None:
            self._segments.close()
            self._segments = None
        for fd in self._fds.values():  # gntdev.c, gntalloc.c: and with it whatever was still in their lists
            os.close(fd)
        self._fds.clear()


def _check(op: CopyOp) -> int:
    if not check_copy(op):
        return GNTST_bad_copy_arg
    try:
        check_domid(op.domid)
    except UsageError:
        return GNTST_bad_domain
    return GNTST_okay if 0 <= op.ref < 1 << 32 else GNTST_bad_gntref


def _address(buffer: bytearray | memoryview, kept: list[object]) -> int:
    """Where a writable buffer is; `kept` holds it there."""
    pointer = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    kept.append(pointer)
    return ctypes.addressof(pointer)


def _pack_segment(segments: bytearray, at: int, op: CopyOp, kept: list[object]) -> None:
    local = op.local[: op.length]
    # Only a writable buffer tells ctypes its address.
    address = _address(bytearray(local) if local.readonly else local, kept)
    foreign = (op.ref, op.offset, op.domid)
    if op.to_remote:
        abi.COPY_LOCAL.pack_into(segments, at, address)
        abi.COPY_FOREIGN.pack_into(segments, at + abi.COPY_DEST, *foreign)
        flags = abi.GNTCOPY_dest_gref
    else:
        abi.COPY_FOREIGN.pack_into(segments, at, *foreign)
        abi.COPY_LOCAL.pack_into(segments, at + abi.COPY_DEST, address)
        flags = abi.GNTCOPY_source_gref
    abi.COPY_TAIL.pack_into(segments, at + abi.COPY_END, op.length, flags, 0)


if TYPE_CHECKING:
    _HANDLE: type[Hypervisor] = LinuxHypervisor
    _COPIER: type[PageCopier] = LinuxHypervisor
    _THINGS: tuple[type[GrantedPages], type[Mapping]] = (LinuxPages, LinuxPages)
