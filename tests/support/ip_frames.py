"""IP packets and Ethernet frames for tests, and their checksums by the book (RFC 1071, word by word)."""

from __future__ import annotations

import struct

ETHER = bytes.fromhex("020000000001 020000000002")
V4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
V6 = bytes(range(16)), bytes(range(16, 32))


def words(data):
    """The folded sum, by the book."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(payload, protocol, options=b"", length=None):
    ihl = 5 + len(options) // 4
    total = ihl * 4 + len(payload) if length is None else length
    head = struct.pack(">BBHHHBBH", 0x40 | ihl, 0, total, 0x1234, 0x4000, 64, protocol, 0)
    head += V4[0] + V4[1] + options
    value = 0xFFFF ^ words(head)
    return head[:10] + struct.pack(">H", value) + head[12:] + payload


def ipv6(payload, protocol, extensions=(), length=None):
    """extensions: (number, the bytes behind its first one)"""
    chain = b""
    kinds = [number for number, _ in extensions] + [protocol]
    for index, (_, rest) in enumerate(extensions):
        chain += bytes([kinds[index + 1]]) + rest
    size = len(chain) + len(payload) if length is None else length
    return struct.pack(">IHBB", 6 << 28, size, kinds[0], 64) + V6[0] + V6[1] + chain + payload


def tcp(payload, flags=0x10, sequence=0xFFFFFF00, options=b""):
    offset = (5 + len(options) // 4) << 4
    return struct.pack(">HHIIBBHHH", 1, 2, sequence, 7, offset, flags, 100, 0, 0) + options + payload


def udp(payload, length=None):
    return struct.pack(">HHHH", 1, 2, 8 + len(payload) if length is None else length, 0) + payload


def ether(packet, tags=()):
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    return ETHER + b"".join(struct.pack(">HH", t, 5) for t in tags) + struct.pack(">H", kind) + packet


def summed(data, addresses, protocol, transport):
    """What a receiver computes over a right packet is 0xFFFF."""
    return words(addresses + struct.pack(">II", len(transport), protocol) + transport)
