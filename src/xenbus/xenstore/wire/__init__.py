"""The XenStore wire protocol, sans-IO: messages, codecs, permissions, paths.

May know errors; knows nothing of clients, daemons, trees or sockets.
"""

from xenbus.xenstore.wire.codecs import (
    CODECS,
    NOTHING,
    OK,
    Codec,
    encode_event,
    join_words,
    parse_error,
    parse_event,
    parse_number,
    split_words,
)
from xenbus.xenstore.wire.message import (
    HEADER,
    HEADER_SIZE,
    PAYLOAD_MAX,
    Message,
    Op,
    Parser,
    ProtocolError,
    encode,
    op_name,
)
from xenbus.xenstore.wire.paths import (
    ABS_PATH_MAX,
    REL_PATH_MAX,
    absolute,
    check_path,
    domain_path,
    is_valid_absolute,
    is_valid_relative,
    is_valid_special,
    join,
    parent,
)
from xenbus.xenstore.wire.perms import DOMID_ANY, DOMID_MAX, Access, Perm, format_perms, parse_perms

__all__ = [
    "ABS_PATH_MAX",
    "CODECS",
    "DOMID_ANY",
    "DOMID_MAX",
    "HEADER",
    "HEADER_SIZE",
    "NOTHING",
    "OK",
    "PAYLOAD_MAX",
    "REL_PATH_MAX",
    "Access",
    "Codec",
    "Message",
    "Op",
    "Parser",
    "Perm",
    "ProtocolError",
    "absolute",
    "check_path",
    "domain_path",
    "encode",
    "encode_event",
    "format_perms",
    "is_valid_absolute",
    "is_valid_relative",
    "is_valid_special",
    "join",
    "join_words",
    "op_name",
    "parent",
    "parse_error",
    "parse_event",
    "parse_number",
    "parse_perms",
    "split_words",
]
